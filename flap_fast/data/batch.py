"""The stages of a batch on its way to the model.

EncodedBatch  ->  DecodedBatch  ->  MediaInput  ->  Batch
files' bytes      decode, crop      front end       captions as tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class EncodedBatch(NamedTuple):
    """The bytes of B clips, and their crop positions."""

    clips: list[bytes]
    positions: np.ndarray
    """(B,) or (B, P) in [0, 1): the crop position, then those of fusion's pieces."""


class DecodedBatch(NamedTuple):
    """B decoded clips, the output of all decoders."""

    media: Tensor
    """(B, samples) waveforms or (B, frames, F) log-mels (float16 from a cache), zeros behind the
    shorter ones; images: (B, R, R, 3) uint8."""
    lengths: Tensor
    """(B,) int64 on the CPU: samples, frames or rows of each clip."""
    positions: Tensor
    """(B, P) float64 on the CPU: the positions that came with each clip, in [0, 1)."""


class MediaInput(NamedTuple):
    """The encoder's input of B clips, float32; normalised once the preprocessor is done."""

    media: Tensor
    """(B, 1, T, F), or (B, 4, T, F) with fusion; images: (B, 3, R, R)."""
    longer: Tensor | None
    """With fusion, (B,) bool on the CPU: clips longer than a channel shows."""


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch of a training step: B clips, each with one of its captions."""

    media: Tensor
    """(B, 1, T, F) float32, normalised, SpecAug yet to come; (B, 4, T, F) with fusion; images:
    (B, 3, R, R)."""
    ids: Tensor
    """(S B, L) int64 tokens: of the B captions, then of the other S - 1 of `Loss.sentences`; with
    text.freeze on the CPU, where what is known of them is looked up."""
    attention_mask: Tensor
    """(S B, L) int64, 1 on tokens and 0 on padding; on the CPU, since the host decides by it."""
    sample_index: Tensor
    """(B,) int64: `step * global_batch + row`, the key of masks' and SpecAug's random numbers."""
    clips: np.ndarray
    """(B,) int64: which clips of the shards these are."""
    epoch: int
    """Epochs completed before this step."""
    longer: Tensor | None = None
    """With fusion, (B,) bool on the CPU: clips whose pieces are fused with the whole of them."""


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used in training, and the clip that replaced it."""

    step: int
    clip: str
    reason: str
    replaced_by: str


def stack_clips(clips: list[np.ndarray], positions: np.ndarray) -> DecodedBatch:
    """Decoded clips of any lengths as one tensor, zeros behind the shorter ones.

    Args:
        positions: (B,) or (B, P), see `EncodedBatch`.
    """
    lengths = [len(clip) for clip in clips]
    if min(lengths) == max(lengths):
        media = np.stack(clips)
    else:
        media = np.zeros((len(clips), max(lengths)), np.float32)
        for row, clip in zip(media, clips, strict=True):
            row[: len(clip)] = clip
    crops = torch.from_numpy(np.asarray(positions, np.float64).reshape(len(clips), -1))
    return DecodedBatch(torch.from_numpy(media), torch.tensor(lengths), crops)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy on the device; to a GPU through pinned memory."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
