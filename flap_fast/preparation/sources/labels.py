"""A folder for each label, as torchvision's ImageFolder has it; one split, `all`.

    FOLDER/LABEL/*.wav    also in folders below LABEL; underscores in LABEL become spaces

The label is no caption: for zero-shot classification and probes. A manifest, instead, can also name
the clips' folds, or their sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.files import ManifestError, files_below
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Source


def read(folder: Path) -> list[Entry]:
    """All sounds, in the order of their paths.

    Raises:
        ManifestError: none in a label's folder, one beside the labels' folders, two of one name.
    """
    # Here: the names of sources are listed without waiting for NumPy.
    from flap_fast.data.preprocess.sound_formats import sounds_among

    files = [file for file in files_below(folder) if not file.name.startswith(".")]  # ._1.wav
    found = sounds_among(files, known=(".csv", ".tsv", ".json", ".txt", ".md"))
    if not found:
        raise ManifestError(f"sounds must lie in folders of labels, got none below '{folder}'")

    def rows() -> Iterator[Row]:
        for n, file in enumerate(found, 1):
            path = file.relative_to(folder)
            if len(path.parts) == 1:
                rule = "each sound must lie in its label's folder"
                raise ManifestError(f"{rule}, got '{path}' beside them in '{folder}'")
            label = " ".join(path.parts[0].replace("_", " ").split())
            name = "_".join(path.with_suffix("").parts)
            clip = {"audio": str(path), "id": name, "split": "all", "labels": [label]}
            yield folder, n, clip

    return collect(rows(), folder, str(folder))


LABELS = Source(
    name="labels",
    kind="sounds",
    folder="LABEL/x.wav, a folder for each label",
    splits="all, labels",
    read=read,
)
