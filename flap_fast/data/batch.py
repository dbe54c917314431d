"""What the model is fed with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of a training step, or a micro-batch of it: B clips.

    Each with the caption drawn for this visit.
    """

    media: Tensor
    """(B, 1, T, F) float32, normalised, SpecAug yet to come; (B, 4, T, F) with fusion; pictures:
    (B, 3, R, R)."""
    ids: Tensor
    """(S B, L) int64 tokens: of the B captions, then of the other S - 1 of `Loss.sentences`."""
    attention_mask: Tensor
    """(S B, L) int64, 1 on tokens and 0 on padding; on the CPU, for the host decides by it."""
    sample_index: Tensor
    """(B,) int64: `step * global_batch + row`, keys the draws of masks and SpecAug."""
    clips: np.ndarray
    """(B,) int64: which clips of the shards these are."""
    epoch: int
    """How often the data was gone through before."""
    longer: Tensor | None = None
    """With fusion, (B,) bool on the CPU: clips whose pieces are fused with the whole of them."""


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used in training, and what took its place."""

    step: int
    clip: str
    reason: str
    replaced_by: str
