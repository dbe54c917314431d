"""MusicCaps: 10 s clips of YouTube's music, one caption each.

    FOLDER/musiccaps-public.csv        ytid,start_s,end_s,...,aspect_list,caption,...,
                                       is_balanced_subset,is_audioset_eval
    FOLDER/**/*.wav (or flac, ...)     called by ytid, or with the start

The language-encoder paper trains on 2,858 clips and validates on 2,663; by these counts `train` is
what comes from AudioSet's *evaluation* set. `musiccaps-by-name` has it the other way
round, as the names say.

Source: Agostinelli et al., "MusicLM: Generating Music From Text", arXiv 2301.11325.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Clips, Source, first_file, table

_COLUMNS = ("ytid", "start_s", "end_s", "aspect_list", "caption", "is_audioset_eval")


def read(folder: Path) -> list[Entry]:
    """All clips, split as the language-encoder paper counts them; `ManifestError` without CSV."""
    return _entries(folder, {True: "train", False: "val"})


def read_by_name(folder: Path) -> list[Entry]:
    """All clips, AudioSet's evaluation clips as `val`; raises `ManifestError` without the CSV."""
    return _entries(folder, {False: "train", True: "val"})


def _entries(folder: Path, splits: dict[bool, str]) -> list[Entry]:
    file = first_file(folder, ("musiccaps-public.csv", "musiccaps.csv"), "MusicCaps")
    return collect(_rows(file, Clips(folder), splits), folder, str(file))


def _rows(file: Path, clips: Clips, splits: dict[bool, str]) -> Iterator[Row]:
    for line, row in table(file, _COLUMNS):
        try:
            start_s, end_s = float(row["start_s"]), float(row["end_s"])
            evaluation = {"true": True, "false": False}[str(row["is_audioset_eval"]).lower()]
        except (KeyError, ValueError):
            raise ManifestError(
                f"{file}:{line}: start_s and end_s must be seconds, is_audioset_eval True or False"
            ) from None
        clip = {
            **clips.row(row["ytid"], start_s, end_s, ()),
            "captions": [row["caption"]],
            "id": row["ytid"],
            "split": splits[evaluation],
            "aspect_list": row["aspect_list"],
        }
        yield file, line, clip


MUSICCAPS = Source(
    name="musiccaps",
    kind="sounds",
    folder="musiccaps-public.csv; sounds anywhere",
    splits="train, val by the paper's counts",
    read=read,
)


MUSICCAPS_BY_NAME = Source(
    name="musiccaps-by-name",
    kind="sounds",
    folder="the same",
    splits="train, val by AudioSet's names: the other way round",
    read=read_by_name,
)
