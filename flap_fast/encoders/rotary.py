"""Rotary positions: queries and keys turned by their token's position, so that their product
depends on the distance alone.

    (x_i, x_{i + d/2}) turned by position * 10000^(-2i / d), i = 0 .. d/2 - 1

B rows   L tokens of a row   H heads   d width of a head

Source: RoFormer, arXiv 2104.09864, section 3.2 (each number's partner is half a head away, which
is its layout with the numbers of a head in another order); for a ViT, arXiv 2403.13298.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(position: Tensor, head_width: int) -> Tensor:
    """(..., L) whole numbers -> (2, ..., L, 1, d / 2) float32, the cosines and sines of angles."""
    pair = torch.arange(head_width // 2, dtype=torch.float32, device=position.device)
    angle = position[..., None, None] * 10_000.0 ** (-2 * pair / head_width)
    return torch.stack([angle.cos(), angle.sin()])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """(..., L, H, d) -> the same, turned in float32."""
    cos, sin = rotation.unbind()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
