"""The reference of `infonce`: plain PyTorch with the whole matrix of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels.infonce.backend import Direction
from flap_kernels.precision import accumulator_dtype


def infonce_reference(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
) -> Tensor:
    """The mean InfoNCE loss of a batch, by cross-entropy over all logits."""
    logits = scale * (audio @ text.T).to(accumulator_dtype(audio.dtype))
    if ids is not None:
        same = (ids[:, None] == ids[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(audio), device=audio.device)
    summed = {"symmetric": (logits, logits.T), "a2t": (logits,), "t2a": (logits.T,)}[direction]
    return torch.stack([F.cross_entropy(x, target) for x in summed]).mean()
