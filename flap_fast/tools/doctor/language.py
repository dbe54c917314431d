"""Captions in another language of the Latin script, told by function words and accented letters.

A caption is taken for another language's if it has two of that language's words, or words with
letters that English lacks, and more of them than English ones. Where hardly any are English, that
is what the data are in: a note. What it cannot see: captions without either ("dog, loud") and very
short ones.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from flap_fast.tools.doctor.caption_text import is_other_script, quoted
from flap_fast.tools.doctor.records import FEWEST, Check, Examined, Found, over_share

_OTHER = 0.05
_LEAST = 2
# English captions for each in another language, where the data are meant to be in that one.
_ENGLISH_SHARE = 0.1

# Frequent words of each language that are no words of English.
_ENGLISH = frozenset(
    [
        "the",
        "a",
        "an",
        "and",
        "of",
        "in",
        "is",
        "are",
        "with",
        "to",
        "on",
        "at",
        "by",
        "while",
        "then",
        "as",
        "from",
        "for",
        "it",
        "its",
        "into",
        "over",
        "through",
        "some",
        "someone",
        "something",
        "being",
        "was",
        "were",
        "this",
        "that",
        "there",
        "be",
        "has",
        "have",
        "followed",
        "several",
    ]
)
_WORDS = {
    "German": "der die das und ein eine einer einem einen ist mit im in auf von zu den dem nicht "
    "während wird sich aus bei für über",
    "French": "le la les et un une des du dans avec est sur pour que qui au aux sont pendant par",
    "Spanish": "el la los las un una de en con que es por para del al mientras se su está",
    "Italian": "il lo la gli un una di che con per del della nel nella è sono mentre si al",
    "Portuguese": "os um uma de do da em com que no na por para são está enquanto se ao",
    "Dutch": "de het een en van in is met op te dat zijn niet voor aan door terwijl wordt er",
    "Polish": "na się jest nie do przez że po jak oraz podczas",
    "Swedish": "en ett och är som på med av för till den det medan",
    "Czech": "na se je ve do že při po když který pak jako",
    "Romanian": "și în pe cu la de care este sunt din un o ce unei unui",
    "Indonesian": "dan di yang dengan dari itu sebuah seekor ada saat pada ke sedang orang suara",
    "Turkish": "bir ve bu ile için çok olan gibi daha sonra ses",
}
_TABLES = {name: frozenset(words.split()) - _ENGLISH for name, words in _WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")


def other_language(text: str) -> str | None:
    """The language of a caption, if it is one of those known here and not English."""
    if is_other_script(text):
        return None
    words = set(_WORD.findall(unicodedata.normalize("NFC", text).lower()))
    own = {name: table & words for name, table in _TABLES.items()}
    name = max(own, key=lambda name: len(own[name]))
    count = len(own[name] | {word for word in words if not word.isascii()})
    name = name if len(own[name]) >= _LEAST else "one with accents"
    english = len(_ENGLISH.intersection(words))
    return name if count >= _LEAST and count > english else None


def is_english(text: str) -> bool:
    """Whether a caption has a function word of English."""
    return not _ENGLISH.isdisjoint(_WORD.findall(text.lower()))


def throughout(found: Found, english: int) -> Found:
    """The finding, a note where its captions are those of the data on purpose."""
    intended = found.count >= FEWEST and english < _ENGLISH_SHARE * found.count
    return replace(found, severity="note") if intended else found


def _find(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        languages = [other_language(text) for text in split.captions.texts]
        rows = np.array([n for n, language in enumerate(languages) if language], np.int64)
        named = ", ".join(sorted({str(languages[n]) for n in rows.tolist()}))
        foreign = set(rows.tolist())
        texts = enumerate(split.captions.texts)
        english = sum(is_english(text) for n, text in texts if n not in foreign)
        for found in over_share(
            split,
            rows,
            f"{named}, by function words and accents",
            most=_OTHER,
            total=len(languages),
            names=lambda r, s=split: quoted(s, r),
        ):
            yield throughout(found, english)


OTHER_LANGUAGE = Check(
    name="another language",
    needs="captions",
    rule="be in English, as most text encoders are",
    remedy="translate them, or take a text encoder of many languages",
    find=_find,
)
