"""Enriched captions from captions.jsonl, which `flap enrich` writes, and the choice of captions.

    FOLDER/captions.jsonl     {"id": ..., "original": ..., "caption": ..., ...}, a line each

`caption` is the text to train on: the enriched one, or the original where that was kept. Evaluation
never opens the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checks import ConfigError, require
from flap_fast.config import Data
from flap_fast.data.mixing import Part, mixture
from flap_fast.data.shards import ShardError, Shards
from flap_fast.files import read_rows, whole_characters
from flap_fast.places import Place, shown

FILE = "captions.jsonl"


def caption_key(clip: str, original: str) -> int:
    """A 63-bit key of one caption of one clip."""
    return text_key(f"{clip}\0{original}")


def text_key(text: str) -> int:
    """A 63-bit key of a text."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def clip_id(shards: Shards, clip: int, record: dict[str, Any]) -> str:
    """A clip's `id`; where its record has none, its file and offset: `0.tar@512`."""
    file, offset, *_ = shards.locations[clip].tolist()
    return str(record.get("id") or f"{shards.files[file].name}@{offset}")


class CaptionChoice:
    """Chooses between a clip's own captions and its enriched ones.

    Under `concat` a clip of a folder with enriched captions is two samples of an epoch. Clips of a
    folder without captions.jsonl keep their own. Sets with weights have more samples, or fewer.

    Raises:
        ConfigError: no captions.jsonl where enriched captions are asked for, or a line of one that
            is no caption; a set so small that an epoch takes no clip of it.
    """

    def __init__(self, settings: Data, shards: Shards):
        self._settings, self._shards = settings, shards
        self._captions: dict[Place, dict[int, str]] = {}
        files = shards.locations[:, 0]
        self._clips = np.arange(len(shards))
        self.files = files
        """(S,) int64: shard of each of S samples, ascending; copies have their own."""
        self.parts: tuple[Part, ...] = ()
        """Samples of which an epoch takes some; it takes all others."""
        if settings.captions != "original":
            self._add_enriched()
        self._enriched = np.arange(len(self.files)) >= len(shards)
        if shards.sets:
            clip_files = files[self._clips]
            base, self.files, self.parts = mixture(shards.sets, clip_files, self.files)
            self._clips, self._enriched = self._clips[base], self._enriched[base]

    def _add_enriched(self) -> None:
        settings, shards, files = self._settings, self._shards, self.files
        folders = {file.parent for file in shards.files}
        found = {folder: shards.beside(folder, FILE) for folder in folders}
        self._captions = {folder: _read(file) for folder, file in found.items() if file}
        rule = f"be 'original' where no folder of data.train has a {FILE}"
        remedy = "write it with: flap enrich FOLDER FOLDER --model MODEL (none asks no model)"
        require(bool(self._captions), "data.captions", rule, settings.captions, remedy)
        if settings.captions == "concat":
            enriched = np.array([file.parent in self._captions for file in shards.files])
            copies = np.flatnonzero(enriched[files])
            self._clips = np.concatenate([self._clips, copies])
            self.files = np.concatenate([files, files[copies] + len(shards.files)])

    def clips(self, samples: np.ndarray, u: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """The (B,) clips of (B,) samples, and (B,) whether each takes enriched captions.

        Args:
            u: a number in [0, 1) for each, for data.captions = mix.
        """
        mode = self._settings.captions
        enriched = {
            "original": np.zeros(len(samples), bool),
            "replace": np.ones(len(samples), bool),
            "mix": np.asarray(u) < self._settings.enriched_ratio,
            "concat": self._enriched[samples],
        }[mode]
        return self._clips[samples], enriched

    def texts(self, clip: int, record: dict[str, Any], *, enriched: bool) -> list[str]:
        """The captions of a clip, in the record's order; its own without captions.jsonl.

        Raises:
            ShardError: captions.jsonl lacks one of them.
        """
        folder = self._shards.folder(clip)
        if not enriched or folder not in self._captions:
            return record["text"]
        captions, name = self._captions[folder], clip_id(self._shards, clip, record)
        try:
            return [captions[caption_key(name, text)] for text in record["text"]]
        except KeyError:
            raise ShardError(
                f"{shown(folder / FILE)} has no line for each caption of '{name}': was it written "
                f"for other shards? Write it with: flap enrich {shown(folder)} {shown(folder)} "
                "--model MODEL"
            ) from None


def _read(file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for number, row in read_rows(file):
        try:
            key = caption_key(str(row["id"]), row["original"])
            found[key] = whole_characters(str(row["caption"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}:{number} must hold id, original and caption: {error!r}; "
                "write it again with flap enrich"
            ) from None
    return found
