"""The number of patches that training keeps, and the mask of a batch by `draw_patch_mask`.

    1-D   K of the N patches (or whole time columns of them)
    2-D   k_time of the time columns and, in each, k_freq of the frequency rows: K = k_time * k_freq

Clips of one length keep equally many, so batches are rectangular; packed clips keep their own K, by
the same ratios of their own N. Indices ascend. Random numbers are keyed by the sample index: the
same for any number of ranks.

Source: FLAP, arXiv 2311.01615, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flap_fast.checks import require
from flap_fast.config import Config, Mask
from flap_fast.data.dealing import ClipTokens
from flap_fast.data.random_streams import Stream
from flap_fast.encoders.base import PackedMask
from flap_kernels import PatchMask, draw_patch_mask, draw_ragged_patch_mask

_STREAMS = (Stream.MASK, Stream.MASK_INNER)


def kept(count: int, ratio: float, rounding: str) -> int:
    """How many of `count` are kept when `ratio` is dropped, at least one."""
    exact = count * (1 - ratio)
    whole = {
        "floor": math.floor(exact + 1e-6),
        "round": math.floor(exact + 0.5),
        "ceil": math.ceil(exact - 1e-6),
    }[rounding]
    return max(1, whole)


class _Counts(NamedTuple):
    """What is drawn of a clip: `columns` of a grid's columns and, in each, `rows` of its rows."""

    grid: tuple[int, int]
    columns: int
    rows: int | None
    """None keeps all."""

    @property
    def patches(self) -> int:
        return self.columns * (self.grid[1] if self.rows is None else self.rows)


def _counts(mask: Mask, grid: tuple[int, int]) -> _Counts:
    times, freqs = grid
    if mask.kind == "none":
        return _Counts(grid, times, None)
    if mask.kind == "2d":
        rows = kept(freqs, mask.freq_ratio, mask.rounding)
        return _Counts(grid, kept(times, mask.time_ratio, mask.rounding), rows)
    if mask.unit == "frame":
        return _Counts(grid, kept(times, mask.ratio, mask.rounding), None)
    # A grid of columns of one patch each.
    patches = times * freqs
    return _Counts((patches, 1), kept(patches, mask.ratio, mask.rounding), None)


def kept_patches(mask: Mask, grid: tuple[int, int]) -> int:
    """K of a clip whose patches form `grid` (time, frequency)."""
    return _counts(mask, grid).patches


def tokens_of_seconds(config: Config, seconds: np.ndarray) -> ClipTokens:
    """Tokens of the audio encoder for clips of their own lengths (audio.length = variable).

    Args:
        seconds: (N,) float64, before cropping and filling.
    """
    audio = config.audio
    samples = np.rint(seconds * audio.sample_rate_hz).astype(np.int64)
    frames = audio.frames_of(samples.clip(audio.least_samples, audio.samples))
    lengths, of_length = np.unique(audio.padded_frames(frames), return_inverse=True)
    most, rows = audio.grid
    columns = (np.array(audio.patches_of(lengths.tolist()), np.int64) // rows)[of_length]
    masked, whole = np.zeros((2, most + 1), np.int64)
    for n in range(1, most + 1):
        masked[n] = kept_patches(config.mask, (n, rows)) + audio.prefix_tokens
        whole[n] = n * rows + audio.prefix_tokens
    return ClipTokens(masked[columns], whole[columns])


def least_micro_tokens(config: Config) -> int:
    """Tokens of a clip of audio.max_duration_s, which train.micro_tokens must hold."""
    masked, whole = tokens_of_seconds(config, np.array([config.audio.max_duration_s]))
    return int((whole if config.mask.unmasked_tail_epochs else masked)[0])


def check_micro_tokens(config: Config) -> None:
    """Raise `ConfigError` for a train.micro_tokens that cannot hold the longest clip."""
    budget = config.train.micro_tokens
    if budget is None:
        return
    longest, most = config.audio.max_duration_s, least_micro_tokens(config)
    rule = f"hold a clip of audio.max_duration_s = {longest:g}, {most} tokens"
    remedy = "raise it, or lower audio.max_duration_s"
    require(budget >= most, "train.micro_tokens", rule, budget, remedy)


def patch_mask(
    mask: Mask, grid: tuple[int, int], seed: int, sample_index: Tensor
) -> PatchMask | None:
    """The mask of a batch, or None without masking.

    Args:
        grid: patches along time and along frequency.
        sample_index: (B,) int64, on the device that the mask is to be on.
    """
    if mask.kind == "none":
        return None
    grid, columns, rows = _counts(mask, grid)
    return draw_patch_mask(sample_index, seed, _STREAMS, grid, columns, rows, mask.shared_inner)


def packed_patch_mask(
    mask: Mask, times: Sequence[int], freqs: int, seed: int, sample_index: Tensor
) -> PackedMask | None:
    """The mask of packed clips, or None without masking.

    Args:
        times: patches along time of each clip.
        freqs: patches along frequency.
        sample_index: (B,) int64 of the clips in their packed order, on the mask's device.
    """
    if mask.kind == "none":
        return None
    each = [_counts(mask, (count, freqs)) for count in times]
    drawn = draw_ragged_patch_mask(
        sample_index,
        seed,
        _STREAMS,
        [counts.grid[0] for counts in each],
        each[0].grid[1],
        [counts.columns for counts in each],
        each[0].rows,
        mask.shared_inner,
    )
    return PackedMask(drawn, tuple(counts.patches for counts in each), _density(mask, freqs))


def _density(mask: Mask, freqs: int) -> float:
    """Patches kept per patch, but for what rounding a clip's columns or patches adds."""
    if mask.kind == "2d":
        rows = kept(freqs, mask.freq_ratio, mask.rounding)
        return rows / freqs * (1 - mask.time_ratio)
    return 1 - mask.ratio
