"""Turn a language model's answer into a caption, or give the reason for keeping the original.

The caption is the answer's first two sentences, without those that only announce something ("Here
is one:"). The original is kept if they are

    empty      no words
    refusal    about the limits of a language model
    echo       the instruction: four of its words in a row, or only words of it and of the events
    stray      unrelated: no word shares its first four letters with one of the original
    long       more tokens than a text encoder reads, or cut off within the first sentence
    unchanged  the original, up to case and punctuation
"""

from __future__ import annotations

import re
from collections.abc import Callable

REASONS = ("empty", "refusal", "echo", "stray", "long", "unchanged")
_SENTENCES, _RUN, _STEM = 2, 4, 4
# A full stop inside a number or before a lower-case letter ends no sentence; a newline does.
_BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[^a-z\s])|\s*\n\s*")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_REFUSAL = re.compile(
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
    """Return a caption and None, or None and one of `REASONS`.

    Args:
        written: the model's answer.
        instruction: the prompt without the contents of its slots.
        events: the contents of the slot for events.
        original: the caption to enrich.
        cut_off: generation was stopped before the answer ended.
        tokens: counts the tokens of a text.
        most_tokens: of a caption.
    """
    sentences, unfinished = _sentences(written), ""
    if cut_off and sentences and not sentences[-1].endswith((".", "!", "?")):
        unfinished = sentences.pop()
    whole = _without_announcements(sentences)[:_SENTENCES]
    caption = " ".join(whole) or unfinished
    words, original_words = _words(caption), _words(original)
    if not words:
        return None, "empty"
    if _REFUSAL.search(caption):
        return None, "refusal"
    if _echoes(words, _words(instruction), _words(events)):
        return None, "echo"
    if not _stems(words) & _stems(original_words):
        return None, "stray"
    if not whole or tokens(caption) > most_tokens:
        return None, "long"
    return (None, "unchanged") if words == original_words else (caption, None)


def is_complete(written: str) -> bool:
    """Whether more text cannot change the caption: a sentence after it has begun."""
    return len(_without_announcements(_sentences(written)[:-1])) >= _SENTENCES


def _sentences(written: str) -> list[str]:
    """Split into sentences and lines."""
    parts = _BREAK.split(written.translate(_PLAIN))
    return [sentence for part in parts if (sentence := _plain(part))]


def _without_announcements(sentences: list[str]) -> list[str]:
    return [sentence for sentence in sentences if not sentence.endswith(":")]


def _echoes(words: list[str], instruction: list[str], events: list[str]) -> bool:
    def runs(text: list[str]) -> set[tuple[str, ...]]:
        return set(zip(*(text[n:] for n in range(_RUN)), strict=False))

    nothing_else = set(words) <= set(instruction) | set(events)
    return nothing_else or bool(runs(words) & runs(instruction))


def _stems(words: list[str]) -> set[str]:
    """Return the first letters of the longer words, or all words if none is longer."""
    return {word[:_STEM] for word in words if len(word) >= _STEM} or set(words)


def _plain(sentence: str) -> str:
    """Put a sentence on one line, without quotation marks around all of it."""
    sentence = " ".join(sentence.split())
    quoted = len(sentence) > 1 and sentence[0] == sentence[-1] == '"'
    return sentence[1:-1].strip() if quoted else sentence


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())
