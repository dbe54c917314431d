"""Shards -> the encoder's input of evaluation's clips, in crops, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flap_fast.config import Config
from flap_fast.data.batch import EncodedBatch, MediaInput
from flap_fast.data.enriched import clip_id, text_key
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.preprocess.fusion import PIECES
from flap_fast.data.preprocess.preprocessor import Preprocessor, make_preprocessor
from flap_fast.data.preprocess.waveform import Unusable, crop_positions, window_counts
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.read_ahead import reading_in_order
from flap_fast.data.shards import ShardError, Shards
from flap_fast.places import Place
from flap_fast.ranks import Ranks


class Crops(NamedTuple):
    """The crops of clips that evaluation embeds, those of a clip in a row."""

    clips: np.ndarray
    """(R,) int64: the clip of each."""
    positions: np.ndarray
    """(R,) float64 in [0, 1): where they lie in it."""

    def take(self, rows: np.ndarray) -> Crops:
        """Some of them."""
        return Crops(self.clips[rows], self.positions[rows])


def crops_of(config: Config, shards: Shards, ranks: Ranks) -> Crops:
    """The crops of all clips: one, K, or as many as cover it, as eval.crop says. Collective."""
    counts = np.full(len(shards), config.eval.crops)
    if config.eval.crop == "whole":
        audio = config.audio
        longest_s = config.fusion.longest(audio) / audio.sample_rate_hz
        counts = window_counts(clip_seconds(shards, ranks) / longest_s)
    positions = [crop_positions(int(count)) for count in counts]
    return Crops(np.repeat(np.arange(len(shards)), counts), np.concatenate(positions))


def evaluation_batches(
    config: Config, shards: Shards, crops: Crops, ranks: Ranks
) -> Iterator[MediaInput]:
    """The encoder's input of these crops in their order, at most eval.batch at a time.

    Raises:
        ShardError: a clip that cannot be decoded; evaluation leaves nothing out.
    """
    size, clips = config.eval.batch, crops.clips
    starts = range(0, len(clips), size)

    def encoded(start: int) -> EncodedBatch:
        some = clips[start : start + size]
        reached(int(some.min()))
        positions = np.full((len(some), 1 + PIECES), 0.5)
        positions[:, 0] = crops.positions[start : start + size]
        if config.eval.crop == "random":
            keys = torch.tensor([_crop_key(shards, clip) for clip in some])
            positions = uniforms(0, Stream.EVAL_CROP, keys, 1 + PIECES).numpy()
        read = {clip: shards.encoded(clip) for clip in np.unique(some).tolist()}
        return EncodedBatch([read[clip] for clip in some.tolist()], positions)

    preprocessor = make_preprocessor(_decoded_in_windows(config), ranks, shards)
    with reading_in_order(shards, np.unique(clips)) as reached:
        inputs = preprocessor.stream(map(encoded, starts), size)
        for start in starts:
            try:
                media = next(inputs)
            except Unusable:
                some = np.unique(clips[start : start + size])
                if names := ", ".join(_undecodable(shards, some, preprocessor)):
                    remedy = remedy_of(shards.folder(int(some[0])))
                    raise ShardError(f"cannot be decoded: {names}; {remedy}") from None
                # Of what DALI cannot decode, and the reference can.
                media = preprocessor.decode(*encoded(start)[:2])
            yield media


def remedy_of(folder: Place) -> str:
    """What to do about clips of a folder's shards that cannot be decoded."""
    if isinstance(folder, Path) and (folder.parent / ".prepare").is_dir():
        return "delete the tar and run the same flap prepare again"
    return "leave out what cannot be used: flap prepare --source shards FOLDER OUT"


def _decoded_in_windows(config: Config) -> Config:
    """The config with the decoder that reads of a clip what a window needs; DALI decodes all of it.

    A batch would then hold a recording once for each of its windows. `dali_mel` stays: its log-mels
    are others.
    """
    if config.eval.crop != "whole" or config.frontend.backend == "dali_mel":
        return config
    frontend = config.frontend.model_copy(update={"backend": "torch"})
    return config.model_copy(update={"frontend": frontend})


def _crop_key(shards: Shards, clip: int) -> int:
    """The key of a clip's random crop: its id, the same whichever others are evaluated with it."""
    return text_key(clip_id(shards, clip, shards.record(clip, captionless=True)))


def _undecodable(shards: Shards, clips: np.ndarray, preprocessor: Preprocessor) -> Iterator[str]:
    """Name and fault of each clip that cannot be decoded."""
    for clip in clips:
        try:
            preprocessor.check(shards.encoded(clip))
        except Unusable as why:
            yield f"{shards.name(clip)} ({why})"
