"""Counts of a model on any batch, from those on a few small ones.

A tower's FLOP are proportional to its clips, and a text tower's a polynomial of second degree in a
caption's tokens; of clips of different lengths a pack of all of them is counted. Bytes are a line
through those of two samples: numbers of clips, or packs of few and of many clips that both stand
for the mix, by their tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flap_fast.config import Config
from flap_fast.model.masking import tokens_of_seconds
from flap_fast.tools.profile.lengths import LengthMix, frames_of
from flap_fast.tools.profile.parts import tower
from flap_fast.tools.profile.trace import Array, Flop, interpolated, scaled, summed

CLIPS = 2, 4
# Clips of different lengths that stand for their mix, once and twice: as many operators.
_MIXED = 16
_LONGEST = 24


class Sample(NamedTuple):
    """A small batch whose bytes are counted."""

    clips: int
    frames: tuple[int, ...] | None
    """Of clips of different lengths, ascending."""
    size: float
    """Its clips; of different lengths, its tokens in clips of the mix's mean tokens."""


def samples(config: Config, mix: LengthMix | None, *, masked: bool) -> tuple[Sample, Sample]:
    """Two samples for the line.

    Args:
        masked: the model's clips are; without masking those of different lengths have other tokens.
    """
    if mix is None:
        return Sample(CLIPS[0], None, CLIPS[0]), Sample(CLIPS[1], None, CLIPS[1])

    def tokens(seconds: Array) -> Array:
        found = tokens_of_seconds(config, seconds)
        return found.masked if masked else found.whole

    seconds = mix.spread(_MIXED)
    one, every = tokens(seconds), tokens(mix.seconds)
    sizes = (n * one.sum() / every.mean() for n in (1, 2))
    packs = (frames_of(config, seconds.repeat(n)) for n in (1, 2))
    few, many = (Sample(len(f), f, n) for f, n in zip(packs, sizes, strict=True))
    return few, many


def tower_flop(
    traced: Callable[[int, int, tuple[int, ...] | None], dict[str, Flop]],
    lengths: Sequence[int],
    sentences: int,
    frames: Sequence[int],
    max_tokens: int,
) -> dict[str, Flop]:
    """FLOP of a model on a batch, by part.

    Args:
        traced: FLOP on a batch of so many clips, tokens of each sentence, and frames of packed
            clips; None for any.
        lengths: tokens of all sentences.
        sentences: of a clip.
        frames: of clips of different lengths, ascending.
        max_tokens: of a sentence.
    """
    clips, points = len(lengths) // sentences, _points(lengths, max_tokens)
    found_at = {n: traced(CLIPS[0], n, None) for n in points}
    found = {part: scaled(f, clips, CLIPS[0]) for part, f in found_at[points[0]].items()}
    text, rows = tower("text"), CLIPS[0] * sentences
    # A frozen encoder without a head has none.
    by_length = {n: flop.get(text, Flop()) for n, flop in found_at.items()}
    if frames:
        packed = traced(len(frames), points[0], tuple(frames))
        found |= {part: f for part, f in packed.items() if part != text}
    of_text = summed(
        scaled(interpolated(by_length, n), many, rows) for n, many in Counter(lengths).items()
    )
    media, *others = (part for part in found if part != text)
    return {media: found[media], text: of_text} | {part: found[part] for part in others}


def _points(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Caption lengths to count with: one if all are equal, else three."""
    if len(set(lengths)) == 1:
        return [lengths[0]]
    longest = min(_LONGEST, max_tokens)
    return sorted({max(1, longest * n // 3) for n in (1, 2, 3)})


def peak_of(few: Array, many: Array, factor: float) -> int:
    """The most of `few` plus `factor` times the difference to `many`, operator by operator."""
    if len(few) != len(many):  # operators that depend on the clips
        few, many = few.max(keepdims=True), many.max(keepdims=True)
    return int(np.max(few + factor * (many - few)))
