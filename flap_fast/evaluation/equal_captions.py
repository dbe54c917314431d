"""Captions that are equal to another clip's: how many there are, and as right answers.

Equal are captions of the same words, whatever their case, punctuation and white space, as in
training (`flap_fast.data.pair_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence

from flap_fast.data.pair_ids import caption_words

Pairs = list[tuple[int, int]]
"""A query and one of its right answers."""


def text_numbers(captions: Sequence[str]) -> list[int]:
    """A number for each of M captions; equal captions have the same."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(caption_words(caption), len(numbers)) for caption in captions]


def equal_to_others(clip_of_caption: Sequence[int], texts: Sequence[int]) -> int:
    """How many captions are equal to a caption of another clip.

    Args:
        texts: (M,), as `text_numbers` gives them.
    """
    clips = _clips_of_text(clip_of_caption, texts)
    return sum(len(clips[text]) > 1 for text in texts)


def right_pairs(clip_of_caption: Sequence[int], texts: Sequence[int]) -> tuple[Pairs, Pairs]:
    """All (caption, right clip) and all (clip, right caption), each sorted.

    Right for a caption are the clips that have it or an equal one; for a clip, the captions equal
    to one of its own. A text of c clips makes c * c pairs or more.
    """
    clips = _clips_of_text(clip_of_caption, texts)
    of_captions = [(n, clip) for n, text in enumerate(texts) for clip in sorted(clips[text])]
    return of_captions, sorted({(clip, n) for n, clip in of_captions})


def _clips_of_text(clip_of_caption: Sequence[int], texts: Sequence[int]) -> dict[int, set[int]]:
    clips: dict[int, set[int]] = {}
    for clip, text in zip(clip_of_caption, texts, strict=True):
        clips.setdefault(text, set()).add(clip)
    return clips
