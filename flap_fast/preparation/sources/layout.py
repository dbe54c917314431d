"""Parts of the readers: a source's record, tables with known columns, files of YouTube clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flap_fast.files import ManifestError, files_below, read_rows
from flap_fast.preparation.columns import listed, remedy
from flap_fast.preparation.manifest import Entry, Row, collect


@dataclass(frozen=True)
class Source:
    """A published data set, and the reader of the layout that it is published in.

    A reader gives the clips that the data set lists, in its order and under its own split names,
    whether their files exist or not: `prepare` counts and lists those that are missing.
    """

    name: str
    """The name for `--source`."""
    kind: Literal["sounds", "images", "sounds or images", "sentences"]
    folder: str
    """What its folder holds, for the table in docs/data.md."""
    splits: str
    read: Callable[[Path], Any]
    """The folder -> a list of `Entry`; of sentences the rows of each split. Raises `ManifestError`
    for a folder of another layout."""


def first_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of some files that exists; raises `ManifestError` naming them all."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ManifestError(f"{what} must have {' or '.join(names)}, got a '{folder}' without")


def tables_below(folder: Path, names: Sequence[str], what: str) -> dict[str, Path]:
    """The file of each name, as far as there is one anywhere below a folder.

    Args:
        names: the last parts of their paths.
        what: the data set's name, for messages.

    Raises:
        ManifestError: there is none of them, or two of one name.
    """
    ends, found = {Path(name).name: name for name in names}, dict[str, Path]()
    for file in files_below(folder):
        name = ends.get(file.name)
        if name is None or not file.match(name):
            continue
        if name in found:
            raise ManifestError(
                f"{what} must have one {name}, got '{found[name]}' and '{file}'; join them, or "
                f"move one out of '{folder}'"
            )
        found[name] = file
    if not found:
        raise ManifestError(f"{what} must have {', '.join(names)}, got '{folder}' without")
    return {name: found[name] for name in names if name in found}


def table(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and cells of each row of a CSV that has these columns; raises `ManifestError`."""
    for line, row in read_rows(file):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            found = list(row)
            raise ManifestError(
                f"{file}:{line} must have the columns {', '.join(columns)}, got none called "
                f"{', '.join(missing)}; its columns are {listed(found)}"
                + remedy(file, found, columns)
            )
        yield line, row


def labelled_clips(
    folder: Path,
    names: Sequence[str],
    what: str,
    columns: Sequence[str],
    clip: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[Entry]:
    """The clips of a table of one label each.

    Args:
        names: files that may be the table; the first that exists is.
        what: the data set's name, for the message that none was found.
        columns: that it must have.
        clip: turns a row into a manifest's; underscores in its `label` become spaces.
    """
    file = first_file(folder, names, what)

    def rows() -> Iterator[Row]:
        for line, row in table(file, columns):
            cells = clip(row)
            label = " ".join(cells.pop("label").replace("_", " ").split())
            yield file, line, {**cells, "labels": [label]}

    return collect(rows(), folder, str(file))


# Endings of tables and notes.
BESIDE = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".md")


class Clips:
    """Clips of YouTube under a folder, as any of the usual downloaders names their files."""

    def __init__(self, folder: Path):
        # Here: the names of sources are listed without waiting for NumPy.
        from flap_fast.data.preprocess.sound_formats import sounds_among

        self._folder = folder
        self._files: dict[str, Path] = {}
        for file in sounds_among(files_below(folder), known=BESIDE):
            self._files.setdefault(file.stem, file)

    def row(self, youtube: str, start_s: float, end_s: float, ids: Sequence[str]) -> dict[str, Any]:
        """`audio` of a clip, and where it starts in a file that is a whole recording.

        A file of the clip's own length, within a second, is the clip: it was cut when it was
        fetched. A missing one gets the name that it should have.
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

    def captioned(self, file: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line and a manifest's row of each clip of a CSV that names files in the column `name`.

        With or without the Y that copies of AudioSet have before YouTube's ids; a missing file gets
        the name that it should have. Raises `ManifestError` for a blank name or a missing column.
        """
        for line, row in table(file, (name, "caption")):
            clip = row[name].strip()
            if not clip:
                raise ManifestError(f"{file}:{line}: {name} must name a clip, got {row[name]!r}")
            stems = (clip, f"Y{clip}", clip.removeprefix("Y"))
            found = next((self._files[stem] for stem in stems if stem in self._files), None)
            audio = f"{clip}.wav" if found is None else str(found.relative_to(self._folder))
            yield line, {"audio": audio, "captions": [row["caption"]], "id": clip}


def _seconds(file: Path) -> float:
    """A file's duration; 0 for one that cannot be read, which `prepare` rejects."""
    from flap_fast.data.preprocess.sound_file import BadSound, sound_seconds

    try:
        return sound_seconds(file)
    except BadSound:
        return 0.0
