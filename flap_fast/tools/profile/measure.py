"""`flap profile`: measures time and memory of a training step.

    runs/NAME/profile/profile.json      clips/s, the step by part, memory, FLOP/s, the ceiling
                      trace.json.gz     two steps, for ui.perfetto.dev or chrome://tracing
                      memory.pickle     a GPU's allocations in a step, for pytorch.org/memory_viz
                      profile.png       the same as a figure (`flap_fast.report.profile`)

Steps are the trainer's, on the run's own loader or on random batches; logs and checkpoints are left
out. Parts are those of the first rank. FLOP are those that `counts` finds for the captions' own
tokens; the ceiling is a matrix product in the run's precision, measured here.
"""

from __future__ import annotations

import json
import platform
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.loader import TrainingLoader
from flap_fast.files import write_atomically
from flap_fast.model.two_towers import TwoTowers, takes_bf16
from flap_fast.ranks import Ranks, world_size
from flap_fast.ranks.agreement import agree
from flap_fast.ranks.failure import joined
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.device import Memory, measure_ceiling, most_allocated
from flap_fast.tools.profile.fits import check_memory, check_settings, count_here
from flap_fast.tools.profile.lengths import LengthMix, length_mix
from flap_fast.tools.profile.noted import Noted, noting, sentence_lengths
from flap_fast.tools.profile.parts import step_parts
from flap_fast.tools.profile.search import search as search_micro_batch
from flap_fast.tools.profile.synthetic import SyntheticLoader, without_files
from flap_fast.tools.profile.timeline import (
    Timeline,
    timed_batches,
    timed_collectives,
    timed_engine,
    timed_teacher,
)
from flap_fast.tools.profile.trace import Flop, mean
from flap_fast.tools.profile.traffic import CountTraffic, sent_bytes
from flap_fast.tools.profile.work import two_passes, work_summary
from flap_fast.training.engine import Engine, make_engine
from flap_fast.training.environment import device_name
from flap_fast.training.facts import settings_facts
from flap_fast.training.frozen import frozen
from flap_fast.training.setup import clip_tokens, data_read
from flap_fast.training.step import Gradients
from flap_fast.training.teacher import teacher

WARM_UP, TRACED = 3, 2
_SEARCH_S = 30.0

Profile = dict[str, Any]


