"""Clotho v2.1: 15 to 30 s of Freesound, five captions each, under the official split names.

    FOLDER/clotho_captions_{development,validation,evaluation}.csv    file_name,caption_1..caption_5
    FOLDER/{development,validation,evaluation}/*.wav

LAION's shards call `evaluation` valid and `validation` test, and papers follow either:
here a split is called what its authors call it.

Source: Drossos et al., "Clotho: an Audio Captioning Dataset", ICASSP 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Source, table

_SPLITS = ("development", "validation", "evaluation")
_CAPTIONS = tuple(f"caption_{n}" for n in range(1, 6))


def read(folder: Path) -> list[Entry]:
    """The clips of all splits whose CSV exists; raises `ManifestError` without any."""
    tables = {split: folder / f"clotho_captions_{split}.csv" for split in _SPLITS}
    tables = {split: file for split, file in tables.items() if file.is_file()}
    if not tables:
        raise ManifestError(f"Clotho must have clotho_captions_SPLIT.csv, got '{folder}' without")
    rows = (row for split, file in tables.items() for row in _split(split, file, folder))
    return collect(rows, folder, str(folder))


def _split(split: str, file: Path, folder: Path) -> Iterator[Row]:
    # The archives, unpacked where the CSVs are or each in a folder of its own.
    folders = (split, f"clotho_audio_{split}/{split}")
    sounds = next((name for name in folders if (folder / name).is_dir()), split)
    for line, row in table(file, ("file_name", *_CAPTIONS)):
        clip = {
            "audio": f"{sounds}/{row['file_name']}",
            "captions": [row[name] for name in _CAPTIONS],
            "id": Path(row["file_name"]).stem,
            "split": split,
        }
        yield file, line, clip


CLOTHO = Source(
    name="clotho",
    kind="sounds",
    folder="clotho_captions_SPLIT.csv and a folder a split",
    splits="development, validation, evaluation (5 captions)",
    read=read,
)
