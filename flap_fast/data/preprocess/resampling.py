"""Resampling of blocks, by soxr: the bits of resampling the whole at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import soxr

# The largest terms of a ratio of rates for which soxr's filter has a phase for each step. For
# others it interpolates between phases: a sample's last bits depend on where resampling began.
_TERMS = 1280

# Half the length of the filter and more, in samples of the lower rate.
_MARGIN = 512


def resampled(blocks: Iterable[np.ndarray], rate_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """Yield (n,) float32 blocks at another rate, `resampled_length` samples in all."""
    if rate_hz == to_hz:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate_hz, to_hz, 1, "float32", "HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def resampled_length(frames: int, rate_hz: int, to_hz: int) -> int:
    """Return the number of samples after resampling: `frames * to_hz / rate_hz`, rounded."""
    return (2 * frames * to_hz + rate_hz) // (2 * rate_hz)


def entry(sample: int, rate_hz: int, to_hz: int) -> tuple[int, int]:
    """Return the last frame from which resampling gives `sample` and those behind it, and its own.

    Resampling that begins at this frame gives, but for rounding, the samples of resampling from
    the begin: the filter's phase is the same, and what it reaches back to is there.
    """
    if rate_hz == to_hz:
        return sample, sample
    divisor = math.gcd(rate_hz, to_hz)
    frames, samples = rate_hz // divisor, to_hz // divisor
    if max(frames, samples) > _TERMS:
        return 0, 0
    margin = math.ceil(_MARGIN * max(1, to_hz / rate_hz))
    periods = max(0, sample - margin) // samples
    return periods * frames, periods * samples
