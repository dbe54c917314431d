"""The same recording twice: in two splits (a leak), or in one.

Recordings are the same also after encoding, resampling, another level, mono or stereo, a little
noise, silence around them, and cutting up to a second off the ends; not after a change of speed or
pitch, nor a piece of a longer one.
Measured false positives and negatives are in bench/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flap_fast.data.preprocess.sound_file import SILENT
from flap_fast.data.preprocess.unusable import Unusable
from flap_fast.tools.doctor.neighbours import Groups, near_pairs
from flap_fast.tools.doctor.records import Check, Examined, Found, Severity, Split, is_many
from flap_fast.tools.doctor.scan import in_order, waveform
from flap_fast.tools.doctor.sketch import same_recording

# Rms difference of sketches, in dB, and how many neighbours of a clip are compared with it.
RADIUS, NEAREST = 2.0, 8
# The correlation of one recording with itself, encoded twice.
SAME = 0.9
# Of the smaller split; of a split's clips.
_LEAKED, _REPEATED = 0.02, 0.05
_SHOWN = 3

Clip = tuple[int, int]
"""A split's number, and the row of a clip in it."""


def same_recordings(splits: Sequence[Split], threads: int) -> list[list[Clip]]:
    """Groups of clips that are one recording, over all splits that hold sounds."""
    clips: list[Clip] = []
    sketches = []
    for number, split in enumerate(splits):
        if split.sounds is None:
            continue
        rows = np.flatnonzero(split.sounds.read & (split.sounds.peak >= SILENT))
        clips += [(number, row) for row in rows.tolist()]
        sketches.append(split.sounds.sketch[rows])
    if not clips:
        return []
    pairs = near_pairs(np.concatenate(sketches), RADIUS, NEAREST)
    groups = Groups(len(clips))

    def compared(pair: tuple[int, int]) -> tuple[int, int, bool]:
        one, other = pair
        if groups.find(one) == groups.find(other):  # of what others already showed
            return one, other, False
        try:
            waves = [_waveform(splits, clips[n]) for n in pair]
        except Unusable:  # named by the check of unreadable sounds
            return one, other, False
        return one, other, same_recording(*waves) >= SAME

    for one, other, same in in_order(map(tuple, pairs.tolist()), compared, threads):
        if same:
            groups.join(one, other)
    return [[clips[n] for n in group] for group in groups.members(range(len(clips)))]


def _waveform(splits: Sequence[Split], clip: Clip) -> np.ndarray:
    number, row = clip
    return waveform(splits[number].clips, int(splits[number].picked[row]))


def _leaks(e: Examined) -> Iterator[Found]:
    for one in range(len(e.splits)):
        for other in range(one + 1, len(e.splits)):
            groups = [g for g in e.recordings if {one, other} <= {number for number, _ in g}]
            if not groups:
                continue
            first, second = e.splits[one], e.splits[other]
            smaller = one if len(first.picked) < len(second.picked) else other
            count = sum(number == smaller for group in groups for number, _ in group)
            total = len(e.splits[smaller].picked)
            level: Severity = "error" if is_many(count, total, _LEAKED) else "warning"
            got = f"{count} of the {total} clips of {e.splits[smaller].name} are in both"
            shown = tuple(_pair(e, group, one, other) for group in groups[:_SHOWN])
            yield Found(level, f"{first.name}, {second.name}", got, count, total, shown)


def _pair(e: Examined, group: Sequence[Clip], one: int, other: int) -> str:
    rows = [next(row for number, row in group if number == n) for n in (one, other)]
    names = (e.splits[n].names([row])[0] for n, row in zip((one, other), rows, strict=True))
    return " = ".join(names)


def _repeats(e: Examined) -> Iterator[Found]:
    for number, split in enumerate(e.splits):
        own = [[row for n, row in group if n == number] for group in e.recordings]
        own = [rows for rows in own if len(rows) > 1]
        count, total = sum(len(rows) - 1 for rows in own), len(split.picked)
        if count:
            level: Severity = "warning" if is_many(count, total, _REPEATED) else "note"
            shown = tuple(" = ".join(split.names(rows[:2])) for rows in own[:_SHOWN])
            yield Found(level, split.name, "copies of another clip", count, total, shown)


LEAKS = Check(
    name="sounds in two splits",
    needs="splits",
    rule="be in one split only, re-encoded, resampled or cut ones too",
    remedy="take them out of the split for training: scores count what was learnt by heart",
    find=_leaks,
)
REPEATS = Check(
    name="sounds twice in a split",
    needs="sounds",
    rule="be there once",
    remedy="give one clip all of their captions, or set loss.contrastive.duplicates=mask: they are "
    "pushed apart",
    find=_repeats,
)
