"""Captions to enrich, from shards or a manifest; only training data is accepted."""

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

# Names of splits for evaluation.
EVALUATION = {"val", "valid", "validate", "validation", "eval", "evaluation"}
EVALUATION |= {"dev", "devtest", "test", "testing"}


@dataclass(frozen=True)
class Clip:
    """A clip with captions."""

    id: str
    captions: list[str]
    read: Callable[[int], np.ndarray]
    """Returns the waveform at a sample rate; raises `BadSound`."""


@dataclass(frozen=True)
class Source:
    """Clips to enrich, in the order of the shards or the manifest."""

    clips: list[Clip]
    left: int
    """Captions of the manifest's other splits, which are not enriched."""

    @property
    def captions(self) -> int:
        """The number of captions to enrich."""
        return sum(len(clip.captions) for clip in self.clips)

    def first(self, captions: int | None) -> Source:
        """Return the clips of the first `captions` captions, or all for None."""
        if captions is None:
            return self
        clips: list[Clip] = []
        for clip in self.clips:
            if captions <= 0:
                break
            clips.append(replace(clip, captions=clip.captions[:captions]))
            captions -= len(clip.captions)
        return replace(self, clips=clips)


def open_source(path: Path, split: str = "train") -> Source:
    """Open a manifest's split, a folder of shards, or its subfolder SPLIT.

    Raises:
        ConfigError: the split or folder is for evaluation, or has no captions.
        ManifestError, ShardError: the source cannot be read.
    """
    _refuse_evaluation("--split", split)
    if path.is_dir():
        folder = path if any(path.glob("*.tar")) else path / split
        rule = "be a manifest, a folder of shards, or one that holds --split"
        require(folder.is_dir(), "SOURCE", rule, path, f"there is no folder '{folder}'")
        _refuse_evaluation("the folder's name", folder.resolve().name)
        source = Source(list(_of_shards(folder)), 0)
    else:
        entries = read_manifest(path)
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
        others = sum(len(entry.captions) for entry in entries if entry.split != split)
        source = Source(clips, others)
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
            return read_sound(shards.sound(clip), rate)

        yield Clip(name, record["text"], read)


def _refuse_evaluation(name: str, value: str) -> None:
    rule = "be for training: captions for evaluation must not change"
    words = re.split(r"[^a-z]+", value.casefold())  # my_val, test2
    require(EVALUATION.isdisjoint(words), name, rule, value)
