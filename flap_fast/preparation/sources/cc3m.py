"""CC3M: images of the web, one caption each.

    FOLDER/train*.csv, val*.csv    image,caption (or filepath,title), paths relative to the CSV
    FOLDER/**/*.jpg

Images that could not be fetched, and pages saved in their place, are rejected by `prepare`. Shards
that img2dataset wrote are the source `shards`.

Source: Sharma et al., "Conceptual Captions", ACL 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Source, table


def read(folder: Path) -> list[Entry]:
    """The images of all CSVs, in the order of their names; raises `ManifestError` without any."""
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        raise ManifestError(f"CC3M must have train.csv, ..., got '{folder}' without any .csv")
    return collect(_rows(tables), folder, str(folder))


def _rows(tables: list[Path]) -> Iterator[Row]:
    numbers = count(1)  # not lines: two files of one split have the same
    for file in tables:
        split = next((split for split in ("train", "val") if file.stem.startswith(split)), None)
        if split is None:
            raise ManifestError(f"a CSV of CC3M must be called train... or val..., got '{file}'")
        for line, row in table(file, ()):
            image, caption = (row.get(a, row.get(b)) for a, b in _COLUMNS)
            if image is None or caption is None:
                raise ManifestError(f"{file}:{line} must have image and caption, got {list(row)}")
            clip = {
                "audio": image,
                "captions": [caption],
                "id": image,
                "split": split,
            }
            yield file, next(numbers), clip


_COLUMNS = (("image", "filepath"), ("caption", "title"))


CC3M = Source(
    name="cc3m",
    kind="images",
    folder="train*.csv, val*.csv: image,caption",
    splits="train, val",
    read=read,
)
