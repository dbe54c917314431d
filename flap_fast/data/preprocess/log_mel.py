"""The interface of log-mels, and the steps that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flap_fast.config import Audio

_FRAMES_AT_A_TIME = 65_536


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


@dataclass(frozen=True)
class FramedLogMel:
    """A `LogMel` whose rows are each computed of one frame by itself."""

    audio: Audio

    def __call__(self, wave: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, T, F) log-mel, padded with zero rows, not normalised."""
        logmel = self._log_mel(self._frames(self._levelled(self._rounded(wave))))
        return pad_frames(logmel, self.audio.frames)

    def packed(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (samples,) of any lengths -> (M, F), their frames end to end, not normalised."""
        frames = (self._frames(self._levelled(self._rounded(wave))) for wave in waves)
        return torch.cat([self._log_mel(torch.cat(some)) for some in _parts(frames)])

    def whole(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """(B, longest), zeros behind each clip's length -> (B, M, F), valid up to its frames."""
        return self._log_mel(self._frames(self._levelled(self._rounded(wave), lengths)))

    def _rounded(self, wave: Tensor) -> Tensor:
        return to_16_bits(wave) if self.audio.int16_roundtrip else wave

    def _frames(self, wave: Tensor) -> Tensor:
        """(..., samples) -> a view (..., M, window)."""
        return wave.unfold(-1, self.audio.window, self.audio.hop)

    def _levelled(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(samples,) or (B, samples), of `lengths` each, as they are cut into frames."""
        return wave

    def _log_mel(self, frames: Tensor) -> Tensor:
        """(..., M, window) -> (..., M, F)."""
        raise NotImplementedError


def _parts(clips: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Clips' frames, as many at a time as fill a GPU.

    On a CPU a clip at a time: it gets the same bits, whichever clips it comes with.
    """
    some: list[Tensor] = []
    count = 0
    for frames in clips:
        some.append(frames)
        count += frames.shape[0]
        if not frames.is_cuda or count >= _FRAMES_AT_A_TIME:
            yield some
            some, count = [], 0
    if some:
        yield some


def pad_frames(logmel: Tensor, frames: int) -> Tensor:
    """(..., t, F) -> (..., frames, F): zeros below, in the log-mel domain."""
    return torch.nn.functional.pad(logmel, (0, 0, 0, frames - logmel.shape[-2]))


def to_16_bits(wave: Tensor) -> Tensor:
    """The values of a 16-bit file, cut towards zero (LAION-CLAP's training data)."""
    return wave.clamp(-1, 1).mul(32767.0).trunc_().div_(32767.0)


def normalise(logmel: Tensor, audio: Audio) -> Tensor:
    """AudioSet's statistics: `(v - mean) / (2 std)`; a padded row becomes 0.467."""
    return (logmel - audio.mean) / (2 * audio.std)
