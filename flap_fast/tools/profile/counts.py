"""Counts of a step from PyTorch: FLOP by part, bytes allocated, bytes sent by the losses.

The trainer's own pieces run on fake tensors: the model's forward and backward on few clips
(`extrapolate`), the losses once on as many embeddings as a step has (`loss_counts`), and a
teacher's forward (`teacher_counts`). Bytes kept are extrapolated operator by operator. A frozen
text encoder is left out but for its weights: it embeds each caption once, mostly in the first
epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from flap_fast.config import Config
from flap_fast.data.batch import PackedMels
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.extrapolate import CLIPS, samples, tower_flop
from flap_fast.tools.profile.fake import (
    FakeMode,
    attention_of_a_gpu,
    fake_batch,
    fake_model,
    traceable,
)
from flap_fast.tools.profile.lengths import LengthMix, frames_of, has_lengths
from flap_fast.tools.profile.loss_counts import LossCounts, count_losses
from flap_fast.tools.profile.parts import DECODER, LOSS, TEACHER, marked
from flap_fast.tools.profile.teacher_counts import TeacherCounts
from flap_fast.tools.profile.trace import Array, Flop, Trace, scaled
from flap_fast.tools.profile.work import loss_times, rank_work, two_passes
from flap_fast.training.optimizers import parameter_groups
from flap_fast.training.step import model_inputs, patch_mask_of
from flap_fast.training.torch_optimizers import kept_numbers, muon_flop

_FLOAT = 4


@dataclass(frozen=True)
class TowerBytes:
    """Bytes allocated after each operator of a model's forward + backward, without weights."""

    kept: Array
    """Activations and temporaries."""
    batch: Array
    """The batch's media, until they are freed."""
    gradients: Array
    """Gradients of the parameters, if there were none before."""
    parts: dict[str, int]
    """Bytes that remain after each part's forward."""
    forward: int
    """Number of operators in the forward."""

    def extended(self, other: TowerBytes, factor: float) -> TowerBytes:
        """Linear extrapolation: this plus `factor` times the difference from this to `other`."""

        def line(a: Any, b: Any) -> Any:
            return a + factor * (b - a)

        return TowerBytes(
            line(self.kept, other.kept),
            line(self.batch, other.batch),
            line(self.gradients, other.gradients),
            {part: int(line(n, other.parts[part])) for part, n in self.parts.items()},
            self.forward,
        )

    def coarse(self) -> TowerBytes:
        """The maxima over the forward and over the backward."""
        phases = [0, self.forward]
        kept, batch, gradients = (
            np.maximum.reduceat(x, phases) for x in (self.kept, self.batch, self.gradients)
        )
        return TowerBytes(kept, batch, gradients, self.parts, 1)


