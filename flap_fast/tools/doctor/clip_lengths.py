"""Sounds that are too short, or all equally long."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flap_fast.tools.doctor.records import Check, Examined, Found, over_share

# Seconds; fractions of a split; clips from which on equal lengths say anything.
_SHORTEST_S, _SHORT = 0.1, 0.2
_EQUAL, _FEW = 0.9, 20


def _short(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        if split.sounds is None:
            continue
        read = split.sounds.read
        rows = np.flatnonzero((split.sounds.seconds < _SHORTEST_S) & read)
        got = f"{split.sounds.seconds[rows].min(initial=1):.3f} s is the shortest"
        yield from over_share(split, rows, got, most=_SHORT, total=int(read.sum()))


def _equal(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        if split.sounds is None or split.sounds.read.sum() < _FEW:
            continue
        seconds = split.sounds.seconds[split.sounds.read]
        values, counts = np.unique(seconds.round(3), return_counts=True)
        count = int(counts.max())
        if count >= _EQUAL * len(seconds):
            got = f"{values[counts.argmax()]:g} s"
            yield Found("note", split.name, got, count, len(seconds))


TOO_SHORT = Check(
    name="too short sounds",
    needs="sounds",
    rule=f"last {_SHORTEST_S} s or longer",
    remedy="leave them out: they fill less than one patch, the rest is repeats or padding",
    find=_short,
)
ONE_LENGTH = Check(
    name="one length",
    needs="sounds",
    rule="have lengths of their own, unless the data set is published in pieces of one",
    remedy="see whether a crawler or a script cut them: a caption may tell of what was cut off",
    find=_equal,
)
