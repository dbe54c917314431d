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
from flap_fast.data.cached import check_front_end
from flap_fast.data.captions import Tokenizer
from flap_fast.data.decode import Decode, Encoded, as_log_mel, decoder, log_mels, to_device
from flap_fast.data.draws import Stream, uniforms
from flap_fast.data.mel import kaldi_log_mel, normalise
from flap_fast.data.order import Order
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.sound import BadSound, crop_positions
from flap_fast.ranks import Ranks

_TRIES = 100


@dataclass
class _Share:
    """A rank's clips of one (micro-)batch while their sounds are being decoded."""

    step: int
    visits: Tensor
    clips: np.ndarray
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
        self.order = Order(shards.place[:, 0], batch, config.run.seed, config.data.shuffle_shards)
        self.bad: list[BadClip] = []
        self._config, self._shards, self._tokenizer, self._ranks = config, shards, tokenizer, ranks
        self._micro_batches = config.train.micro_batches(ranks.world)
        self._clips = batch // ranks.world // self._micro_batches
        self._mel = kaldi_log_mel(config.audio, ranks.device)
        self._decode = readable(shards, config)

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

        mels = log_mels(
            encoded(),
            audio=self._config.audio,
            frontend=self._config.frontend,
            batch=self._clips,
            device=self._ranks.device,
            mel=self._mel,
            local_ranks=self._ranks.local_world,
            shards=self._shards.kind,
        )
        for _ in product(*orders):
            try:
                mel = next(mels)
            except BadSound as error:
                mel = self._repair(pending[0], error)
            yield self._batch(pending.popleft(), mel)

    def _read(self, step: int, part: int, *, again: bool) -> _Share:
        """What the tars hold of a part of a step; clips that lack something replaced."""
        before = self._ranks.rank * self._micro_batches + part
        rows = np.arange(self._clips) + before * self._clips
        visits = torch.from_numpy(rows + step * self._config.train.global_batch)
        seed = self._config.run.seed
        share = _Share(
            step=step,
            visits=visits,
            clips=self.order.clips(step)[rows],
            where=uniforms(seed, Stream.CROP, visits, 1)[:, 0].numpy(),
            captions=[],
            sounds=[],
            again=again,
        )
        which = uniforms(seed, Stream.CAPTION, visits, 1)[:, 0].tolist()
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
                texts, sound = self._shards.record(clip)["text"], self._shards.sound(clip)
                if check:
                    self._decode(sound, 0.0, self._config.audio)
            except BadSound as reason:
                why = why or str(reason)
                if replace:
                    continue
                break
            if clip != wanted:
                share.clips[row] = clip
                names = self._shards.name(wanted), self._shards.name(clip)
                if not share.again:
                    self.bad.append(BadClip(share.step, names[0], why, names[1]))
            return texts, sound
        remedy = "data.on_bad_clip=replace takes the next one"
        after = f"nor can the {_TRIES - 1} clips after it" if replace else remedy
        raise ShardError(f"{self._shards.name(wanted)} cannot be used ({why}); {after}")

    def _repair(self, share: _Share, error: BadSound) -> Tensor:
        """The log-mels of a share with a clip that cannot be decoded, that clip replaced."""
        before = share.clips.copy()
        which = uniforms(self._config.run.seed, Stream.CAPTION, share.visits, 1)[:, 0].tolist()
        for row in range(len(share.clips)):
            texts, share.sounds[row] = self._usable(share, row, check=True)
            if share.clips[row] != before[row]:
                share.captions[row] = texts[int(which[row] * len(texts))]
        if (share.clips == before).all():
            raise ShardError(
                f"step {share.step}: {error}, though libsndfile reads each of its clips, the first "
                f"of them {self._shards.name(int(before[0]))}; set frontend.backend=torch"
            ) from error
        audio = self._config.audio
        pairs = zip(share.sounds, share.where, strict=True)
        decoded = np.stack([self._decode(sound, float(where), audio) for sound, where in pairs])
        return as_log_mel(torch.from_numpy(decoded), self._mel, self._ranks.device)

    def _batch(self, share: _Share, mel: Tensor) -> Batch:
        device = self._ranks.device
        ids, attention_mask = self._tokenizer(share.captions)
        return Batch(
            mel=normalise(mel, self._config.audio)[:, None],
            ids=to_device(ids, device),
            attention_mask=attention_mask.pin_memory() if device.type == "cuda" else attention_mask,
            visits=to_device(share.visits, device),
            clips=share.clips,
            epoch=self.order.epoch(share.step),
        )


def readable(shards: Shards, config: Config) -> Decode:
    """How a clip of the shards is read; `ConfigError` where log-mels were cached otherwise."""
    if shards.kind == "mels":
        check_front_end([file.parent for file in shards.files], config.audio)
    return decoder(shards.kind)


def evaluation_mels(
    config: Config, shards: Shards, clips: np.ndarray, ranks: Ranks
) -> Iterator[Tensor]:
    """(<= eval.batch, 1, T, F) normalised log-mels of the clips named, in their order.

    Under eval.crop = multi:K each clip gives K of them in a row.

    Raises:
        ShardError: a clip that cannot be decoded; evaluation leaves nothing out.
    """
    readable(shards, config)
    size, crops = config.eval.batch, config.eval.crops
    positions = np.tile(crop_positions(crops), len(clips))
    clips = np.repeat(clips, crops)
    starts = range(0, len(clips), size)

    def encoded() -> Iterator[Encoded]:
        for start in starts:
            some = clips[start : start + size]
            where = positions[start : start + size]
            if config.eval.crop == "random":
                where = uniforms(0, Stream.EVAL_CROP, torch.from_numpy(some), 1)[:, 0].numpy()
            yield [shards.sound(clip) for clip in some], where

    mels = log_mels(
        encoded(),
        audio=config.audio,
        frontend=config.frontend,
        batch=size,
        device=ranks.device,
        mel=kaldi_log_mel(config.audio, ranks.device),
        local_ranks=ranks.local_world,
        shards=shards.kind,
    )
    for start in starts:
        try:
            mel = next(mels)
        except BadSound as error:
            some = np.unique(clips[start : start + size])
            names = ", ".join(_undecodable(shards, some, config))
            raise ShardError(f"cannot be decoded: {names or error}; prepare it again") from None
        yield normalise(mel, config.audio)[:, None]


def _undecodable(shards: Shards, clips: np.ndarray, config: Config) -> Iterator[str]:
    for clip in clips:
        try:
            decoder(shards.kind)(shards.sound(clip), 0.0, config.audio)
        except BadSound as why:
            yield f"{shards.name(clip)} ({why})"
