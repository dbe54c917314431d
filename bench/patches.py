"""AudioMAE's operations on patches in PyTorch, and the arguments of the ops of patches.

The masks are the paper's: of 64 x 8 patches, 51 columns and 6 rows of each stay, 306 of 512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels import draw_patch_mask, gather_tokens, masked_mse

T, BINS, P, N, D, H = 1024, 128, 16, 512, 768, 512
MASK = {
    "seed": 0,
    "streams": (3, 4),
    "grid": (64, 8),
    "columns": 51,
    "rows": 6,
    "shared": True,
}


def _whole_index(index: Tensor, width: int) -> Tensor:
    """AudioMAE's index for a gather: each token's index, repeated for each feature."""
    return index.unsqueeze(-1).repeat(1, 1, width)


def _embed(mel, ids_keep, weight, bias, position):
    x = F.conv2d(mel[:, None], weight.view(-1, 1, P, P), bias, stride=P)
    x = x.flatten(2).transpose(1, 2) + position
    return x.gather(1, _whole_index(ids_keep, x.shape[2]))


def _gather(x, ids_keep):
    return x.gather(1, _whole_index(ids_keep, x.shape[2]))


def _unshuffle(y, ids_restore, mask_token, position):
    masks = mask_token.repeat(y.shape[0], ids_restore.shape[1] - y.shape[1], 1)
    x = torch.cat([y, masks.to(y.dtype)], 1)
    return x.gather(1, _whole_index(ids_restore, x.shape[2])) + position


def _reconstruction(x, weight, bias, mel, ids_keep, ids_drop, ids_restore):
    predicted = F.linear(x, weight, bias)
    cells = mel.reshape(-1, T // P, P, BINS // P, P).transpose(2, 3)
    target = cells.reshape(-1, N, P * P)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    error = (predicted - (target - mean) / (var + 1e-6) ** 0.5).square().mean(-1)
    mask = torch.ones_like(error)
    mask[:, : ids_keep.shape[1]] = 0
    mask = mask.gather(1, ids_restore)
    return (error * mask).sum() / mask.sum()


def reconstruction(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mel: Tensor,
    ids_keep: Tensor,
    ids_drop: Tensor,
    ids_restore: Tensor,
) -> Tensor:
    """Mean squared error of the masked patches; `x` (B, N, H) is a decoder's output for all."""
    return masked_mse(gather_tokens(x, ids_drop), weight, bias, mel, ids_drop, norm_pix=True)


AUDIOMAE: dict[str, Callable[..., Tensor]] = {
    "patch_embed": _embed,
    "gather_tokens": _gather,
    "unshuffle_tokens": _unshuffle,
    "reconstruction": _reconstruction,
}
"""By the name of the op that they are compared with, which takes the same arguments."""


def arguments(op: str, B: int, device: str) -> dict[str, Any]:
    """Keyword arguments of an op; leaves require gradients.

    On a GPU their types are those of training under autocast: what a product gives, `y` of
    `unshuffle_tokens`, is bfloat16; all else, also what a LayerNorm gives, is float32.
    """
    torch.manual_seed(0)
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    sample_index = torch.arange(B, device=device)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, device=device) / 16).to(dtype).requires_grad_()

    def mel() -> Tensor:
        return torch.randn(B, T, BINS, device=device)

    if op == "draw_patch_mask":
        return {"sample_index": sample_index, **MASK}
    ids_keep, ids_drop, ids_restore = draw_patch_mask(sample_index, **MASK)
    K, M = ids_keep.shape[1], ids_drop.shape[1]
    return {
        "patch_embed": lambda: {
            "mel": mel(),
            "ids_keep": ids_keep,
            "weight": leaf(D, P * P),
            "bias": leaf(D),
            "position": leaf(N, D).detach(),
        },
        "gather_tokens": lambda: {"x": leaf(B, N, D), "ids_keep": ids_keep},
        "unshuffle_tokens": lambda: {
            "y": leaf(B, K, H, dtype=narrow),
            "ids_restore": ids_restore,
            "mask_token": leaf(H),
            "position": leaf(N, H).detach(),
        },
        "masked_mse": lambda: {
            "hidden": leaf(B, M, H),
            "weight": leaf(P * P, H),
            "bias": leaf(P * P),
            "mel": mel(),
            "ids_drop": ids_drop,
            "norm_pix": True,
        },
        "reconstruction": lambda: {
            "x": leaf(B, N, H),
            "weight": leaf(P * P, H),
            "bias": leaf(P * P),
            "mel": mel(),
            "ids_keep": ids_keep,
            "ids_drop": ids_drop,
            "ids_restore": ids_restore,
        },
    }[op]()
