"""Captions that occur again: one text for many clips, templates, the same ones in two splits.

Captions are compared without case, punctuation and white space.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from flap_fast.data.pair_ids import caption_words
from flap_fast.tools.doctor.minhash import near_texts
from flap_fast.tools.doctor.records import Check, Examined, Found, Severity, Split, is_many

# Fractions of a split's captions: one text; one beginning or end; those in another split too.
_ONE_TEXT, _TEMPLATE, _SHARED = 0.1, 0.6, 0.3
_WORDS, _FEW, _LEAST_CLIPS = 3, 20, 10
# Texts that share so many of their pieces of five characters are nearly equal.
_NEAR = 0.8
_SHOWN = 3


def _one_text(e: Examined) -> Iterator[Found]:
    for split, words in _words(e):
        clips = len(set(split.captions.clip_of_caption.tolist()))
        pairs = set(zip(words, split.captions.clip_of_caption.tolist(), strict=True))
        (text, count), *_ = Counter(text for text, _ in pairs).most_common(1) or [("", 0)]
        if count >= max(_LEAST_CLIPS, _ONE_TEXT * clips):
            got = f"{count / clips:.0%} of the clips have one caption"
            yield Found("warning", split.name, got, count, clips, (f'"{text}"',))


def _template(e: Examined) -> Iterator[Found]:
    for split, words in _words(e):
        rows = [text.split() for text in words]
        rows = [row for row in rows if len(row) > _WORDS]
        begins = Counter(f'"{" ".join(row[:_WORDS])} ..."' for row in rows).most_common(1)
        ends = Counter(f'"... {" ".join(row[-_WORDS:])}"' for row in rows).most_common(1)
        for how, most in (("begin", begins), ("end", ends)):
            text, count = most[0] if most else ("", 0)
            if len(words) >= _FEW and count >= _TEMPLATE * len(words):
                got = f"{count / len(words):.0%} {how} alike"
                yield Found("warning", split.name, got, count, len(words), (text,))


def _in_two_splits(e: Examined) -> Iterator[Found]:
    for (first, one), (second, other) in itertools.combinations(_words(e), 2):
        (split, few), (_, many) = sorted([(first, one), (second, other)], key=lambda s: len(s[1]))
        others = _counterparts(set(few), set(many))
        texts = [text for text in few if text in others]
        if not texts:
            continue
        equal = sum(others[text] == text for text in texts)
        got = f"of {len(few)} in {split.name}, {equal} are equal, {len(texts) - equal} nearly equal"
        level: Severity = "warning" if is_many(len(texts), len(few), _SHARED) else "note"
        shown = tuple(dict.fromkeys(f'"{text}" = "{others[text]}"' for text in texts))[:_SHOWN]
        yield Found(level, f"{first.name}, {second.name}", got, len(texts), len(few), shown)


def _counterparts(few: set[str], many: set[str]) -> dict[str, str]:
    """A text of `many` for each of `few` that is equal or nearly equal to it."""
    found = {text: text for text in few & many}
    texts = sorted(few | many)
    for pair in near_texts(texts, _NEAR).tolist():
        for one, other in itertools.permutations(texts[n] for n in pair):
            if one in few and other in many:
                found.setdefault(one, other)
    return found


def _words(e: Examined) -> Iterator[tuple[Split, list[str]]]:
    """The captions of each split as their words alone."""
    for split in e.splits:
        yield split, [caption_words(text) for text in split.captions.texts]


ONE_TEXT = Check(
    name="one caption for many clips",
    needs="captions",
    rule=f"be the caption of less than {_ONE_TEXT:.0%} of the clips",
    remedy="write captions of their own, or set loss.contrastive.duplicates=mask: clips of one "
    "caption are pushed apart",
    find=_one_text,
)
TEMPLATE = Check(
    name="templated captions",
    needs="captions",
    rule=f"begin or end alike, in {_WORDS} words, for less than {_TEMPLATE:.0%}",
    remedy="vary the template, or rewrite them: flap enrich; a model learns the label alone",
    find=_template,
)
SHARED = Check(
    name="captions in two splits",
    needs="splits",
    rule=f"occur in one split, but for less than {_SHARED:.0%}",
    remedy="divide clips so that equal captions are in one split: else retrieval counts what was "
    "learnt by heart",
    find=_in_two_splits,
)
