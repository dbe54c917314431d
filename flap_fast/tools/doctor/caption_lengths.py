"""Captions of a word, captions that were cut, and captions that the tokenizer will cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from flap_fast.tools.doctor.caption_text import is_file_name, is_other_script, quoted
from flap_fast.tools.doctor.records import Check, Examined, Found, Split, over_share

# Fractions of a split's captions.
_WORD, _CUT, _LONG = 0.2, 0.01, 0.01
# Captions that end in the same column: at least so many characters, so many captions, and times as
# many as have each of the lengths before.
_LEAST_CHARACTERS, _LEAST_CAPTIONS, _TIMES, _BEFORE = 20, 3, 5, 8
_DOTS = ("...", "\u2026")
_ENDS = (".", "!", "?", '"', "'", ")", "]", "\u201d", "\u3002")


def _one_word(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        texts = split.captions.texts
        rows = np.array([n for n, text in enumerate(texts) if _is_word(text)], np.int64)
        yield from _captions(split, rows, "a single word", _WORD)


def _is_word(text: str) -> bool:
    """Whether a caption is one word, and neither a file's name nor of a script without spaces."""
    return len(text.split()) < 2 and not is_file_name(text) and not is_other_script(text)


def _cut(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        texts = split.captions.texts
        full = _at_the_longest(texts)
        dots = [n for n, text in enumerate(texts) if text.endswith(_DOTS)]
        got = f"{len(full)} end at {len(texts[full[0]])} characters" if full else "dots at the end"
        yield from _captions(split, np.array(sorted({*full, *dots}), np.int64), got, _CUT)


def _at_the_longest(texts: Sequence[str]) -> list[int]:
    """The captions that were cut at a number of characters, inside words.

    Many have exactly the length of the longest, do not end a sentence, and half of them end in what
    is a word of no other caption. Captions that were cut between words are not seen.
    """
    counts = Counter(map(len, texts))
    longest = max(counts, default=0)
    before = sum(counts[longest - n] for n in range(1, _BEFORE + 1)) / _BEFORE
    full = [n for n, t in enumerate(texts) if len(t) == longest and not t.endswith(_ENDS)]
    distinct = len({texts[n] for n in full})
    if longest < _LEAST_CHARACTERS or distinct < max(_LEAST_CAPTIONS, _TIMES * before):
        return []
    words = {word for text in texts if len(text) < longest for word in text.split()}
    fragments = sum(texts[n].split()[-1] not in words for n in full)
    return full if fragments >= len(full) / 2 else []


def _too_long(e: Examined) -> Iterator[Found]:
    most = e.config.text.max_tokens
    for split in e.splits:
        tokens = split.captions.tokens
        assert tokens is not None
        rows = np.flatnonzero(tokens > most)
        got = f"text.max_tokens is {most}, the longest has {tokens.max(initial=0)}"
        yield from _captions(split, rows, got, _LONG)


def _captions(split: Split, rows: np.ndarray, got: str, most: float) -> Iterator[Found]:
    total = len(split.captions.texts)
    yield from over_share(
        split, rows, got, most=most, total=total, names=lambda r: quoted(split, r)
    )


ONE_WORD = Check(
    name="captions of one word",
    needs="captions",
    rule="say more than a word",
    remedy="make sentences of labels: a template of your own, or flap enrich",
    find=_one_word,
)
CUT = Check(
    name="cut captions",
    needs="captions",
    rule="end where their sentence ends",
    remedy="fetch the whole texts: these were cut at a number of characters",
    find=_cut,
)
TOO_LONG = Check(
    name="captions over max_tokens",
    needs="tokens",
    rule="fit in text.max_tokens",
    remedy="raise text.max_tokens as far as the encoder's positions go, or shorten them: the rest "
    "is cut off",
    find=_too_long,
)