def profile(
    config: Config,
    *,
    steps: int = 10,
    synthetic: bool = False,
    mix: LengthMix | None = None,
    search: bool = True,
    out: Path | None = None,
) -> Profile | None:
    """Profile steps and write the files; returns the contents of profile.json, on the first rank.

    Args:
        synthetic: random batches; needs neither shards nor the text tower's folder, but a teacher
            and, to compare its tokenizer, the text tower's.
        mix: with audio.length = variable, the clips' lengths; of data.train, or of the default mix,
            without.
        search: look for the largest micro-batch that fits; in a run of one process only.

    Raises:
        ConfigError: a config that cannot be trained, or a batch that does not fit.
    """
    require(steps >= 1, "--steps", "be at least 1", steps)
    check_settings(config, synthetic=synthetic)
    mix = mix or length_mix(config)
    alone = search and world_size() == 1
    found = search_micro_batch(config, mix, seconds=_SEARCH_S) if alone else None
    # With fake ranks, so before this process joins its real ones.
    counts, needed = count_here(config, world_size(), mix)
    out = out or config.run_folder / "profile"
    with joined() as ranks:
        agree(ranks, lambda: (None, settings_facts(config, ranks) | {"--steps": steps}))
        with without_files(config) if synthetic else nullcontext(config) as complete:
            if needed:
                check_memory(complete, needed, ranks)
            result = _Session(complete, counts, ranks, steps, synthetic, out).run()
    if not ranks.first:
        return None
    result["micro_batch"] = found or {"skipped": _why_no_search(search)}
    write_atomically(out / "profile.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _why_no_search(search: bool) -> str:
    return "of one process only, without a launcher" if search else "--no-search"


class _Session:
    """Measures the steps of one model, its engine and its loader."""

    def __init__(
        self,
        config: Config,
        counts: StepCounts,
        ranks: Ranks,
        steps: int,
        synthetic: bool,
        out: Path,
    ):
        self.config, self.ranks, self.steps, self.out = config, ranks, steps, out
        taught = config.loss.distill.active
        self.counts, self.parts = counts, step_parts(config.encoder.modality, teacher=taught)
        self.half = takes_bf16(config.train.precision, ranks.device)
        self.memory = Memory(ranks.device)
        self.timeline: Timeline | None = None
        self.synthetic = synthetic
        torch.manual_seed(config.run.seed)
        self.model = TwoTowers(config, weights=not synthetic)
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)

    def run(self) -> Profile:
        """Run all measurements in sequence."""
        extra = TRACED + 2
        with ExitStack() as hooks:
            hooks.enter_context(timed_collectives(lambda: self.timeline))
            engine = make_engine(self.config, self.model, self.ranks)
            engine = hooks.enter_context(timed_engine(engine, lambda: self.timeline))
            self.frozen = hooks.enter_context(frozen(self.config, self.model, self.ranks))
            self.teacher = timed_teacher(teacher(self.config, self.ranks), lambda: self.timeline)
            self._begin(engine, WARM_UP + self.steps + extra)
            try:
                for _ in range(WARM_UP):
                    self._step()
                timed = self._timed()
                sent = self._count()
                files = self._trace() | self._snapshot()
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"train.global_batch must fit in memory, got {self.config.train.global_batch} "
                    f"over {self.ranks.world} ranks ({str(error).splitlines()[0]}); try half of "
                    "it, a smaller train.micro_batch or train.checkpoint_activations=true"
                ) from error
        ceiling = measure_ceiling(self.ranks.device, half=self.half)
        return self._result(*timed, sent, files, ceiling)

    def _begin(self, engine: Engine, steps: int) -> None:
        """Set up loader and gradients as before the trainer's first step."""
        config, ranks = self.config, self.ranks
        if self.synthetic:
            loader = SyntheticLoader(config, self.model.text, ranks, self.counts.mix)
            per_epoch = loader.steps_per_epoch
        else:
            shards, texts = agree(ranks, lambda: data_read(config))
            tokens = clip_tokens(config, shards, ranks)
            loader = TrainingLoader(config, shards, texts, ranks, tokens)
            per_epoch = loader.sampler.steps_per_epoch
        # Far from the end of a run, and from an unmasked tail.
        self.run_steps = 1000 * per_epoch
        self.engine = engine
        models = engine, self.run_steps, per_epoch, self.frozen, self.teacher
        self.gradients = Gradients(config, ranks, *models)
        batches = timed_batches(
            loader.batches(0, steps, times=self.gradients.reads), lambda: self.timeline
        )
        self.noted: list[Noted] = []
        self.batches = noting(batches, self.noted)

    def _step(self) -> list[Noted]:
        """Run a step of the trainer's loop with its batches; returns what was noted of those."""
        if self.timeline:
            self.timeline.begin_step()
        self.noted.clear()
        self.gradients(1, self.batches)
        lr = self.config.optim.lr / 1000  # no run's, so that weights stay about as they are
        self.engine.step(lr)
        # A second pass reads the same captions again.
        return self.noted[: self.noted[0].micro_batches]

    def _timed(
        self,
    ) -> tuple[list[dict[str, float]], dict[str, int], dict[str, Flop], float]:
        """Seconds by part and step, memory, FLOP of a step, and real tokens of those computed."""
        self.memory.begin()
        self.timeline = Timeline(self.ranks.device)
        known = self.frozen.counts()
        seen = [self._step() for _ in range(self.steps)]
        self.new = [now - before for now, before in zip(self.frozen.counts(), known, strict=True)]
        self.timeline.end()
        seconds = self.timeline.steps()
        memory = {"peak": self.memory.peak(), "steady": self.memory.steady()}
        self.timeline = None
        self.micro_batches = round(median(len(step) for step in seen))
        by_step = [self._flop_of(step) for step in seen]
        flop = {part: mean([step[part] for step in by_step]) for part in by_step[0]}
        masks = [batch.mask for step in seen for batch in step]
        real = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        return seconds, memory, flop, real

    def _flop_of(self, step: list[Noted]) -> dict[str, Flop]:
        lengths = sentence_lengths(step, len(self.config.loss.sentences))
        frames = sorted(n for batch in step for n in batch.frames)
        world = self.ranks.world
        return self.counts.flop(lengths, world, frames=frames, micro_batches=len(step))

    def _count(self) -> float:
        """Bytes that this rank sends in a step."""
        with CountTraffic() as counted:
            self._step()
        return sent_bytes(counted.traffic, self.ranks.world)

    def _trace(self) -> dict[str, str]:
        """Run two steps under PyTorch's profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, profile_memory=True) as traced:
            self.timeline = Timeline(self.ranks.device, ranges=True)
            for _ in range(TRACED):
                self._step()
            self.timeline.end()
            self.timeline = None
        self.allocated_in_a_step = most_allocated(traced)
        if self.ranks.first:
            traced.export_chrome_trace(str(self.out / "trace.json.gz"))
        return {"trace": "trace.json.gz"}

    def _snapshot(self) -> dict[str, str]:
        """A GPU's allocations over a step, with the lines of code that made them."""
        if self.ranks.device.type != "cuda":
            return {"memory_snapshot": "not available on a CPU; the trace has its [memory] events"}
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._step()
        if self.ranks.first:
            torch.cuda.memory._dump_snapshot(str(self.out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
        return {"memory_snapshot": "memory.pickle"}

    def _step_bytes(self, memory: dict[str, int]) -> int:
        """Bytes that a step adds to the steady state; a CPU's resident set does not shrink."""
        if self.ranks.device.type == "cuda":
            return memory["peak"] - memory["steady"]
        return self.allocated_in_a_step

    def _result(
        self,
        seconds: list[dict[str, float]],
        memory: dict[str, int],
        flop: dict[str, Flop],
        real_tokens: float,
        sent: float,
        files: dict[str, str],
        ceiling: float,
    ) -> Profile:
        each = sorted(sum(step.values()) for step in seconds)
        step_s = sum(each) / len(each)
        seconds = [{part: step.get(part, 0.0) for part in self.parts} for step in seconds]
        parts = {part: sum(step[part] for step in seconds) / len(seconds) for part in self.parts}
        total = sum(f.total for f in flop.values())
        return {
            "config": self.config.run.name,
            "device": device_name(self.ranks.device),
            "world": self.ranks.world,
            "precision": "bf16" if self.half else "fp32",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "batches": "synthetic" if self.synthetic else "data.train",
            "global_batch": self.config.train.global_batch,
            "micro_batches": self.micro_batches,
            "passes": 2 if two_passes(self.config, self.micro_batches) else 1,
            "steps": len(seconds),
            "clips_per_s": self.config.train.global_batch / step_s,
            "step_ms": 1000 * step_s,
            "step_ms_least_median_most": [1000 * s for s in (each[0], median(each), each[-1])],
            "parts_ms": {name: 1000 * s for name, s in parts.items()},
            "steps_ms": [{name: 1000 * s for name, s in step.items()} for step in seconds],
            "flop": {name: asdict(f) | {"total": f.total} for name, f in flop.items()},
            "flop_counted": "matrix products of real tokens, two FLOP a multiply-add",
            # A frozen encoder's time is that for these; FLOP leave it out.
            "new_captions_per_step": self.new[0] / len(seconds),
            "new_clips_per_step": self.new[1] / len(seconds),
            "real_tokens": real_tokens,
            "lengths": work_summary(self.config, self.ranks.world, self.counts.mix),
            "flop_per_s": total / step_s,
            "ceiling_flop_per_s": ceiling,
            "utilisation": total / step_s / ceiling,
            "memory_mib": {name: n / 2**20 for name, n in memory.items()},
            "memory_is": self.memory.what,
            "allocated_in_a_step_mib": self._step_bytes(memory) / 2**20,
            "sent_mib_per_step": sent / 2**20,
            "files": files,
        }
