"""ESC-50: 2,000 clips of 5 s in 50 classes; its five folds become the splits fold1 to fold5.

    FOLDER/meta/esc50.csv    filename,fold,target,category,esc10,src_file,take
    FOLDER/audio/*.wav

The class is a label, not a caption: for zero-shot classification and probes. Folds are of one size,
so that the mean over them is the accuracy over all; the language-encoder paper takes fold 1. A
clip's fold stands in its `original_data`, too, for the five as one place: 'OUT/fold{1..5}/*.tar'.

Source: Piczak, "ESC: Dataset for Environmental Sound Classification", ACM MM 2015.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.layout import Source, labelled_clips

_COLUMNS = ("filename", "fold", "target", "category")


def read(folder: Path) -> list[Entry]:
    """All clips; raises `ManifestError` without the CSV."""
    return labelled_clips(folder, ("meta/esc50.csv", "esc50.csv"), "ESC-50", _COLUMNS, _clip)


def _clip(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "audio": f"audio/{row['filename']}",
        "label": row["category"],
        "id": Path(row["filename"]).stem,
        "split": f"fold{row['fold']}",
        "fold": int(row["fold"]),
        "target": row["target"],
    }


ESC50 = Source(
    name="esc50",
    kind="sounds",
    folder="meta/esc50.csv, audio/",
    splits="fold1 to fold5, labels",
    read=read,
)
