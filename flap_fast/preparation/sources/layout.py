"""What the readers share: tables with the columns they need, and where a clip's file lies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile

from flap_fast.data.shards import SOUNDS
from flap_fast.files import ManifestError, read_rows


def first_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of some files that is there; raises `ManifestError` naming them all."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ManifestError(f"{what} must have {' or '.join(names)}, got a '{folder}' without")


def table(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and cells of each row of a CSV that has these columns; raises `ManifestError`."""
    for line, row in read_rows(file):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ManifestError(
                f"{file}:{line} must have the columns {', '.join(columns)}, got none called "
                f"{', '.join(missing)}"
            )
        yield line, row


def spoken(label: str) -> str:
    """A class name as one says it: without underscores."""
    return " ".join(label.replace("_", " ").split())


class Clips:
    """Clips of YouTube under a folder, as any of the usual downloaders names their files."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        endings = {f".{ending}" for ending in SOUNDS}
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in endings:
                self._files.setdefault(file.stem, file)

    def row(self, youtube: str, start_s: float, end_s: float, ids: Sequence[str]) -> dict[str, Any]:
        """`audio` of a clip, and where it starts in a file that is a whole recording.

        A file of the clip's own length, within a second, is the clip: it was cut when it was
        fetched. One that is not there gets the name that it should have.
        """
        start, end = f"{start_s:g}", f"{end_s:g}"
        names = [
            *ids,
            f"{youtube}_{start}",
            f"{youtube}_{start}_{end}",
            f"{youtube}_{start_s * 1000:.0f}_{end_s * 1000:.0f}",
            f"[{youtube}]-[{start}-{end}]",
            youtube,
        ]
        names += [f"Y{name}" for name in names[len(ids) :]]
        file = next((self._files[name] for name in names if name in self._files), None)
        if file is None:
            return {"audio": f"{youtube}_{start}.wav"}
        row: dict[str, Any] = {"audio": str(file.relative_to(self._folder))}
        if _seconds(file) > end_s - start_s + 1:
            row |= {"start_s": start_s, "duration_s": end_s - start_s}
        return row


def _seconds(file: Path) -> float:
    """How long a file lasts; 0 for one that cannot be read, which `prepare` will tell of."""
    try:
        return soundfile.info(os.fsencode(file)).duration  # type: ignore[arg-type]
    except soundfile.LibsndfileError:
        return 0.0
