"""AudioSetCaps: 6,117,099 clips of 10 s of three origins, one caption each; one split, `train`.

    FOLDER/**/AudioSetCaps_caption.csv               id,caption    id: Y and YouTube's id
    FOLDER/**/VGGSound_AudioSetCaps_caption.csv                    YouTube's id_000030, the start
    FOLDER/**/YouTube-8M_AudioSetCaps_caption.csv                  YouTube's id_30_10, start, length
    FOLDER/**/*.wav (or flac, mp3, ...)              called by id, with or without a Y before it

Any of the three may be absent. Questions and answers, `*_Q&A.csv`, are not read. The evaluation
sets of AudioSet and VGGSound are among the clips, as the authors say.

Source: Bai et al., "AudioSetCaps", arXiv 2411.18953; read were the authors' data card, the listing
of their files on the Hugging Face Hub, and others' code for these files.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.layout import Clips, Source, tables_below

_FILES = tuple(f"{origin}AudioSetCaps_caption.csv" for origin in ("", "VGGSound_", "YouTube-8M_"))


def read(folder: Path) -> list[Entry]:
    """The clips of all origins whose CSV exists; raises `ManifestError` as `tables_below`."""
    tables = tables_below(folder, _FILES, "AudioSetCaps")
    return collect(_rows([*tables.values()], Clips(folder)), folder, str(folder))


def _rows(tables: list[Path], clips: Clips) -> Iterator[Row]:
    numbers = count(1)  # not lines: the files are of one split, and have the same
    for file in tables:
        for _, clip in clips.captioned(file, "id"):
            yield file, next(numbers), clip


AUDIOSETCAPS = Source(
    name="audiosetcaps",
    kind="sounds",
    folder="Dataset/*AudioSetCaps_caption.csv; sounds anywhere, called by id",
    splits="train",
    read=read,
)
