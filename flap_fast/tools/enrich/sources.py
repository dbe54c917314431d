"""The captions that may be enriched: of shards or of a manifest, of training alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from flap_fast.checks import ConfigError, require
from flap_fast.data.enriched import clip_id
from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import open_shards
from flap_fast.preparation.manifest import read_manifest

# What data sets call the splits that models are scored on.
EVALUATION = {"val", "valid", "validate", "validation", "eval", "evaluation"}
EVALUATION |= {"dev", "devtest", "test", "testing"}


@dataclass(frozen=True)
class Clip:
    """A clip with captions."""

    id: str
    captions: list[str]
    read: Callable[[int], np.ndarray]
    """Its waveform at a rate; raises `BadSound`."""


@dataclass(frozen=True)
class Source:
    """Clips to enrich, in the order of the shards or of the manifest."""

    clips: list[Clip]
    left: int
    """Captions of the manifest's other splits, which stay as they are."""

    @property
    def captions(self) -> int:
        """How many there are to enrich."""
        return sum(len(clip.captions) for clip in self.clips)

    def first(self, captions: int | None) -> Source:
        """The clips of the first so many captions; all of them for None."""
        if captions is None:
            return self
        clips: list[Clip] = []
        for clip in self.clips:
            if captions <= 0:
                break
            clips.append(replace(clip, captions=clip.captions[:captions]))
            captions -= len(clip.captions)
        return replace(self, clips=clips)


def open_source(place: Path, split: str = "train") -> Source:
    """The clips of a manifest's split, of a folder of shards, or of its subfolder SPLIT.

    Raises:
        ConfigError: the split or the folder is one for evaluation, or has no captions.
        ManifestError, ShardError: it cannot be read.
    """
    _refuse_evaluation("--split", split)
    if place.is_dir():
        folder = place if any(place.glob("*.tar")) else place / split
        rule = "be a manifest, a folder of shards, or one that holds --split"
        require(folder.is_dir(), "SOURCE", rule, place, f"there is no folder '{folder}'")
        _refuse_evaluation("the folder's name", folder.resolve().name)
        source = Source(list(_of_shards(folder)), 0)
    else:
        entries = read_manifest(place)
        chosen = [entry for entry in entries if entry.split == split]
        clips = [
            Clip(
                entry.id,
                entry.captions,
                partial(
                    read_sound, entry.audio, start_s=entry.start_s, duration_s=entry.duration_s
                ),
            )
            for entry in chosen
            if entry.captions
        ]
        left = sum(len(entry.captions) for entry in entries if entry.split != split)
        source = Source(clips, left)
    require(bool(source.clips), "SOURCE", f"hold captions of the split '{split}'", "none")
    return source


def _of_shards(folder: Path) -> Iterator[Clip]:
    shards = open_shards([folder])
    seen: set[str] = set()
    for clip in range(len(shards)):
        record = shards.record(clip, captionless=True)
        if not record["text"]:
            continue
        name = clip_id(shards, clip, record)
        if name in seen:
            raise ConfigError(f"{folder} must name each clip once, got the id '{name}' twice")
        seen.add(name)

        def read(rate: int, clip: int = clip) -> np.ndarray:
            return read_sound(shards.encoded(clip), rate)

        yield Clip(name, record["text"], read)


def _refuse_evaluation(name: str, value: str) -> None:
    rule = "be of training: captions that models are scored on stay as they are"
    words = re.split(r"[^a-z]+", value.casefold())  # my_val, test2
    require(EVALUATION.isdisjoint(words), name, rule, value)
