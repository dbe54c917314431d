"""Published data sets -> clips, one reader a layout: `SOURCES[name](folder)`.

A reader gives the clips that the data set lists, in its order and under its own split names,
whether their files are there or not: `prepare` counts and lists those that are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.audiocaps import audiocaps
from flap_fast.preparation.sources.cc3m import cc3m
from flap_fast.preparation.sources.clotho import clotho
from flap_fast.preparation.sources.coco import coco
from flap_fast.preparation.sources.esc50 import esc50
from flap_fast.preparation.sources.flickr30k import flickr30k
from flap_fast.preparation.sources.folder import folder
from flap_fast.preparation.sources.musiccaps import musiccaps, musiccaps_by_name
from flap_fast.preparation.sources.nli import Triples, nli
from flap_fast.preparation.sources.tars import tars
from flap_fast.preparation.sources.urbansound8k import urbansound8k

SOURCES: dict[str, Callable[[Path], list[Entry]]] = {
    "audiocaps": audiocaps,
    "clotho": clotho,
    "musiccaps": musiccaps,
    "musiccaps-by-name": musiccaps_by_name,
    "esc50": esc50,
    "urbansound8k": urbansound8k,
    "folder": folder,
    "shards": tars,
    "cc3m": cc3m,
    "coco": coco,
    "flickr30k": flickr30k,
}

# Of sentences alone; `flap prepare` writes them as OUT/SPLIT.jsonl.
SENTENCES: dict[str, Callable[[Path], Triples]] = {"nli": nli}
