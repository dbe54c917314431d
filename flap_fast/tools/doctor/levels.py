"""Sounds that cannot be read, or are silent, clipped, with an offset or a dead channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flap_fast.data.preprocess.sound_file import SILENT
from flap_fast.tools.doctor.records import (
    Check,
    Examined,
    Found,
    Severity,
    Split,
    is_many,
    over_share,
)
from flap_fast.tools.doctor.scan import Sounds

# Ordinary data have some of each; these fractions of a split are more (bench/LOG.md).
_UNREADABLE, _SILENT, _MOSTLY_SILENT = 0.01, 0.01, 0.1
_CLIPPED, _OFFSET, _DEAD = 0.1, 0.1, 0.1
# Of a sound: samples cut at full scale, the mean, pieces that are silent.
_CUT_SAMPLES, _MEAN, _SILENT_PIECES = 0.005, 0.005, 0.8


def _unreadable(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        if split.sounds is None:
            continue
        faults = split.sounds.faults
        first = next(iter(faults.values()), "")
        rows, total = np.array(sorted(faults), np.int64), len(split.picked)
        level: Severity = "error" if is_many(len(rows), total, _UNREADABLE) else "warning"
        got = f"of the first: {first}"
        yield from over_share(split, rows, got, most=0, total=total, severity=level)


def _of_sounds(
    faulty: Callable[[Sounds], np.ndarray], got: str, most: float
) -> Callable[[Examined], Iterator[Found]]:
    """A check of each sound by itself: a warning from a share of `most` on."""

    def find(e: Examined) -> Iterator[Found]:
        for split in _splits(e):
            sounds = split.sounds
            assert sounds is not None
            rows = np.flatnonzero(faulty(sounds) & sounds.read)
            yield from over_share(split, rows, got, most=most, total=int(sounds.read.sum()))

    return find


def _splits(e: Examined) -> list[Split]:
    return [split for split in e.splits if split.sounds is not None]


UNREADABLE = Check(
    name="unreadable sounds",
    needs="sounds",
    rule="be read to their end, as long as their headers say",
    remedy="fetch them again, or leave them out: flap prepare lists them in rejected.jsonl",
    find=_unreadable,
)
SILENCE = Check(
    name="silent sounds",
    needs="sounds",
    rule="have a peak above -80 dB of full scale",
    remedy="leave them out: a caption of silence teaches nothing",
    find=_of_sounds(lambda s: s.peak < SILENT, "nothing to hear", _SILENT),
)
MOSTLY_SILENT = Check(
    name="mostly silent sounds",
    needs="sounds",
    rule="be silent for less than four fifths of their length",
    remedy="cut the silence off: crops of training fall into it",
    find=_of_sounds(
        lambda s: (s.silent > _SILENT_PIECES) & (s.peak >= SILENT), "little to hear", _MOSTLY_SILENT
    ),
)
CLIPPED = Check(
    name="clipped sounds",
    needs="sounds",
    rule="have less than 0.5 % of their samples cut off at full scale, or at a level below it",
    remedy="make them again at a lower level; what is cut off cannot be mended",
    find=_of_sounds(lambda s: s.clipped > _CUT_SAMPLES, "peaks cut off", _CLIPPED),
)
OFFSET = Check(
    name="DC offset",
    needs="sounds",
    rule="have a mean near 0",
    remedy="subtract the mean of each: a faulty recorder or unsigned samples read as signed ones",
    find=_of_sounds(lambda s: np.abs(s.offset) > _MEAN, "the mean is not 0", _OFFSET),
)
DEAD_CHANNEL = Check(
    name="dead channels",
    needs="sounds",
    rule="have sound in every channel",
    remedy="keep the one that has: their average is 6 dB quieter",
    find=_of_sounds(lambda s: s.dead, "a channel is silent, another is not", _DEAD),
)
