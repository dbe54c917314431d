"""A folder of files and a table of captions, as Hugging Face's audiofolder and imagefolder.

    FOLDER/metadata.csv (.tsv, .jsonl)         file_name,caption; or any other single table
    FOLDER/SPLIT/metadata.csv, ...           one in each split's folder

The path's column is one of `audio`, `image`, `path`, `file_name`, `filename`, `file`, relative to
the table; captions are in `caption`, `captions`, `text`, or in `caption_0`, `caption_1`, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flap_fast.files import ManifestError, read_rows
from flap_fast.preparation.columns import remedy
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Source

_PATHS = ("audio", "image", "path", "file_name", "filename", "file")
_ENDINGS = (".csv", ".tsv", ".jsonl")


def read(folder: Path) -> list[Entry]:
    """The clips of the folder's table, or of its subfolders' tables; `ManifestError` without."""
    file = _only_table(folder)
    tables = {None: file} if file else {}
    if not tables:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        found = {path.name: _only_table(path) for path in inner}
        tables = {split: file for split, file in found.items() if file}
    if not tables:
        parquet = next(folder.rglob("*.parquet"), None)
        what = "; read_parquet(...).to_json of pandas converts a parquet file to JSON lines"
        raise ManifestError(
            f"a folder must have a table of captions ({', '.join(_ENDINGS)}), or one in each of "
            f"its splits' folders, got '{folder}' without"
            + (f", but with {parquet.relative_to(folder)}{what}" if parquet else "")
        )
    rows = (row for split, file in tables.items() for row in _rows(file, split))
    return collect(rows, folder, str(folder))


def _only_table(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    tables = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _ENDINGS]
    named = [file for file in tables if file.stem in ("metadata", "manifest")]
    if len(named or tables) > 1:
        raise ManifestError(
            f"a folder must have one table of captions, got {', '.join(f.name for f in tables)} in "
            f"'{folder}'; call the one that counts metadata.csv"
        )
    return next(iter(named or tables), None)


def _rows(file: Path, split: str | None) -> Iterator[Row]:
    for line, row in read_rows(file):
        path = next((name for name in _PATHS if row.get(name)), None)
        if path is None:
            found = list(row)
            raise ManifestError(
                f"{file}:{line} must name a file in one of {', '.join(_PATHS)}, got {found}"
                f"{remedy(file, found, (*_PATHS, 'caption', 'captions', 'text'))}"
            )
        clip: dict[str, Any] = {k: v for k, v in row.items() if k != path}
        clip["audio"] = row[path] if split is None else f"{split}/{row[path]}"
        numbered = sorted((int(k[8:]), k) for k in clip if re.fullmatch(r"caption_\d+", k))
        more = [clip.pop(name) for _, name in numbered]
        if "text" in clip and not clip.get("caption"):
            clip["caption"] = clip.pop("text")
        if more:
            own = clip.get("captions") or []
            own = own.split("|") if isinstance(own, str) else own
            own = own if isinstance(own, list) else [own]  # refused by `collect`, with its line
            clip["captions"] = [*own, *(text for text in more if text)]
        if split is not None:
            clip["split"] = split
        yield file, line, clip


FOLDER = Source(
    name="folder",
    kind="sounds or images",
    folder="metadata.csv, .tsv or .jsonl (file_name, caption), one or one a split's folder",
    splits="its split, or the folders' names",
    read=read,
)
