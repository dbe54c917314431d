"""Shards -> training batches and evaluation log-mels, in an order that only the seed decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import BadClip, Batch
from flap_fast.data.enriched import CaptionChoice, clip_id, text_key
from flap_fast.data.preprocess.decode import Encoded
from flap_fast.data.preprocess.front_end import MediaInput, to_device
from flap_fast.data.preprocess.fusion import PIECES
from flap_fast.data.preprocess.preprocessors import AudioPreprocessor, ImagePreprocessor, sense
from flap_fast.data.preprocess.waveform import Unusable, crop_positions
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.sampler import Sampler
from flap_fast.data.sentences import Sentences
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.ranks import Ranks

_TRIES = 100


@dataclass
class _Share:
    """A rank's clips of one (micro-)batch while their sounds are being decoded."""

    step: int
    sample_index: Tensor
    clips: np.ndarray
    richer: np.ndarray
    """(B,) whether a row reads the captions of `flap enrich`."""
    where: np.ndarray
    captions: list[str]
    sounds: list[bytes]
    again: bool
    """Read before: what is wrong with it has been reported."""


class TrainingLoader:
    """A rank's share of each training step, one micro-batch after the other.

    `bad` collects the clips that could not be used since it was last emptied.
    """

    def __init__(self, config: Config, shards: Shards, tokenizer: Tokenizer, ranks: Ranks):
        batch = config.train.global_batch
        self._choice = CaptionChoice(config.data, shards)
        self.order = Sampler(self._choice.files, batch, config.run.seed, config.data.shuffle_shards)
        self.bad: list[BadClip] = []
        self._sentences = Sentences(config)
        self._config, self._shards, self._tokenizer, self._ranks = config, shards, tokenizer, ranks
        self._micro_batches = config.train.micro_batches(ranks.world)
        self._clips = batch // ranks.world // self._micro_batches
        self._sense = sense(config, ranks, shards)

    def batches(self, first: int, last: int, *, times: int = 1) -> Iterator[Batch]:
        """The (micro-)batches of steps `first` up to, not including, `last`.

        Args:
            times: how often those of a step come, all of them before they come again.
        """
        orders = range(first, last), range(times), range(self._micro_batches)
        pending: deque[_Share] = deque()

        def encoded() -> Iterator[Encoded]:
            for step, time, part in product(*orders):
                share = self._read(step, part, again=time > 0)
                pending.append(share)
                yield share.sounds, share.where

        mels = self._sense.stream(encoded(), self._clips)
        for _ in product(*orders):
            try:
                heard = next(mels)
            except Unusable as error:
                heard = self._repair(pending[0], error)
            yield self._batch(pending.popleft(), heard)

    def _read(self, step: int, part: int, *, again: bool) -> _Share:
        """What the tars hold of a part of a step; clips that lack something replaced."""
        before = self._ranks.rank * self._micro_batches + part
        rows = np.arange(self._clips) + before * self._clips
        sample_index = torch.from_numpy(rows + step * self._config.train.global_batch)
        seed = self._config.run.seed
        which, mixed = uniforms(seed, Stream.CAPTION, sample_index, 2).T.tolist()
        clips, richer = self._choice.clips(self.order.clips(step)[rows], mixed)
        share = _Share(
            step=step,
            sample_index=sample_index,
            clips=clips,
            richer=richer,
            where=uniforms(seed, Stream.CROP, sample_index, 1 + PIECES).numpy(),
            captions=[],
            sounds=[],
            again=again,
        )
        for row in range(self._clips):
            texts, sound = self._usable(share, row, check=False)
            share.captions.append(texts[int(which[row] * len(texts))])
            share.sounds.append(sound)
        return share

    def _usable(self, share: _Share, row: int, *, check: bool) -> tuple[list[str], bytes]:
        """The captions and the sound of a row's clip, or of the next clip that has both."""
        wanted, why = int(share.clips[row]), ""
        replace = self._config.data.on_bad_clip == "replace"
        for ahead in range(_TRIES):
            clip = (wanted + ahead) % len(self._shards)
            try:
                record, sound = self._shards.record(clip), self._shards.sound(clip)
                if check:
                    self._sense.check(sound)
            except Unusable as reason:
                why = why or str(reason)
                if replace:
                    continue
                break
            if clip != wanted:
                share.clips[row] = clip
                names = self._shards.name(wanted), self._shards.name(clip)
                if not share.again:
                    self.bad.append(BadClip(share.step, names[0], why, names[1]))
            return self._choice.texts(clip, record, richer=bool(share.richer[row])), sound
        remedy = "data.on_bad_clip=replace takes the next one"
        after = f"nor can the {_TRIES - 1} clips after it" if replace else remedy
        raise ShardError(f"{self._shards.name(wanted)} cannot be used ({why}); {after}")

    def _repair(self, share: _Share, error: Unusable) -> MediaInput:
        """The log-mels of a share with a clip that cannot be decoded, that clip replaced."""
        before = share.clips.copy()
        which = uniforms(self._config.run.seed, Stream.CAPTION, share.sample_index, 1)[
            :, 0
        ].tolist()
        for row in range(len(share.clips)):
            texts, share.sounds[row] = self._usable(share, row, check=True)
            if share.clips[row] != before[row]:
                share.captions[row] = texts[int(which[row] * len(texts))]
        if (share.clips == before).all():
            raise ShardError(
                f"step {share.step}: {error}, though each of its clips can be read, the first of "
                f"them {self._shards.name(int(before[0]))}; set frontend.backend=torch"
            ) from error
        return self._sense.together(share.sounds, share.where)

    def _batch(self, share: _Share, heard: MediaInput) -> Batch:
        device = self._ranks.device
        rows = share.sample_index.numpy() - share.step * self._config.train.global_batch
        texts = self._sentences(share.step, rows, share.captions)
        ids, attention_mask = self._tokenizer(texts)
        return Batch(
            media=self._sense.finish(heard).media,
            ids=to_device(ids, device),
            attention_mask=attention_mask.pin_memory() if device.type == "cuda" else attention_mask,
            sample_index=to_device(share.sample_index, device),
            clips=share.clips,
            epoch=self.order.epoch(share.step),
            longer=self._one_at_least(heard.longer, share.sample_index),
        )

    def _one_at_least(self, longer: Tensor | None, sample_index: Tensor) -> Tensor | None:
        """With fusion.force_one, one of the clips where none is longer, drawn for this step."""
        if longer is None or longer.any() or not self._config.fusion.force_one:
            return longer
        draws = uniforms(self._config.run.seed, Stream.CROP, sample_index, 2 + PIECES)[:, -1]
        return longer.index_fill(0, draws.argmin(), True)


