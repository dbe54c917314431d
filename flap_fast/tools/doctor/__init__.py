"""`flap doctor`: what is in data and in a run, and what is wrong with it.

paths -> sources -> scan -> Examined -> CHECKS -> findings: a table, JSON, a section of the page

A check is a record in a file of this folder, and its name here.
"""

from __future__ import annotations

from flap_fast.tools.doctor import (
    caption_lengths,
    caption_repeats,
    caption_text,
    clip_lengths,
    curves,
    language,
    levels,
    rates,
    recordings,
    towers,
    weights,
)
from flap_fast.tools.doctor.records import Check

CHECKS: tuple[Check, ...] = (
    levels.UNREADABLE,
    recordings.LEAKS,
    recordings.REPEATS,
    levels.SILENCE,
    levels.MOSTLY_SILENT,
    levels.CLIPPED,
    levels.OFFSET,
    levels.DEAD_CHANNEL,
    rates.LOWER_RATE,
    rates.UPSAMPLED,
    clip_lengths.TOO_SHORT,
    clip_lengths.ONE_LENGTH,
    caption_text.WITHOUT,
    caption_text.PLACEHOLDER,
    caption_text.BROKEN,
    caption_text.MARKUP,
    caption_text.BY_MODEL,
    caption_text.FILE_NAMES,
    caption_text.OTHER_SCRIPT,
    language.OTHER_LANGUAGE,
    caption_lengths.ONE_WORD,
    caption_lengths.CUT,
    caption_lengths.TOO_LONG,
    caption_repeats.ONE_TEXT,
    caption_repeats.TEMPLATE,
    caption_repeats.SHARED,
    curves.NOT_FINITE,
    curves.AT_CHANCE,
    curves.RISES,
    curves.RECALL,
    curves.CLAMPED,
    curves.NO_STEPS,
    curves.WAITING,
    curves.BAD_CLIPS,
    weights.NOT_FINITE,
    weights.UNMOVED,
    weights.FRONT_END,
    towers.NOT_FINITE,
    towers.COLLAPSED,
    towers.UNRELATED,
)
