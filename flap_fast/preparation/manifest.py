"""A list of sounds and captions, as JSON lines or CSV.

    audio     path, relative to the manifest's folder (required); or `image`, in every row
    caption   one text, or `captions`: several (a list; in CSV separated by `|`)
    id        a name for the clip; its file's stem without one
    split     train, val, ...: names a folder; `train` without one
    labels    class names (a list; in CSV separated by `|`)
    negatives   captions that are wrong for the clip (a list; in CSV separated by `|`)
    start_s   where the clip starts in its file, in seconds
    duration_s   how long it lasts

Rows of the same piece of the same file are one clip with the captions, labels and negatives of
all. Other columns, the first row's, travel along as `original_data`. An image and its captions are
such a row too, with the image as `audio`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flap_fast.files import ManifestError, listed_texts, read_rows, whole_characters
from flap_fast.preparation.columns import like_texts, listed, remedy

_TEXTS = ("caption", "captions", "labels", "negatives")
_KNOWN = ("audio", "image", *_TEXTS, "id", "split", "start_s", "duration_s")
Row = tuple[Path, int, dict[str, Any]]
"""A row's file, its line and its cells."""

# Endings of image files.
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Files that stand where splits' folders do, or in them.
_FILES = (".jsonl", ".json", ".tar", ".idx", ".part")
# The most lists and objects around a value; deeper ones end in Python's RecursionError.
_DEPTH = 100
# How tables write a missing value.
_MISSING = ("nan", "none", "null", "na")


@dataclass(slots=True)
class Entry:
    """One clip of a manifest, and the line that it was first named on."""

    line: int
    audio: Path
    captions: list[str]
    id: str
    split: str = "train"
    labels: list[str] = field(default_factory=list)
    start_s: float = 0.0
    duration_s: float | None = None
    original: dict[str, Any] = field(default_factory=dict)
    image: bool = False
    """`audio` is an image."""
    inside: tuple[int, int] | None = None
    """Offset and size of the media in `audio`, a tar."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of its JSON record."""
    negatives: list[str] = field(default_factory=list)
    """Captions that are wrong for it."""
    captionless: bool = False
    """It is of sounds that have no captions: it needs none."""
    fault: str = ""
    """Why it cannot be used, where that is known before its media are read."""
    under: str = ""
    """The folder of `audio`, relative to its manifest's; empty without a manifest."""


def read_manifest(file: Path) -> list[Entry]:
    """All clips, in the order of their first lines.

    Raises:
        ManifestError: no such file, a line that is not a row, a row without audio, a value that
            cannot be, one id for two clips. A missing sound or caption is no fault of the manifest:
            `prepare` rejects those.
    """
    if not file.is_file():
        raise ManifestError(f"the manifest must be an existing .jsonl or .csv file, got '{file}'")
    clips = collect(((file, line, row) for line, row in read_rows(file)), file.parent, str(file))
    for clip in clips:
        if clip.audio.is_relative_to(file.parent):
            clip.under = "/".join(clip.audio.relative_to(file.parent).parts[:-1])
    return clips


def collect(rows: Iterable[Row], folder: Path, called: str) -> list[Entry]:
    """The clips of rows with a manifest's columns, in the order of their first lines.

    Args:
        folder: what `audio` is relative to.
        called: the name of the rows' origin, for the message that there are none.

    Raises:
        ManifestError: as `read_manifest`.
    """
    clips: dict[tuple, Entry] = {}
    owners: dict[tuple[str, str], tuple] = {}
    for file, line, row in rows:
        entry = _entry(file, line, row, folder)
        other = next(iter(clips.values()), entry)
        if entry.image != other.image:
            raise ManifestError(
                f"{file}:{line}: a manifest must name sounds or images throughout, got both; "
                "split it in two"
            )
        piece = (entry.split, entry.audio, entry.start_s, entry.duration_s)
        if piece in clips:
            first = clips[piece]
            first.captions.extend(entry.captions)
            first.labels = list(dict.fromkeys([*first.labels, *entry.labels]))
            first.negatives = list(dict.fromkeys([*first.negatives, *entry.negatives]))
            continue
        if not _given(row, "id") and (entry.split, entry.id) in owners:
            entry.id = f"{entry.id}@{entry.start_s:g}-{line}"
        named = owners.setdefault((entry.split, entry.id), piece)
        if named != piece:
            raise ManifestError(
                f"{file}:{line}: id must name one clip of a split, got '{entry.id}' again "
                f"(first on line {clips[named].line}); rename one of them"
            )
        clips[piece] = entry
    if not clips:
        raise ManifestError(f"{called} must hold at least one row, got none")
    return list(clips.values())


