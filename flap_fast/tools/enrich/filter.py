"""What a language model wrote -> a caption, or the reason for keeping the original.

The first two sentences are taken, but those that only announce something ("Here is one:"). The
original stays where they are

    empty      without a word
    refusal    about what a language model cannot do
    echo       the instruction again: four of its words in a row, or none but its and the events'
    stray      without any word of the original, its first four letters being the same
    long       more tokens than a text tower reads, or cut off within the first sentence
    unchanged  the original, in other letters at most
"""

from __future__ import annotations

import re
from collections.abc import Callable

REASONS = ("empty", "refusal", "echo", "stray", "long", "unchanged")
_SENTENCES, _RUN, _STEM = 2, 4, 4
# A full stop within a number or before a small letter ends no sentence; a new line does.
_BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[^a-z\s])|\s*\n\s*")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_REFUSES = re.compile(
    r"\b(as an? (ai|artificial|language)|(ai|large|virtual) (language )?(model|assistant)"
    r"|i('m| am) (sorry|unable|not able|just an?)|i (can ?not|can't|could not|do not have"
    r"|don't have|apologi[sz]e)|(sorry|unfortunately), (but )?i)\b",
    re.IGNORECASE,
)


def caption_or_reason(
    written: str,
    *,
    instruction: str,
    events: str,
    original: str,
    cut_off: bool,
    tokens: Callable[[str], int],
    most_tokens: int,
) -> tuple[str | None, str | None]:
    """A caption and None, or None and one of `REASONS`.

    Args:
        written: as the model gave it.
        instruction: the prompt without what was put into its slots.
        events: what was put into its slot for events.
        original: the caption that was to be enriched.
        cut_off: the model had more to say when it was stopped.
        tokens: how long a text is.
    """
    pieces, torn = _pieces(written), ""
    if cut_off and pieces and not pieces[-1].endswith((".", "!", "?")):
        torn = pieces.pop()
    whole = _telling(pieces)[:_SENTENCES]
    said = " ".join(whole) or torn
    words, asked = _words(said), _words(original)
    if not words:
        return None, "empty"
    if _REFUSES.search(said):
        return None, "refusal"
    if _echoes(words, _words(instruction), _words(events)):
        return None, "echo"
    if not _stems(words) & _stems(asked):
        return None, "stray"
    if not whole or tokens(said) > most_tokens:
        return None, "long"
    return (None, "unchanged") if words == asked else (said, None)


def is_enough(written: str) -> bool:
    """Whether what follows cannot change the caption: a sentence beyond it has begun."""
    return len(_telling(_pieces(written)[:-1])) >= _SENTENCES


def _pieces(written: str) -> list[str]:
    """Sentences and lines."""
    return [piece for s in _BREAK.split(written.translate(_PLAIN)) if (piece := _plain(s))]


def _telling(pieces: list[str]) -> list[str]:
    """Those that do more than announce something."""
    return [piece for piece in pieces if not piece.endswith(":")]


def _echoes(said: list[str], instruction: list[str], events: list[str]) -> bool:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return set(zip(*(words[n:] for n in range(_RUN)), strict=False))

    nothing_else = set(said) <= set(instruction) | set(events)
    return nothing_else or bool(runs(said) & runs(instruction))


def _stems(words: list[str]) -> set[str]:
    """The first letters of the words that say something: the longer ones, if there are any."""
    return {word[:_STEM] for word in words if len(word) >= _STEM} or set(words)


def _plain(sentence: str) -> str:
    """On one line, and without quotation marks around the whole of it."""
    sentence = " ".join(sentence.split())
    quoted = len(sentence) > 1 and sentence[0] == sentence[-1] == '"'
    return sentence[1:-1].strip() if quoted else sentence


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())
