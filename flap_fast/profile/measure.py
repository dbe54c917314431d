"""`flap profile`: where the time and the memory of a training step go.

    runs/NAME/profile/profile.json      clips/s, the step by part, memory, FLOP/s, the ceiling
                      trace.json.gz     two steps, for ui.perfetto.dev or chrome://tracing
                      memory.pickle     a GPU's allocations in a step, for pytorch.org/memory_viz
                      profile.png       the same in a picture (`flap_fast.report.profile`)

Steps are the trainer's, on the run's own loader or on random batches; what watches and saves a run
is left out. Parts are those of the first rank. FLOP are the counted ones of `flop`, of
the captions' own tokens; the ceiling is a matrix product in the run's precision, measured here.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, need
from flap_fast.config import Config, check_before_loading
from flap_fast.data.batch import Batch
from flap_fast.data.captions import tokenizer
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards, write_atomically
from flap_fast.loss import total_loss
from flap_fast.model.flap import Flap, takes_bf16
from flap_fast.model.masking import kept_patches
from flap_fast.profile.device import Memory, free_bytes, measure_ceiling
from flap_fast.profile.flop import Flop, TextShape, step_flop
from flap_fast.profile.footprint import Sizes, check_formulas, footprint
from flap_fast.profile.search import search as search_micro_batch
from flap_fast.profile.synthetic import SyntheticLoader, caption_lengths, without_files
from flap_fast.profile.timeline import PARTS, Timeline, watched, watched_collectives
from flap_fast.profile.traffic import CountTraffic, sent_bytes
from flap_fast.ranks import Ranks, join_ranks, leave_ranks, world_size
from flap_fast.train.engine import Engine, check_engine, make_engine
from flap_fast.train.environment import device_name
from flap_fast.train.microbatch import dropout_seed, mask_plan_of, model_inputs
from flap_fast.train.schedules import warmup_cosine

WARM_UP, TRACED = 3, 2
_SEARCH_S = 30.0
# Of what is free on a CPU: the formulas leave out heaps, libraries and an optimizer's temporaries.
_SAFE = 0.7

Profile = dict[str, Any]


def profile(
    config: Config,
    *,
    steps: int = 10,
    synthetic: bool = False,
    search: bool = True,
    out: Path | None = None,
) -> Profile | None:
    """Profile some steps and write the files; gives what profile.json holds, on the first rank.

    Args:
        synthetic: random batches; needs neither shards nor the text tower's folder.
        search: look for the largest micro-batch that fits; in a run of one process only.

    Raises:
        ConfigError: a config that cannot be trained, or a batch that does not fit.
    """
    need(steps >= 1, "--steps", "be at least 1", steps)
    _check(config, synthetic)
    found = search_micro_batch(config, seconds=_SEARCH_S) if search and world_size() == 1 else None
    ranks = join_ranks()
    out = out or config.run_folder / "profile"
    try:
        with without_files(config) if synthetic else nullcontext(config) as complete:
            result = _Session(complete, ranks, steps, synthetic, out).run()
    finally:
        leave_ranks()
    if not ranks.first:
        return None
    result["micro_batch"] = found or {"skipped": _why_no_search(search)}
    write_atomically(out / "profile.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _check(config: Config, synthetic: bool) -> None:
    check_formulas(config)
    if synthetic:
        world, batch = world_size(), config.train.global_batch
        need(batch % world == 0, "train.global_batch", f"be a multiple of {world} ranks", batch)
    else:
        try:
            check_before_loading(config, world_size())
        except ConfigError as error:
            raise ConfigError(f"{error}. Without data: --synthetic") from None
    check_engine(config, world_size())


def _why_no_search(search: bool) -> str:
    return "of one process only, without a launcher" if search else "--no-search"


class _Session:
    """One model, its engine and its loader."""

    def __init__(self, config: Config, ranks: Ranks, steps: int, synthetic: bool, out: Path):
        self.config, self.ranks, self.steps, self.out = config, ranks, steps, out
        self.half = takes_bf16(config.train.precision, ranks.device)
        self.clips = config.train.global_batch // ranks.world
        self.memory = Memory(ranks.device)
        self.timeline: Timeline | None = None
        self.synthetic = synthetic
        torch.manual_seed(config.run.seed)
        self.model = Flap(config, weights=not synthetic)
        self.text = TextShape.of(self.model.text.inner.config)
        self._check_that_it_fits()
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)

    def run(self) -> Profile:
        """All that is measured, in turn."""
        extra = TRACED + 2
        with watched_collectives(lambda: self.timeline):
            engine = make_engine(self.config, self.model, self.ranks)
            batches = self._batches(WARM_UP + self.steps + extra)
            try:
                for _ in range(WARM_UP):
                    self._step(engine, batches)
                timed = self._timed(engine, batches)
                sent = self._count(engine, batches)
                files = self._trace(engine, batches) | self._snapshot(engine, batches)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"train.global_batch must fit in memory, got {self.config.train.global_batch} "
                    f"over {self.ranks.world} ranks ({str(error).splitlines()[0]}); try half of "
                    "it, or train.checkpoint_activations=true"
                ) from error
        ceiling = measure_ceiling(self.ranks.device, half=self.half)
        return self._result(*timed, sent, files, ceiling)

    def _batches(self, steps: int) -> Iterator[Batch]:
        if self.synthetic:
            loader = SyntheticLoader(self.config, self.model.text.inner.config, self.ranks)
            self.per_epoch = loader.steps_per_epoch
            return loader.batches(0, steps)
        tokens = tokenizer(self.config.text)
        shards = open_shards(self.config.data.train)
        loader = TrainingLoader(self.config, shards, tokens, self.ranks)
        self.per_epoch = loader.order.steps_per_epoch
        return loader.batches(0, steps)

    def _step(self, engine: Engine, batches: Iterator[Batch]) -> tuple[Batch, Tensor | None]:
        """A step of the trainer's loop, its batch included."""
        config, timeline = self.config, self.timeline
        if timeline:
            timeline.mark("data wait")
        batch = next(batches)
        if timeline:
            timeline.mark("other")
        whole = 1000 * self.per_epoch  # far from the end of a run, and from an unmasked tail
        torch.manual_seed(dropout_seed(config.run.seed, 1, self.ranks.rank))
        plan = mask_plan_of(batch, config, whole, self.per_epoch)
        outputs = engine.model(*model_inputs(batch, plan, config))
        engine.backward(total_loss(outputs, config)["total"])
        engine.step(warmup_cosine(0, base=config.optim.lr, warmup=1000, steps=whole))
        return batch, None if plan is None else plan.keep

    def _timed(
        self, engine: Engine, batches: Iterator[Batch]
    ) -> tuple[list[dict[str, float]], dict[str, int], dict[str, Flop], float]:
        """Seconds by part and step, memory, FLOP of a step, and real tokens of those computed."""
        self.memory.begin()
        self.timeline = Timeline(self.ranks.device)
        with watched(engine, self.timeline) as engine:
            seen = [self._step(engine, batches) for _ in range(self.steps)]
        self.timeline.end()
        seconds = self.timeline.steps()
        memory = {"peak": self.memory.peak(), "steady": self.memory.steady()}
        self.timeline = None
        patches = self.config.audio.grid[0] * self.config.audio.grid[1]
        lengths = [batch.attention_mask.sum(1).tolist() for batch, _ in seen]
        kept = [patches if keep is None else keep.shape[1] for _, keep in seen]
        world = self.ranks.world
        by_step = [
            step_flop(self.config, self.text, n, kept=k, world=world)
            for n, k in zip(lengths, kept, strict=True)
        ]
        flop = {part: _mean([step[part] for step in by_step]) for part in by_step[0]}
        computed = sum(batch.attention_mask.numel() for batch, _ in seen)
        return seconds, memory, flop, sum(map(sum, lengths)) / computed

    def _count(self, engine: Engine, batches: Iterator[Batch]) -> float:
        """Bytes that this rank sends in a step."""
        with CountTraffic() as counted:
            self._step(engine, batches)
        return sent_bytes(counted.traffic, self.ranks.world)

    def _trace(self, engine: Engine, batches: Iterator[Batch]) -> dict[str, str]:
        """Two steps under PyTorch's profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, profile_memory=True) as traced:
            self.timeline = Timeline(self.ranks.device, ranges=True)
            with watched(engine, self.timeline) as engine:
                for _ in range(TRACED):
                    self._step(engine, batches)
            self.timeline.end()
            self.timeline = None
        self.allocated_in_a_step = _most_allocated(traced)
        if self.ranks.first:
            traced.export_chrome_trace(str(self.out / "trace.json.gz"))
        return {"trace": "trace.json.gz"}

    def _snapshot(self, engine: Engine, batches: Iterator[Batch]) -> dict[str, str]:
        """A GPU's allocations over a step, with the lines of code that made them."""
        if self.ranks.device.type != "cuda":
            return {"memory_snapshot": "not available on a CPU; the trace has its [memory] events"}
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._step(engine, batches)
        if self.ranks.first:
            torch.cuda.memory._dump_snapshot(str(self.out / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
        return {"memory_snapshot": "memory.pickle"}

    def _step_bytes(self, memory: dict[str, int]) -> int:
        """What a step allocates above the steady state: a CPU's resident set does not shrink."""
        if self.ranks.device.type == "cuda":
            return memory["peak"] - memory["steady"]
        return self.allocated_in_a_step

    def _check_that_it_fits(self) -> None:
        """On a CPU a batch that is too large would take the machine down: ask the formulas."""
        if self.ranks.device.type == "cuda":
            return
        here, free = self.ranks.local_world, free_bytes(self.ranks.device)
        one, most = self._predicted(1), self._predicted(self.clips)
        each = max(1, (most - one) // max(1, self.clips - 1))
        fitting = max(1, int((_SAFE * free / here - one) // each)) * self.ranks.world
        need(
            most * here <= _SAFE * free,
            "train.global_batch",
            f"fit in {_SAFE:.0%} of the {free / 2**30:.1f} GiB that are free: {self.clips} clips "
            f"take {most / 2**30:.1f} GiB a rank by the formulas of `flap plan`",
            self.config.train.global_batch,
            f"try train.global_batch={fitting}",
        )

    def _predicted(self, clips: int) -> int:
        tokens = caption_lengths(1, self.config.text.max_tokens)[0]
        return footprint(
            self.config,
            Sizes.of(self.model),
            [-(-tokens // 8) * 8] * clips,
            self.ranks.world,
            engine=check_engine(self.config, self.ranks.world),
            kept=kept_patches(self.config.mask, self.config.audio.grid),
            half=self.half,
            overlap=False,
        ).peak

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
        parts = {name: sum(step[name] for step in seconds) / len(seconds) for name in PARTS}
        total = sum(f.total for f in flop.values())
        return {
            "config": self.config.run.name,
            "device": device_name(self.ranks.device),
            "world": self.ranks.world,
            "precision": "bf16" if self.half else "fp32",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "batches": "synthetic" if self.synthetic else "data.train",
            "global_batch": self.config.train.global_batch,
            "steps": len(seconds),
            "clips_per_s": self.config.train.global_batch / step_s,
            "step_ms": 1000 * step_s,
            "step_ms_least_median_most": [1000 * s for s in (each[0], median(each), each[-1])],
            "parts_ms": {name: 1000 * s for name, s in parts.items()},
            "steps_ms": [{name: 1000 * s for name, s in step.items()} for step in seconds],
            "flop": {name: asdict(f) | {"total": f.total} for name, f in flop.items()},
            "flop_counted": "matrix products of real tokens, two FLOP a multiply-add",
            "real_tokens": real_tokens,
            "flop_per_s": total / step_s,
            "ceiling_flop_per_s": ceiling,
            "share_of_ceiling": total / step_s / ceiling,
            "memory_mib": {name: n / 2**20 for name, n in memory.items()},
            "memory_is": self.memory.what,
            "allocated_in_a_step_mib": self._step_bytes(memory) / 2**20,
            "sent_mib_per_step": sent / 2**20,
            "files": files,
        }


def _mean(flops: list[Flop]) -> Flop:
    n = len(flops)
    return Flop(
        sum(f.forward for f in flops) // n,
        sum(f.backward for f in flops) // n,
        sum(f.recomputed for f in flops) // n,
    )


def _most_allocated(traced: torch.profiler.profile) -> int:
    """The most bytes of a CPU that PyTorch had allocated above what there was at the beginning."""
    assert traced.profiler is not None
    events = traced.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    sizes = (e.nbytes() for e in memory)  # type: ignore[attr-defined]
    return max(accumulate(sizes, initial=0))
