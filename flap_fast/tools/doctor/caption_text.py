"""Captions that are no sentences about a sound: missing, broken, markup, file names, scripts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from flap_fast.data.pair_ids import caption_words
from flap_fast.data.preprocess.sound_formats import SOUNDS
from flap_fast.files import visible
from flap_fast.tools.doctor.records import Check, Examined, Found, Split, over_share

# Fractions of a split's captions, or of its clips.
_WITHOUT, _NONE, _BROKEN, _MARKUP, _FILES, _FOREIGN = 0.01, 0.01, 0.005, 0.005, 0.01, 0.05
_THROUGHOUT = 0.9
_LONG = 60

_HTML = re.compile(
    r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d+|#x[\da-f]+);|\b(?:https?|ftp)://|\bwww\.\w"
    r"|\b[\w-]+\.(?:com|org|net|be|io)/\S"
    r"""|^\s*[\[{]\s*['"].*['"]\s*[\]}]\s*$""",
    re.IGNORECASE,
)
_MEDIA = re.compile(rf"\S\.(?:{'|'.join(SOUNDS)})\b", re.IGNORECASE)
# A text without spaces that people do not write: dog_bark-01, 3aXb9_Z, IMG0042.
_NAME = re.compile(r"(?=\S*[\d_])\S*[A-Za-z]\S*[-_\d]\S*|\S+_\S+")
# UTF-8 that was read as Mac Roman or as a code page of DOS, and escapes that were not.
_OTHER_TABLES = re.compile(r"√[^\w\s]|\u201aÄ|[├┬]|ΓÇ|\\u[\da-fA-F]{4}")
# What programs and people write where there is no caption, without punctuation and case.
_PLACEHOLDER = re.compile(
    r"none|null|nan|nil|n a|na|tbd|todo|xxx|unknown|undefined|untitled|unlabell?ed|empty|missing"
    r"|placeholder|lorem ipsum|caption|description|unknown (?:sound|audio|caption)"
    r"|(?:not|un)\s?(?:available|applicable)"
    r"|(?:no|missing|empty|your) (?:audio )?(?:captions?|description|label|text|title)"
    r"(?: (?:available|provided|found|given|yet|here))?"
)
# How language models begin or excuse what they write.
_MODEL = re.compile(
    r"^(?:sure|certainly|of course)[!,:]|^i(?:'m|\u2019m| am) sorry\b"
    r"|\bas an ai\b|\blanguage model\b|\bi (?:cannot|can't|can\u2019t) (?:hear|listen|play)\b"
    r"|^here(?:'s|\u2019s| is| are) (?:a|an|the|your|some)\b.{0,40}\b(?:caption|description)s?\b"
    r"|^(?:caption|description|output|answer)\s*:",
    re.IGNORECASE,
)
# Characters of no width that only programs insert; joiners are letters' own.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_OUTSIDE = re.compile(r"[^\x00-\x7f]+")


def _over_captions(
    faulty: Callable[[str], bool], got: str, most: float
) -> Callable[[Examined], Iterator[Found]]:
    """A check of each caption by itself: a warning from a share of `most` on."""

    def find(e: Examined) -> Iterator[Found]:
        for split in e.splits:
            texts = split.captions.texts
            rows = np.array([n for n, text in enumerate(texts) if faulty(text)], np.int64)
            yield from over_share(
                split, rows, got, most=most, total=len(texts), names=lambda r, s=split: quoted(s, r)
            )

    return find


def quoted(split: Split, rows: Iterable[int]) -> tuple[str, ...]:
    """Some captions of a split and their clips: "a dog barks" (clip-3)."""
    captions, found = split.captions, []
    for row in rows:
        text = visible(captions.texts[row])
        text = text if len(text) <= _LONG else f"{text[:_LONG]}..."
        (name,) = split.names([int(captions.clip_of_caption[row])])
        found.append(f'"{text}" ({name})')
    return tuple(found)


def is_mojibake(text: str) -> bool:
    """Whether a part of a text is UTF-8 read as another encoding, was lost, or is invisible."""
    if _OTHER_TABLES.search(text):
        return True
    if text.isascii():
        return False
    if (
        "\ufffd" in text
        or _INVISIBLE.search(text)
        or any("\x80" <= sign <= "\x9f" for sign in text)
    ):
        return True
    return any(_is_utf8(run) for run in _OUTSIDE.findall(text))


def _is_utf8(run: str) -> bool:
    try:
        run.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return False
    return True


def is_placeholder(text: str) -> bool:
    """Whether a text stands where a caption is lacking: None, N/A, "no caption", signs alone."""
    words = caption_words(text.replace("/", " ").replace("_", " "))
    return not any(map(str.isalnum, text)) or bool(_PLACEHOLDER.fullmatch(words))


def is_markup(text: str) -> bool:
    """Whether a text holds a tag, an entity or a link, or is a list or a mapping written out."""
    return bool(_HTML.search(text))


def is_by_model(text: str) -> bool:
    """Whether a text holds what a language model says besides a caption: "Sure! Here is ..."."""
    return bool(_MODEL.search(text))


def is_file_name(text: str) -> bool:
    """Whether a caption is a file's name or an identifier."""
    return bool(_MEDIA.search(text) or _NAME.fullmatch(text.strip()))


def is_other_script(text: str) -> bool:
    """Whether more than half of a text's letters are not Latin."""
    if text.isascii():
        return False
    letters = [sign for sign in text if sign.isalpha()]
    latin = sum(unicodedata.name(sign, "").startswith("LATIN") for sign in letters)
    return len(letters) > 0 and latin < len(letters) / 2


def _without(e: Examined) -> Iterator[Found]:
    for split in e.splits:
        total = len(split.picked)
        faults = split.captions.faults
        rows = np.array(sorted({*split.captions.without.tolist(), *faults}), np.int64)
        why = f"; of the first that cannot be read: {next(iter(faults.values()))}" if faults else ""
        yield from over_share(split, rows, f"no caption{why}", most=_WITHOUT, total=total)


def _in_other_scripts(e: Examined) -> Iterator[Found]:
    for found in _over_captions(is_other_script, "most letters are not Latin", _FOREIGN)(e):
        throughout = found.count >= _THROUGHOUT * found.total  # what the data are meant to be in
        yield replace(found, severity="note") if throughout else found


WITHOUT = Check(
    name="clips without captions",
    needs="captions",
    rule="have a caption",
    remedy="caption them or leave them out; training refuses a data.val with one",
    find=_without,
)
PLACEHOLDER = Check(
    name="placeholders",
    needs="captions",
    rule="be captions, not a sign that one is lacking",
    remedy="caption these clips or leave them out: a program wrote out what was empty",
    find=_over_captions(is_placeholder, "a placeholder", _NONE),
)
BROKEN = Check(
    name="broken characters",
    needs="captions",
    rule="be read in the encoding that they were written in",
    remedy="read the table again as UTF-8 (ftfy mends what is not lost)",
    find=_over_captions(is_mojibake, "mojibake", _BROKEN),
)
MARKUP = Check(
    name="markup",
    needs="captions",
    rule="be plain text, without HTML, addresses and brackets of lists",
    remedy="strip tags and links, and decode entities (html.unescape)",
    find=_over_captions(is_markup, "HTML, a link or a list", _MARKUP),
)
BY_MODEL = Check(
    name="a language model's own words",
    needs="captions",
    rule="describe the sound, without what a language model says around it",
    remedy="cut it off, or have them written again: flap enrich takes captions alone",
    find=_over_captions(is_by_model, "words of a language model", _MARKUP),
)
FILE_NAMES = Check(
    name="file names as captions",
    needs="captions",
    rule="describe the sound",
    remedy="write captions, or make them of labels: flap enrich",
    find=_over_captions(is_file_name, "a file's name or an identifier", _FILES),
)
OTHER_SCRIPT = Check(
    name="another script",
    needs="captions",
    rule="be in the Latin script, as text encoders of English read it",
    remedy="translate them, or take a text encoder of many languages",
    find=_in_other_scripts,
)
