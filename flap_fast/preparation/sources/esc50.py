"""ESC-50: 2,000 clips of 5 s in 50 classes; its five folds become the splits fold1 to fold5.

    FOLDER/meta/esc50.csv    filename,fold,target,category,esc10,src_file,take
    FOLDER/audio/*.wav

The class is a label, not a caption: for zero-shot classification. Folds are of one size, so that
the mean over them is the accuracy over all; the language-encoder paper takes fold 1 (SPEC 2.2).

Source: Piczak, "ESC: Dataset for Environmental Sound Classification", ACM MM 2015.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import first_file, spoken, table

_COLUMNS = ("filename", "fold", "target", "category")


def esc50(folder: Path) -> list[Entry]:
    """All clips; raises `ManifestError` without the CSV."""
    file = first_file(folder, ("meta/esc50.csv", "esc50.csv"), "ESC-50")
    return collect(_rows(file), folder, str(file))


def _rows(file: Path) -> Iterator[Row]:
    for line, row in table(file, _COLUMNS):
        clip = {
            "audio": f"audio/{row['filename']}",
            "labels": [spoken(row["category"])],
            "id": Path(row["filename"]).stem,
            "split": f"fold{row['fold']}",
            "target": row["target"],
        }
        yield file, line, clip
