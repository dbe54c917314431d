"""A list of sounds and captions, as JSON lines or CSV.

    audio     path, relative to the manifest's folder (required)
    caption   one text, or `captions`: several (a list; in CSV separated by `|`)
    id        a name for the clip; its file's stem without one
    split     train, val, ...; `train` without one
    labels    class names (a list; in CSV separated by `|`)
    start_s   where the clip starts in its file, in seconds
    duration_s   how long it lasts

Rows of the same piece of the same file are one clip with several captions. Other columns travel
along as `original_data`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KNOWN = ("audio", "caption", "captions", "id", "split", "labels", "start_s", "duration_s")


class ManifestError(ValueError):
    """A manifest that cannot be read: the line, the rule, the value, the remedy."""


@dataclass
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


def read_manifest(file: Path) -> list[Entry]:
    """All clips, in the order of their first lines.

    Raises:
        ManifestError: no such file, a line that is not a row, a row without audio, one id for two
            clips. A missing sound or caption is no fault of the manifest: `prepare` rejects those.
    """
    if not file.is_file():
        raise ManifestError(f"the manifest must be an existing .jsonl or .csv file, got '{file}'")
    clips: dict[tuple, Entry] = {}
    owners: dict[tuple[str, str], tuple] = {}
    for line, row in _rows(file):
        entry = _entry(file, line, row)
        piece = (entry.split, entry.audio, entry.start_s, entry.duration_s)
        if piece in clips:
            clips[piece].captions.extend(entry.captions)
            continue
        named = row.get("id") not in (None, "")
        if not named and (entry.split, entry.id) in owners:
            entry.id = f"{entry.id}@{entry.start_s:g}-{line}"
        first = owners.setdefault((entry.split, entry.id), piece)
        if first != piece:
            raise ManifestError(
                f"{file}:{line}: id must name one clip of a split, got '{entry.id}' again "
                f"(first on line {clips[first].line}); rename one of them"
            )
        clips[piece] = entry
    if not clips:
        raise ManifestError(f"{file} must hold at least one row, got none")
    return list(clips.values())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{file}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{file}:{number} must be an object, got {line.strip()[:60]}")
            yield number, row


def _entry(file: Path, line: int, row: dict[str, Any]) -> Entry:
    audio = row.get("audio")
    if not isinstance(audio, str) or not audio:
        raise ManifestError(f"{file}:{line}: audio must name a sound file, got {audio!r}")
    path = file.parent / audio
    try:
        start_s = float(row.get("start_s") or 0)
        duration_s = float(row["duration_s"]) if row.get("duration_s") else None
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"{file}:{line}: start_s and duration_s must be seconds: {error}"
        ) from None
    if not (start_s >= 0 and (duration_s is None or duration_s > 0)):
        raise ManifestError(
            f"{file}:{line}: start_s must be at least 0 and duration_s above 0, "
            f"got {start_s:g} and {duration_s}"
        )
    captions = [*_texts(row.get("captions")), *_texts(row.get("caption"), split=False)]
    return Entry(
        line=line,
        audio=path,
        captions=captions,
        id=str(row.get("id") or path.stem),
        split=str(row.get("split") or "train"),
        labels=_texts(row.get("labels")),
        start_s=start_s,
        duration_s=duration_s,
        original={k: v for k, v in row.items() if k not in _KNOWN and k and v not in (None, "")},
    )


def _texts(value: Any, *, split: bool = True) -> list[str]:
    """The non-blank texts of a cell: a list, or one string (of several, by `|`)."""
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split("|") if split else [value]
    return [text.strip() for text in map(str, value) if text.strip()]
