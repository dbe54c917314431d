"""AudioCaps: 10 s clips of YouTube; one caption each in `train`, five in `val` and `test`.

    FOLDER/train.csv val.csv test.csv    audiocap_id,youtube_id,start_time,caption
    FOLDER/**/*.wav (or flac, ...)       called by audiocap_id, by youtube_id, or with the start

Source: Kim et al., "AudioCaps: Generating Captions for Audios in The Wild", NAACL 2019.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Clips, Source, table

_SPLITS = ("train", "val", "test")
_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
_SECONDS = 10


def read(folder: Path) -> list[Entry]:
    """The clips of all splits whose CSV exists; raises `ManifestError` without any."""
    tables = {split: folder / f"{split}.csv" for split in _SPLITS}
    tables = {split: file for split, file in tables.items() if file.is_file()}
    if not tables:
        raise ManifestError(f"AudioCaps must have {_SPLITS[0]}.csv, ..., got a '{folder}' without")
    clips, rows = Clips(folder), []
    for split, file in tables.items():
        rows += _split(split, file, clips)
    return collect(rows, folder, str(folder))


def _split(split: str, file: Path, clips: Clips) -> list[Row]:
    """The rows of one clip together: any of their ids may be what its file is called by."""
    pieces: dict[tuple[str, float], tuple[int, list[dict[str, Any]]]] = {}
    for line, row in table(file, _COLUMNS):
        try:
            key = row["youtube_id"], float(row["start_time"])
        except ValueError:
            raise ManifestError(
                f"{file}:{line}: start_time must be seconds, got {row['start_time']!r}"
            ) from None
        pieces.setdefault(key, (line, []))[1].append(row)
    out: list[Row] = []
    for (youtube, start_s), (line, some) in pieces.items():
        ids = [row["audiocap_id"] for row in some]
        clip = {
            **clips.row(youtube, start_s, start_s + _SECONDS, ids),
            "captions": [row["caption"] for row in some],
            "id": f"{youtube}_{start_s:g}",
            "split": split,
            "audiocap_ids": ids,
        }
        out.append((file, line, clip))
    return out


AUDIOCAPS = Source(
    name="audiocaps",
    kind="sounds",
    folder="train.csv, val.csv, test.csv; sounds anywhere, called by either id, with or "
    "without the start",
    splits="train, val, test (5 captions a clip in the last two)",
    read=read,
)
