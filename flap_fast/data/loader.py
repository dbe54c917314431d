"""Shards -> training batches, in an order that depends only on the seed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import BadClip, Batch, EncodedBatch, MediaInput, to_device
from flap_fast.data.dealing import ClipTokens, Dealt, dealt_equally, dealt_in_order
from flap_fast.data.enriched import CaptionChoice
from flap_fast.data.negatives import Negatives
from flap_fast.data.pair_ids import pair_ids
from flap_fast.data.preprocess.fusion import PIECES
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.read_ahead import ReadAhead, check_room, in_order_of_steps
from flap_fast.data.sampler import Sampler
from flap_fast.data.sentences import Sentences
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.ranks import Ranks

# How many clips in a row are tried for one that can be used.
_TRIES = 100


@dataclass
class _PendingBatch:
    """A micro-batch whose clips are being decoded."""

    step: int
    sample_index: Tensor
    clips: np.ndarray
    enriched: np.ndarray
    """(B,) bool, whether a row takes enriched captions."""
    caption_u: list[float]
    """(B,) in [0, 1): which of a clip's captions a row takes."""
    positions: np.ndarray
    captions: list[str]
    negative_u: list[list[float]]
    """(B, n) in [0, 1): which of a clip's negatives a row takes."""
    negatives: list[list[str]]
    """(B, n)"""
    encoded: list[bytes]
    micro_batches: int
    repeated: bool
    """Read before: its bad clips have been reported."""