class StepCounts:
    """Counts of a config's step, each computed on first use.

    Args:
        half: bf16 autocast is on.
        on_gpu: attention keeps no probabilities, with dropout or not; of a pack it is one operator.
        mix: lengths of the clips, where they differ.

    Raises:
        RuntimeError: this process is in a process group already.
    """

    def __init__(
        self,
        config: Config,
        *,
        half: bool,
        on_gpu: bool = True,
        mix: LengthMix | None = None,
    ):
        assert (mix is not None) == has_lengths(config)
        self.config, self.mix = traceable(config, half=half), mix
        self._half, self._on_gpu, self._mode = half, on_gpu, FakeMode()
        self._losses: dict[Any, LossCounts] = {}
        self._towers: dict[Any, tuple[dict[str, Flop], TowerBytes]] = {}

    @cached_property
    def model(self) -> TwoTowers:
        """The model with fake tensors."""
        return fake_model(self.config, self._mode)

    @cached_property
    def teacher(self) -> TeacherCounts | None:
        """Of loss.distill; None without."""
        if not self.config.loss.distill.active:
            return None
        options: Any = {"half": self._half, "on_gpu": self._on_gpu, "mix": self.mix}
        return TeacherCounts(self.config, self._mode, **options)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Size of each trained parameter, by group of the optimizer."""
        groups = parameter_groups(self.model, self.config.optim)
        return tuple(tuple(p.numel() for p in group.parameters) for group in groups)

    @cached_property
    def state_numbers(self) -> int:
        """Numbers that the optimizer keeps for all trained parameters."""
        return sum(
            kept_numbers(self.config.optim, p.shape, muon=group.muon)
            for group in parameter_groups(self.model, self.config.optim)
            for p in group.parameters
        )

    @cached_property
    def optimizer_flop(self) -> int:
        """FLOP of the optimizer's matrix products: Muon's, over all its matrices."""
        groups = parameter_groups(self.model, self.config.optim)
        shapes = [p.shape for group in groups if group.muon for p in group.parameters]
        return sum(muon_flop(self.config.optim, shape) for shape in shapes)

    @property
    def frozen(self) -> int:
        """Number of elements in all frozen parameters."""
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)

    def flop(
        self,
        lengths: Sequence[int],
        world: int = 1,
        *,
        frames: Sequence[int] = (),
        micro_batches: int = 0,
    ) -> dict[str, Flop]:
        """FLOP of one rank's step, by part.

        Args:
            lengths: the tokens of each sentence of its clips, all captions first: real ones for
                what the step is worth, padded ones for what it costs.
            world: ranks, each with as many clips.
            frames: of clips of different lengths, ascending; without, those of the mix.
            micro_batches: of the step; without, those of the mix.
        """
        config = self.config
        if not micro_batches:
            work = rank_work(config, world, self.mix)
            micro_batches = work.micro_batches
            frames = work.lengths.frames if work.lengths else ()
        sentences, traced = len(config.loss.sentences), lambda *batch: self._traced(*batch)[0]
        found = tower_flop(traced, lengths, sentences, frames, config.text.max_tokens)
        if two_passes(config, micro_batches):  # the decoder rests in the first
            found = {
                part: f if part == DECODER else replace(f, first_pass=f.forward)
                for part, f in found.items()
            }
        clips, times = len(lengths) // sentences, loss_times(config, world)
        if self.teacher:
            found[TEACHER] = self.teacher.flop(lengths[:clips], frames)
        return found | {LOSS: scaled(self.loss(clips // times, world).flop, times)}

    def loss(self, clips: int, world: int = 1) -> LossCounts:
        """Counts of the losses over `clips` clips of each rank."""
        key = clips, world
        if key not in self._losses:
            width = self.teacher.width if self.teacher else 0
            found = count_losses(self.config, self._mode, clips, world, teacher_width=width)
            self._losses[key] = found
        return self._losses[key]

    def loss_bytes(self, clips: int, world: int, *, counted: int) -> int:
        """Peak bytes of the losses over `clips` clips, extrapolated from those of `counted` clips.

        They grow faster than the clips, up to a tile: for fewer the line to nothing is above.
        """
        one = self.loss(counted, world).peak_bytes
        if clips <= counted:
            return one * clips // counted
        two = self.loss(2 * counted, world).peak_bytes
        return one + (two - one) * (clips - counted) // counted

    def towers(self, clips: float, tokens: int) -> TowerBytes:
        """Bytes of a forward + backward on `clips` clips, with sentences of `tokens` tokens.

        Args:
            clips: of different lengths, what they are in clips of the mix's mean tokens.
        """
        first, second = samples(self.config, self.mix, masked=True)
        few, many = (self._traced(n, tokens, frames)[1] for n, frames, _ in (first, second))
        if len(few.kept) != len(many.kept):  # operators that depend on the clips
            few, many = few.coarse(), many.coarse()
        return few.extended(many, (clips - first.size) / (second.size - first.size))

    @cached_property
    def media_bytes(self) -> int:
        """Bytes of one clip's media as the model's input; of different lengths the mean."""
        if self.mix is None:
            return fake_batch(self.config, 1, 1, self._mode).media.nbytes
        frames = np.mean(frames_of(self.config, self.mix.seconds))
        return int(_FLOAT * frames * self.config.audio.mel_bins)

    def _traced(
        self, clips: int, tokens: int, frames: tuple[int, ...] | None = None
    ) -> tuple[dict[str, Flop], TowerBytes]:
        """FLOP and bytes of a forward + backward.

        Args:
            frames: of clips of different lengths; None spreads them over the mix.
        """
        if frames is None and self.mix is not None:
            frames = frames_of(self.config, self.mix.spread(clips))
        key = clips, tokens, frames
        if key not in self._towers:
            self._towers[key] = self._trace(*key)
        return self._towers[key]

    def _trace(
        self, clips: int, tokens: int, frames: tuple[int, ...] | None
    ) -> tuple[dict[str, Flop], TowerBytes]:
        config, model = self.config, self.model
        compared = self.loss(CLIPS[0]).compared
        weights = [*model.parameters(), *model.buffers()]
        ends: list[tuple[str, int]] = []
        batch = fake_batch(config, clips, tokens, self._mode, frames)
        attention = attention_of_a_gpu() if self._on_gpu else nullcontext()
        with self._mode, attention, Trace(weights) as trace:

            def mark(part: str) -> None:
                if not trace.in_backward:
                    ends.append((trace.part, trace.operators))
                trace.mark(part)

            with marked(model, mark):
                whole = batch.media
                media = {trace.hold(whole.mel if isinstance(whole, PackedMels) else whole)}
                # Far from the end of a run, and from an unmasked tail.
                mask = patch_mask_of(batch, config, 1000, 1)
                inputs: Any = model_inputs(batch, mask, config)
                if config.text.freeze:
                    width: Any = model.text.width
                    inputs["text_pooled"] = torch.empty(len(batch.ids), width)
                if config.media_once:
                    width = model.encoder.width
                    inputs["media_pooled"] = torch.empty(clips, width)
                outputs = cast(dict[str, torch.Tensor], model(**inputs))
                del batch, whole, mask, inputs
                trace.in_backward, forward = True, trace.operators
                trace.mark(LOSS)
                ends.append((LOSS, forward))
                backward = [outputs[n] for n in compared if outputs[n].requires_grad]
                grads = [torch.ones_like(x) for x in backward]
                if backward:
                    torch.autograd.backward(backward, grads)
        gradients = {trace.hold(p.grad) for p in model.parameters() if p.grad is not None}
        allocated = trace.allocated(media, gradients)
        model.zero_grad(set_to_none=True)
        parts: Counter[str] = Counter()
        before = 0
        for part, operators in ends:
            now = int(allocated[0][operators - 1] + allocated[2][operators - 1]) if operators else 0
            parts[part] += now - before
            before = now
        found = TowerBytes(allocated[2], allocated[0], allocated[1], dict(parts), forward)
        return trace.flop(), found
