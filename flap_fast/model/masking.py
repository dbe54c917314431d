"""Which patches training keeps: indices only, plain PyTorch, checked by counting.

    1-D   K of the N patches (or whole time columns of them)
    2-D   k_time of the time columns and, in each, k_freq of the frequency rows: K = k_time * k_freq

Every clip keeps as many, so batches stay rectangular. Indices ascend. Draws are keyed by the
visit: the same for any number of ranks.

Source: FLAP section 3; SPEC 4.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flap_fast.config import Mask
from flap_fast.data.draws import Stream, uniforms


class MaskPlan(NamedTuple):
    """For each clip, the patches kept and dropped, ascending; together all N of them.

    A tuple: ZeRO-3's hooks find the tensors in what a module is given, but not in a dataclass.
    """

    keep: Tensor
    """(B, K) int64."""
    drop: Tensor
    """(B, N - K) int64."""

    @property
    def restore(self) -> Tensor:
        """(B, N) int64: where each patch stands in `cat(kept, dropped)`."""
        order = torch.cat([self.keep, self.drop], 1)
        n = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, n)


def kept(count: int, ratio: float, rounding: str) -> int:
    """How many of `count` stay when `ratio` is dropped, at least one (SPEC D5)."""
    exact = count * (1 - ratio)
    whole = {
        "floor": math.floor(exact + 1e-6),
        "round": math.floor(exact + 0.5),
        "ceil": math.ceil(exact - 1e-6),
    }[rounding]
    return max(1, whole)


def kept_patches(mask: Mask, grid: tuple[int, int]) -> int:
    """K of a clip whose patches form `grid` (time, frequency)."""
    times, freqs = grid
    if mask.kind == "none":
        return times * freqs
    if mask.kind == "2d":
        return kept(times, mask.time_ratio, mask.rounding) * kept(
            freqs, mask.freq_ratio, mask.rounding
        )
    if mask.unit == "frame":
        return kept(times, mask.ratio, mask.rounding) * freqs
    return kept(times * freqs, mask.ratio, mask.rounding)


def mask_plan(mask: Mask, grid: tuple[int, int], seed: int, visits: Tensor) -> MaskPlan | None:
    """The plan of a batch, or None without masking.

    Args:
        grid: patches along time and along frequency.
        visits: (B,) int64, on the device that the plan is to be on.
    """
    times, freqs = grid
    if mask.kind == "none":
        return None
    if mask.kind == "2d":
        columns = _chosen(seed, Stream.MASK, visits, times, mask.time_ratio, mask.rounding)
        rows = _inner(mask, grid, seed, visits)
        stay = columns[:, :, None] & rows
    elif mask.unit == "frame":
        columns = _chosen(seed, Stream.MASK, visits, times, mask.ratio, mask.rounding)
        stay = columns[:, :, None].expand(-1, -1, freqs)
    else:
        stay = _chosen(seed, Stream.MASK, visits, times * freqs, mask.ratio, mask.rounding)
    return _plan(stay.flatten(1), kept_patches(mask, grid))


def _inner(mask: Mask, grid: tuple[int, int], seed: int, visits: Tensor) -> Tensor:
    """(B, time or 1, frequency) bool: the rows that stay in each column."""
    times, freqs = grid
    if mask.shared_inner:
        return _chosen(
            seed, Stream.MASK_INNER, visits, freqs, mask.freq_ratio, mask.rounding
        ).unsqueeze(1)
    noise = uniforms(seed, Stream.MASK_INNER, visits, times * freqs).reshape(-1, times, freqs)
    return _lowest(noise, kept(freqs, mask.freq_ratio, mask.rounding))


def _chosen(
    seed: int, stream: Stream, visits: Tensor, count: int, ratio: float, rounding: str
) -> Tensor:
    return _lowest(uniforms(seed, stream, visits, count), kept(count, ratio, rounding))


def _lowest(noise: Tensor, k: int) -> Tensor:
    """True at the k lowest of the last axis; ties go to the smaller index."""
    order = noise.argsort(dim=-1, stable=True)
    return torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def _plan(stay: Tensor, k: int) -> MaskPlan:
    """Ascending indices of what stays and what goes, without a synchronisation with the host."""
    order = (~stay).to(torch.uint8).argsort(dim=1, stable=True)
    return MaskPlan(order[:, :k].contiguous(), order[:, k:].contiguous())
