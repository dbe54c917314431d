"""Shards of others: tars of a sound or an image and a JSON for each clip.

    FOLDER/SPLIT/*.tar    LAION's layout: KEY.flac, KEY.json with text, tag, original_data, ...
    FOLDER/*.tar          one split, called as the folder

Training reads such shards as they are; to prepare them brings them to another rate, or caches their
log-mels. All that a JSON says besides is kept. Captions are found as in training, see `shards`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.layout import Source

if TYPE_CHECKING:
    from flap_fast.data.shards import Shards

_OURS = ("text", "tag", "id", "original_data", "captionless")


def read(folder: Path) -> list[Entry]:
    """The clips of all shards, split by split.

    Raises:
        ManifestError: no shards, or shards of log-mels.
        ShardError: a shard that is not whole.
    """
    from flap_fast.data.shards import KINDS, open_shards

    entries: list[Entry] = []
    for split in _splits(folder):
        shards = open_shards([split], tuple(KINDS))
        if shards.kind == "mels":
            raise ManifestError(
                f"shards to prepare must hold sounds or images, got log-mels in '{split}'"
            )
        first = len(entries) + 1
        entries += (
            _entry(shards, clip, split.resolve().name, first + clip) for clip in range(len(shards))
        )
    return entries


def _splits(folder: Path) -> list[Path]:
    from flap_fast.data.tar_members import tars_of

    if tars_of(folder)[0]:
        return [folder]
    splits = sorted({file.parent for file in folder.glob("*/*.tar")})
    if not splits:
        raise ManifestError(f"shards must be '{folder}/SPLIT/*.tar' or '{folder}/*.tar', got none")
    return splits


def _entry(shards: Shards, clip: int, split: str, line: int) -> Entry:
    from flap_fast.data.preprocess.unusable import Unusable

    file, at, size, _, _ = shards.locations[clip].tolist()
    fault = ""
    try:
        record = shards.record(clip, captionless=True)
    except Unusable as error:
        record, fault = {"text": []}, f"unreadable: {error}"
    return Entry(
        line=line,
        audio=shards.files[file],
        id=str(record.get("id") or f"{shards.files[file].stem}@{at}"),
        split=split,
        inside=(at, size),
        fault=fault,
        **described(record),
    )


def described(record: dict[str, Any]) -> dict[str, Any]:
    """What a clip's JSON says, as fields of `Entry`; its `text` is a list of captions."""
    from flap_fast.data.shards import texts_of

    original = record.get("original_data")
    return {
        "captions": record["text"],
        "labels": texts_of(record.get("tag")),
        "original": original if isinstance(original, dict) else {},
        "captionless": record.get("captionless") is True,
        "more": {name: value for name, value in record.items() if name not in _OURS},
    }


SHARDS = Source(
    name="shards",
    kind="sounds or images",
    folder="SPLIT/*.tar: LAION's, img2dataset's or ours, to another rate or into a cache",
    splits="the folders' names",
    read=read,
)