def _entry(file: Path, line: int, row: dict[str, Any], folder: Path) -> Entry:
    image = _given(row, "image")
    audio = row.get("image" if image else "audio")
    if image and _given(row, "audio"):
        raise ManifestError(f"{file}:{line}: a row must have audio or image, got both")
    if not isinstance(audio, str) or audio.lower() in ("", "nan"):
        what = "image must name an image file" if image else "audio must name a sound file"
        found = "" if "audio" in row or "image" in row else _columns(file, row)
        raise ManifestError(f"{file}:{line}: {what}, got {audio!r}{found}")
    if not any(name in row for name in _TEXTS[:3]) and like_texts(row):
        rule = "captions must be in caption or captions, and labels in labels"
        raise ManifestError(f"{file}:{line}: {rule}{_columns(file, row)}")
    path = folder / audio
    image = image or path.suffix.lower().lstrip(".") in IMAGE_ENDINGS
    try:
        start_s = float(row["start_s"]) if _given(row, "start_s") else 0.0
        duration_s = float(row["duration_s"]) if _given(row, "duration_s") else None
    except (TypeError, ValueError, OverflowError) as error:
        raise ManifestError(
            f"{file}:{line}: start_s and duration_s must be seconds: {error}"
        ) from None
    if not (0 <= start_s < math.inf and (duration_s is None or 0 < duration_s < math.inf)):
        raise ManifestError(
            f"{file}:{line}: start_s must be at least 0 and duration_s above 0, both finite, "
            f"got {start_s:g} and {duration_s}"
        )
    if image and (start_s or duration_s is not None):
        raise ManifestError(f"{file}:{line}: start_s and duration_s are for sounds, not for images")
    split = str(row["split"]) if _given(row, "split") else "train"
    if not _FOLDER.fullmatch(split):
        raise ManifestError(
            f"{file}:{line}: split must be letters, digits, '.', '_' or '-' (it names a folder), "
            f"got {split!r}"
        )
    if split.lower() in _MISSING or split.lower().endswith(_FILES):
        rule = f"neither be a missing value nor end with {', '.join(_FILES)}, as files of shards do"
        what = "leave the cell empty for 'train'" if split.lower() in _MISSING else "rename it"
        raise ManifestError(f"{file}:{line}: split must {rule}, got {split!r}; {what}")
    try:
        captions = [*_texts(row, "captions"), *_texts(row, "caption", several=False)]
        labels = _texts(row, "labels")
        negatives = list(dict.fromkeys(_texts(row, "negatives")))
    except TypeError as error:
        raise ManifestError(f"{file}:{line}: {error}") from None
    original = {k: v for k, v in row.items() if k not in _KNOWN and _given(row, k)}
    for name, value in (("id", row.get("id")), *original.items()):
        if not isinstance(value, str) and not _is_json(value):
            rule = f"must be a value of JSON, without NaN or Infinity, nested {_DEPTH} deep at most"
            got = f"got {reprlib.repr(value)}; write null"
            raise ManifestError(f"{file}:{line}: {name} {rule}, {got}")
    return Entry(
        line=line,
        audio=path,
        captions=captions,
        id=str(row["id"]) if _given(row, "id") else path.stem,
        split=split,
        labels=labels,
        negatives=negatives,
        start_s=start_s,
        duration_s=duration_s,
        original=original,
        image=image,
    )


def _given(row: dict[str, Any], name: str) -> bool:
    """Whether a row's cell in a column is not empty."""
    return row.get(name) not in (None, "")


def _columns(file: Path, row: dict[str, Any]) -> str:
    """The columns found, those accepted, and what reads this layout."""
    accepted = f"audio (or image), caption (or captions), {', '.join((*_TEXTS[2:], *_KNOWN[6:]))}"
    found = list(row)
    return f"; its columns are {listed(found)}, accepted are {accepted}" + remedy(
        file, found, _KNOWN
    )


def _is_json(value: Any, depth: int = _DEPTH) -> bool:
    """Whether JSON can hold a value that was read from JSON: NaN and infinity are extensions."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_json(item, depth - 1) for item in inner)
    return True


def _texts(row: dict[str, Any], name: str, *, several: bool = True) -> list[str]:
    """The texts of a cell, without blank ones and `nan`, a missing value's: a list, also as JSON or
    Python write it, or one string (of several, by `|`)."""
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        try:
            texts = listed_texts(value)
        except ValueError as error:
            what = f"{name} must be a text or a list of texts, got {value!r}, {error}"
            raise TypeError(f"{what}; separate several by |") from None
        value = (value.split("|") if several else [value]) if texts is None else texts
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name} must be a text or a list of texts, got {value!r}")
    texts = (text.strip() for text in value)
    return [whole_characters(text) for text in texts if text and text.lower() != "nan"]