def evaluation_mels(
    config: Config, shards: Shards, clips: np.ndarray, ranks: Ranks
) -> Iterator[MediaInput]:
    """What the tower is fed with of the clips named, in their order, at most eval.batch at a time.

    Under eval.crop = multi:K each clip gives K of them in a row.

    Raises:
        ShardError: a clip that cannot be decoded; evaluation leaves nothing out.
    """
    size, crops = config.eval.batch, config.eval.crops
    positions = np.tile(crop_positions(crops), len(clips))
    clips = np.repeat(clips, crops)
    starts = range(0, len(clips), size)

    def encoded() -> Iterator[Encoded]:
        for start in starts:
            some = clips[start : start + size]
            where = np.full((len(some), 1 + PIECES), 0.5)
            where[:, 0] = positions[start : start + size]
            if config.eval.crop == "random":
                keys = torch.tensor([_crop_key(shards, clip) for clip in some])
                where = uniforms(0, Stream.EVAL_CROP, keys, 1 + PIECES).numpy()
            yield [shards.sound(clip) for clip in some], where

    front = sense(config, ranks, shards)
    mels = front.stream(encoded(), size)
    for start in starts:
        try:
            heard = next(mels)
        except Unusable as error:
            some = np.unique(clips[start : start + size])
            names = ", ".join(_undecodable(shards, some, front))
            remedy = "delete the tar and run the same flap prepare again"
            raise ShardError(f"cannot be decoded: {names or error}; {remedy}") from None
        yield front.finish(heard)


def _crop_key(shards: Shards, clip: int) -> int:
    """By the id, so that a clip has the same crop whichever others are evaluated with it."""
    return text_key(clip_id(shards, clip, shards.record(clip, captionless=True)))


def _undecodable(
    shards: Shards, clips: np.ndarray, front: AudioPreprocessor | ImagePreprocessor
) -> Iterator[str]:
    for clip in clips:
        try:
            front.check(shards.sound(clip))
        except Unusable as why:
            yield f"{shards.name(clip)} ({why})"
