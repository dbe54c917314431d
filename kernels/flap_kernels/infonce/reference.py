"""The reference of `infonce`: plain PyTorch with the whole matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from flap_kernels.infonce.backend import Direction, Duplicates
from flap_kernels.infonce.positives import share_an_id
from flap_kernels.precision import accumulator_dtype


def infonce_reference(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    direction: Direction = "symmetric",
    ids: Tensor | None = None,
    duplicates: Duplicates = "mask",
) -> Tensor:
    """The mean InfoNCE loss of a batch, from the softmax of all logits."""
    logits = scale * (audio @ text.T).to(accumulator_dtype(audio.dtype))
    positives = torch.eye(*logits.shape, dtype=torch.bool, device=audio.device)
    if ids is not None:
        ids = ids.view(len(text), -1)
        same = share_an_id(ids[: len(audio)], ids) | positives
        if duplicates == "mask":
            logits = logits.masked_fill(same & ~positives, -torch.inf)
        else:
            positives = same
    rows = (logits, positives)
    columns = (logits[:, : len(audio)].T, positives[:, : len(audio)].T)
    summed = {"symmetric": (rows, columns), "a2t": (rows,), "t2a": (columns,)}[direction]
    return torch.stack([_cross_entropy(*each) for each in summed]).mean()


def _cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """-log of the softmax, averaged over each row's positives and then over rows, ()."""
    losses = -logits.log_softmax(1)
    return (losses.masked_fill(~positives, 0).sum(1) / positives.sum(1)).mean()
