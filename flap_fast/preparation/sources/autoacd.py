"""Auto-ACD: 10 s clips of AudioSet and VGGSound, one caption each.

    FOLDER/train.csv test.csv            youtube_id,caption
    FOLDER/**/*.wav (or flac, mp4, ...)  called by youtube_id, with or without a Y before it

A `youtube_id` is YouTube's id, or that and the start in seconds, as VGGSound's files are called:
`oPRC3zComfA_000117`. A file without the start is no clip with one: it may be another piece.

Source: Sun et al., "Auto-ACD", arXiv 2309.11500; read were the authors' data card and what they say
of the ids on the Hugging Face Hub, and others' code for these files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Clips, Source

_SPLITS = ("train", "test")


def read(folder: Path) -> list[Entry]:
    """The clips of both splits, or of the one whose CSV exists; raises `ManifestError` without."""
    tables = {split: folder / f"{split}.csv" for split in _SPLITS}
    tables = {split: file for split, file in tables.items() if file.is_file()}
    if not tables:
        raise ManifestError(f"Auto-ACD must have train.csv or test.csv, got '{folder}' without")
    return collect(_rows(tables, Clips(folder)), folder, str(folder))


def _rows(tables: dict[str, Path], clips: Clips) -> Iterator[Row]:
    for split, file in tables.items():
        for line, clip in clips.captioned(file, "youtube_id"):
            yield file, line, {**clip, "split": split}


AUTOACD = Source(
    name="autoacd",
    kind="sounds",
    folder="train.csv, test.csv; sounds anywhere, called by youtube_id",
    splits="train, test",
    read=read,
)