class TrainingLoader:
    """A rank's micro-batches of each training step.

    `bad` collects the clips that could not be used; the caller empties it.

    Args:
        tokens: of clips of different lengths, which ranks and micro-batches get equal work of; None
            deals clips in order.
    """

    def __init__(
        self,
        config: Config,
        shards: Shards,
        tokenizer: Tokenizer,
        ranks: Ranks,
        tokens: ClipTokens | None = None,
    ):
        train, seed = config.train, config.run.seed
        self._choice = CaptionChoice(config.data, shards)
        self.sampler = Sampler(
            self._choice.files,
            train.global_batch,
            seed,
            config.data.shuffle_shards,
            parts=self._choice.parts,
        )
        check_room(config, shards)
        self.bad: list[BadClip] = []
        self._sentences = Sentences(config)
        self._negatives = Negatives(config, shards)
        self._config, self._shards, self._tokenizer, self._ranks = config, shards, tokenizer, ranks
        self._preprocessor = make_preprocessor(config, ranks, shards)
        self._tokens = tokens
        self._reads_text = config.loss.reads_text
        # Asked for again by `work`, after the loader has read ahead.
        self._dealt = lru_cache(maxsize=16)(self._deal)

    def batches(self, first: int, last: int, *, times: int = 1) -> Iterator[Batch]:
        """The micro-batches of steps `first` up to, not including, `last`.

        Args:
            times: how many times the micro-batches of a step are yielded, one round after another,
                where there are several.

        Raises:
            ShardError: a clip that cannot be used, and none that may replace it.
        """
        with self._reading_ahead(first, last) as reached:
            yield from self._batches(range(first, last), times, reached)

    def _batches(self, steps: range, times: int, reached: Callable[[int], None]) -> Iterator[Batch]:
        pending: deque[_PendingBatch] = deque()

        def encoded() -> Iterator[EncodedBatch]:
            for step in steps:
                reached(step)
                several = len(self._dealt(step).micro_batches) > 1
                for time in range(times if several else 1):
                    for batch in self._read_step(step, repeated=time > 0):
                        pending.append(batch)
                        yield EncodedBatch(batch.encoded, batch.positions, batch.clips.tolist())

        most_clips = self._config.train.micro_clips(self._ranks.world)
        inputs = self._preprocessor.stream(encoded(), most_clips)
        while True:
            try:
                media = next(inputs)
            except StopIteration:
                return
            except Unusable as error:
                media = self._replace_undecodable(pending[0], error)
            yield self._batch(pending.popleft(), media)

    @contextmanager
    def _reading_ahead(self, first: int, last: int) -> Iterator[Callable[[int], None]]:
        """A context that fetches shards by URL ahead; gives a function that is told each step."""
        if self._shards.remote is None:
            yield lambda step: None
            return
        sampler = copy(self.sampler)  # it keeps an epoch of its own

        def clips(step: int) -> np.ndarray:
            samples = sampler.samples(step)
            return self._choice.clips(samples, [0.0] * len(samples))[0]

        plan = in_order_of_steps(self._shards, clips, range(first, last))
        with ReadAhead(self._shards.remote.cache, plan) as ahead:
            yield ahead.reached

    def work(self, step: int) -> dict[str, float]:
        """Metrics of a step's work; {} where all clips cost the same."""
        dealt = self._dealt(step)
        if self._tokens is None:
            return {}
        counts = {"media_tokens": dealt.tokens, "micro_batches": len(dealt.micro_batches)}
        return {**counts, "rank_balance": dealt.balance}

    def _deal(self, step: int) -> Dealt:
        """This rank's rows of a step's global batch."""
        train = self._config.train
        if self._tokens is None:
            return dealt_in_order(train, self._ranks)
        samples, per_epoch = self.sampler.samples(step), self.sampler.steps_per_epoch
        clips, _ = self._choice.clips(samples, [0.0] * len(samples))  # with any captions
        epochs = -(-train.run_steps(per_epoch) // per_epoch)
        masks = self._config.mask.masks(self.sampler.epoch(step), epochs)
        tokens = self._tokens.masked if masks else self._tokens.whole
        return dealt_equally(train, self._ranks, tokens[clips])

    def _read_step(self, step: int, *, repeated: bool) -> Iterator[_PendingBatch]:
        micro_batches = self._dealt(step).micro_batches
        for rows in micro_batches:
            yield self._read(step, rows, len(micro_batches), repeated=repeated)

    def _read(
        self, step: int, rows: np.ndarray, micro_batches: int, *, repeated: bool
    ) -> _PendingBatch:
        """Read a micro-batch from the shards; replaces clips without media or captions."""
        train, seed = self._config.train, self._config.run.seed
        sample_index = torch.from_numpy(rows + step * train.global_batch)
        caption_u, enriched_u = uniforms(seed, Stream.CAPTION, sample_index, 2).T.tolist()
        clips, enriched = self._choice.clips(self.sampler.samples(step)[rows], enriched_u)
        negative_u = self._negatives.uniforms(seed, sample_index)
        batch = _PendingBatch(
            step=step,
            sample_index=sample_index,
            clips=clips,
            enriched=enriched,
            caption_u=caption_u,
            positions=uniforms(seed, Stream.CROP, sample_index, 1 + PIECES).numpy(),
            captions=[""] * len(rows),
            negative_u=negative_u,
            negatives=[[]] * len(rows),
            encoded=[b""] * len(rows),
            micro_batches=micro_batches,
            repeated=repeated,
        )
        for row in range(len(rows)):
            self._read_row(batch, row, check=False)
        return batch

    def _read_row(self, batch: _PendingBatch, row: int, *, check: bool) -> None:
        """Fill in a row's media and caption: its clip's, or those of the next that can be used.

        Args:
            check: also replace a clip that cannot be decoded.
        """
        wanted, why = int(batch.clips[row]), ""
        replace = self._config.data.on_bad_clip == "replace"
        for offset in range(_TRIES if replace else 1):
            clip = (wanted + offset) % len(self._shards)
            try:
                record = self._shards.record(clip, captionless=not self._reads_text)
                encoded = self._shards.encoded(clip)
                if check:
                    self._preprocessor.check(encoded)
            except Unusable as reason:
                why = why or str(reason)
                continue
            if clip != wanted:
                batch.clips[row] = clip
                names = self._shards.name(wanted), self._shards.name(clip)
                if not batch.repeated:
                    self.bad.append(BadClip(batch.step, names[0], why, names[1]))
            if self._reads_text:  # a text encoder that no loss reads gets as little to do as can be
                texts = self._choice.texts(clip, record, enriched=bool(batch.enriched[row]))
                batch.captions[row] = texts[int(batch.caption_u[row] * len(texts))]
            batch.negatives[row] = self._negatives.of(clip, record, batch.negative_u[row])
            batch.encoded[row] = encoded
            return
        remedy = "data.on_bad_clip=replace takes the next one"
        after = f"nor can the {_TRIES - 1} clips after it" if replace else remedy
        raise ShardError(f"{self._shards.name(wanted)} cannot be used ({why}); {after}")

    def _replace_undecodable(self, batch: _PendingBatch, error: Unusable) -> MediaInput:
        """The input of a micro-batch after replacing the clips that cannot be decoded."""
        before = batch.clips.copy()
        for row in range(len(batch.clips)):
            self._read_row(batch, row, check=True)
        if (batch.clips == before).all():
            warnings.warn(
                f"decoded without DALI: the clips of step {batch.step}, such as "
                f"{self._shards.name(int(before[0]))} ({error}); frontend.backend=torch may be "
                "faster if there are many",
                stacklevel=2,
            )
        return self._preprocessor.decode(batch.encoded, batch.positions)

    def _batch(self, batch: _PendingBatch, media: MediaInput) -> Batch:
        """The micro-batch with its captions as tokens, on the device."""
        device = self._ranks.device
        rows = batch.sample_index.numpy() - batch.step * self._config.train.global_batch
        texts = self._sentences(batch.step, rows, batch.captions, batch.negatives)
        ids, attention_mask = self._tokenizer(texts)
        if device.type == "cuda":
            ids, attention_mask = ids.pin_memory(), attention_mask.pin_memory()
        return Batch(
            media=media.media,
            ids=ids if self._config.text.freeze else to_device(ids, device),
            attention_mask=attention_mask,
            sample_index=to_device(batch.sample_index, device),
            clips=batch.clips,
            epoch=self.sampler.epoch(batch.step),
            micro_batches=batch.micro_batches,
            longer=self._force_one(media.longer, batch.sample_index),
            pair_ids=self._pair_ids(batch),
        )

    def _pair_ids(self, batch: _PendingBatch) -> Tensor | None:
        """The clips and captions that the rows have in the end, if a loss asks for them."""
        if not self._config.loss.pair_ids:
            return None
        found = pair_ids(batch.clips, batch.captions, batch.negatives)
        return to_device(found, self._ranks.device)

    def _force_one(self, longer: Tensor | None, sample_index: Tensor) -> Tensor | None:
        """With fusion.force_one, mark a random clip where no clip is longer."""
        if longer is None or longer.any() or not self._config.fusion.force_one:
            return longer
        u = uniforms(self._config.run.seed, Stream.CROP, sample_index, 2 + PIECES)[:, -1]
        return longer.index_fill(0, u.argmin(), True)
