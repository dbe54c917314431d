"""UrbanSound8K: 8,732 clips of at most 4 s in ten classes; one split, `all`.

    FOLDER/metadata/UrbanSound8K.csv    slice_file_name,fsID,start,end,salience,fold,classID,class
    FOLDER/audio/fold1 .. fold10/*.wav

The class is a label, not a caption: for zero-shot classification and probes. A clip's fold stands
in its `original_data`, for probes.

Source: Salamon et al., "A Dataset and Taxonomy for Urban Sound Research", ACM MM 2014.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.layout import Source, labelled_clips

_COLUMNS = ("slice_file_name", "fold", "classID", "class")


def read(folder: Path) -> list[Entry]:
    """All clips; raises `ManifestError` without the CSV."""
    names = ("metadata/UrbanSound8K.csv", "UrbanSound8K.csv")
    return labelled_clips(folder, names, "UrbanSound8K", _COLUMNS, _clip)


def _clip(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "audio": f"audio/fold{row['fold']}/{row['slice_file_name']}",
        "label": row["class"],
        "id": Path(row["slice_file_name"]).stem,
        "split": "all",
        "fold": int(row["fold"]),
        "target": row["classID"],
    }


URBANSOUND8K = Source(
    name="urbansound8k",
    kind="sounds",
    folder="metadata/UrbanSound8K.csv, audio/fold1/ to audio/fold10/",
    splits="all, labels",
    read=read,
)
