"""UrbanSound8K: 8,732 clips of at most 4 s in ten classes; one split, `all`, for zero-shot.

    FOLDER/metadata/UrbanSound8K.csv    slice_file_name,fsID,start,end,salience,fold,classID,class
    FOLDER/audio/fold1 .. fold10/*.wav

The class is a label, not a caption; a clip's fold stands in its `original_data`.

Source: Salamon et al., "A Dataset and Taxonomy for Urban Sound Research", ACM MM 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import first_file, spoken, table

_COLUMNS = ("slice_file_name", "fold", "classID", "class")


def urbansound8k(folder: Path) -> list[Entry]:
    """All clips; raises `ManifestError` without the CSV."""
    names = ("metadata/UrbanSound8K.csv", "UrbanSound8K.csv")
    file = first_file(folder, names, "UrbanSound8K")
    return collect(_rows(file), folder, str(file))


def _rows(file: Path) -> Iterator[Row]:
    for line, row in table(file, _COLUMNS):
        clip = {
            "audio": f"audio/fold{row['fold']}/{row['slice_file_name']}",
            "labels": [spoken(row["class"])],
            "id": Path(row["slice_file_name"]).stem,
            "split": "all",
            "fold": int(row["fold"]),
            "target": row["classID"],
        }
        yield file, line, clip
