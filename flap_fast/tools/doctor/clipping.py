"""Samples of a sound whose peaks were cut off, at full scale or below it.

At full scale, runs of three samples are cut ones. A sound that was made quieter afterwards has its
flat tops at a lower level. There they are runs of three equal samples or more that the wave enters
and leaves steeply: the top of a slow wave is as flat where samples have few bits, but those beside
it are only a step or two lower. Square waves of synthesizers are flat at other levels too, or have
hardly any samples between their tops: they are no cut ones.
"""

from __future__ import annotations

import numpy as np

# Samples at full scale, and how many of them in a row are no peak but a cut one.
FULL_SCALE, _CUT = 0.99, 3
# Below full scale: fewer samples at a top are not looked at, nor quieter sounds.
_FEW, _QUIET = 0.0025, 0.02
# Equal but for rounding; a steep neighbour is lower by as many steps of the samples (16 bits).
_EQUAL, _STEPS, _STEP = 1e-6, 4, 2.0**-15
# Of flat runs in the upper half, those at the top; samples between for each one at the top.
_AT_THE_TOP, _BETWEEN = 0.9, 0.5


def at_full_scale(full: np.ndarray) -> int:
    """How many of the true ones of (n,) stand in runs of at least `_CUT`."""
    starts, ends = _runs(full)
    lengths = ends - starts
    return int(lengths[lengths >= _CUT].sum())


class FlatTops:
    """Counts the samples that were cut at a sound's highest and lowest value, block by block."""

    def __init__(self, channels: int):
        self._tops, self._counts = np.zeros((2, channels)), np.zeros((2, channels))

    def add(self, block: np.ndarray, tops: np.ndarray) -> None:
        """Add the next block (channels, n), whose highest values and lowest ones, negated, are
        `tops` (2, channels).
        """
        for (side, channel), top in np.ndenumerate(tops):
            before = self._tops[side, channel]
            if top < max(_QUIET, before * (1 - _EQUAL)):
                continue
            if top > before * (1 + _EQUAL):  # what came before was not cut there
                self._tops[side, channel], self._counts[side, channel] = top, 0
            self._counts[side, channel] += _flat(block[channel], float(top), 1 - 2 * side)

    @property
    def count(self) -> int:
        """Samples of the channel that has the most."""
        return int(self._counts.sum(0).max(initial=0))


def _flat(wave: np.ndarray, top: float, sign: int) -> int:
    """How many samples of (n,) were cut at a value, of `sign`."""
    top *= 1 - _EQUAL
    cut = wave >= top if sign > 0 else wave <= -top
    if np.count_nonzero(cut) < _FEW * len(wave):
        return 0
    wave = sign * wave
    starts, ends = _runs(cut)
    long = ends - starts >= _CUT
    starts, ends = starts[long], ends[long]
    steep = _STEPS * max(top - wave[~cut].max(initial=0), _STEP)
    edged = np.concatenate([[0], wave, [0]])  # sample n is at n + 1
    steeply = top - np.maximum(edged[starts], edged[ends + 1]) > steep
    count = int((ends - starts)[steeply].sum())
    between = np.count_nonzero((wave > 0.1 * top) & ~cut)
    if count < _FEW * len(wave) or between < _BETWEEN * count:
        return 0
    equal = (np.abs(np.diff(wave)) <= _EQUAL * top) & (wave[1:] > top / 2)
    firsts, lasts = _runs(equal)
    flat = int((lasts - firsts)[lasts - firsts >= _CUT - 1].sum())
    return count if (ends - starts - 1).sum() >= _AT_THE_TOP * flat else 0


def _runs(those: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first samples of runs of true ones, and those behind them."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], those.view(np.int8), [0]])))
    return changes[::2], changes[1::2]
