"""Counts of the teacher of loss.distill: its forward on fake tensors, without a graph.

It runs once on each batch, also where the model runs twice, on the unmasked media and the captions
alone. Each rank holds all of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import chain

import torch

from flap_fast.config import Config
from flap_fast.data.batch import PackedMels
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.extrapolate import peak_of, samples, tower_flop
from flap_fast.tools.profile.fake import (
    FakeMode,
    attention_of_a_gpu,
    fake_batch,
    fake_model,
    traceable,
)
from flap_fast.tools.profile.lengths import LengthMix, frames_of
from flap_fast.tools.profile.parts import marked
from flap_fast.tools.profile.trace import Array, Flop, Trace, summed
from flap_fast.training.teacher import embeddings, frozen, teacher_config

_FLOAT = 4


class TeacherCounts:
    """Counts of a config's teacher, each computed on first use; the arguments are `StepCounts`'.

    Raises:
        ConfigError: loss.distill.teacher is not the folder of a model or a run.
    """

    def __init__(
        self, config: Config, mode: FakeMode, *, half: bool, on_gpu: bool, mix: LengthMix | None
    ):
        found = teacher_config(config)
        assert found is not None
        self._config, self._own = config, traceable(found, half=half)
        self._mode, self._on_gpu, self._mix = mode, on_gpu, mix
        self._found: dict[tuple, tuple[dict[str, Flop], Array]] = {}

    @property
    def width(self) -> int:
        """Of its embeddings."""
        return self._own.joint.width

    @cached_property
    def weight_bytes(self) -> int:
        """Of its parameters and buffers, float32."""
        return sum(x.nbytes for x in chain(self._model.parameters(), self._model.buffers()))

    def embedding_bytes(self, clips: int) -> int:
        """Of the embeddings that a batch of `clips` clips adds to the model's."""
        return 2 * _FLOAT * clips * self.width

    def flop(self, captions: Sequence[int], frames: Sequence[int] = ()) -> Flop:
        """FLOP of its forward on clips with captions of these lengths.

        Args:
            frames: of clips of different lengths, ascending.
        """
        max_tokens = self._own.text.max_tokens
        found = tower_flop(lambda *batch: self._traced(*batch)[0], captions, 1, frames, max_tokens)
        return summed(found.values())

    def peak_bytes(self, clips: float, tokens: int) -> int:
        """Peak bytes that its forward on `clips` clips allocates.

        Args:
            clips: of different lengths, what they are in clips of the mix's mean tokens.
            tokens: of each caption, including padding.
        """
        first, second = samples(self._config, self._mix, masked=False)
        few, many = (self._traced(n, tokens, frames)[1] for n, frames, _ in (first, second))
        return peak_of(few, many, (clips - first.size) / (second.size - first.size))

    @cached_property
    def _model(self) -> TwoTowers:
        return frozen(fake_model(self._own, self._mode), self._own.train.precision)

    def _traced(
        self, clips: int, tokens: int, frames: tuple[int, ...] | None
    ) -> tuple[dict[str, Flop], Array]:
        """FLOP by tower, and bytes allocated after each operator."""
        if frames is None and self._mix is not None:
            frames = frames_of(self._config, self._mix.spread(clips))
        key = clips, tokens, frames
        if key not in self._found:
            self._found[key] = self._trace(*key)
        return self._found[key]

    def _trace(
        self, clips: int, tokens: int, frames: tuple[int, ...] | None
    ) -> tuple[dict[str, Flop], Array]:
        model = self._model
        batch = fake_batch(self._config, clips, tokens, self._mode, frames)
        media = batch.media.mel if isinstance(batch.media, PackedMels) else batch.media
        given = [*model.parameters(), *model.buffers(), media, batch.ids]
        attention = attention_of_a_gpu() if self._on_gpu else nullcontext()
        with self._mode, attention, Trace(given) as trace, marked(model, trace.mark):
            embeddings(model, batch, torch.device("cpu"))
        return trace.flop(), trace.allocated()[0]
