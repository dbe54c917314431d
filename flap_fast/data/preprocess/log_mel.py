"""The interface of log-mels, and the steps that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flap_fast.config import Audio


class LogMel(Protocol):
    """A front end's log-mel, on any device."""

    @property
    def silence(self) -> float:
        """The log-mel of silence: its lowest value."""
        ...

    def __call__(self, wave: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, T, F), padded with zero rows, not normalised."""
        ...

    def packed(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (samples,) of any lengths -> (M, F), their frames end to end, not normalised."""
        ...

    def whole(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """(B, longest), zeros behind each clip's length -> (B, M, F), valid up to its frames."""
        ...


def pad_frames(logmel: Tensor, frames: int) -> Tensor:
    """(..., t, F) -> (..., frames, F): zeros below, in the log-mel domain."""
    return torch.nn.functional.pad(logmel, (0, 0, 0, frames - logmel.shape[-2]))


def to_16_bits(wave: Tensor) -> Tensor:
    """The values of a 16-bit file, cut towards zero (LAION-CLAP's training data)."""
    return wave.clamp(-1, 1).mul(32767.0).trunc_().div_(32767.0)


def normalise(logmel: Tensor, audio: Audio) -> Tensor:
    """AudioSet's statistics: `(v - mean) / (2 std)`; a padded row becomes 0.467."""
    return (logmel - audio.mean) / (2 * audio.std)
