"""Times of a step's parts, without synchronisation in between.

A mark ends one part and begins another, so the parts of a step add up to the step. On a CPU a mark
is the clock; on a GPU an event in its stream, which nothing waits for.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_fast.data.batch import Batch
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.parts import (
    COMMUNICATION,
    DATA_WAIT,
    LOSS,
    OPTIMIZER,
    OTHER,
    TEACHER,
    marked,
)
from flap_fast.training.engine import Engine
from flap_fast.training.teacher import Teacher


class Timeline:
    """Records marks, and computes the seconds between them at the end.

    Args:
        ranges: name the parts in a profiler's trace too, as far as the thread that steps runs them.
    """

    def __init__(self, device: torch.device, *, ranges: bool = False):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._begins: set[int] = set()
        self._thread = threading.get_ident() if ranges else None
        self._range: Any = None
        self.part = OTHER

    def begin_step(self) -> None:
        """Begin a step; time before the first part counts as other."""
        self._begins.add(len(self._marks))
        self.mark(OTHER)

    def mark(self, part: str) -> None:
        """Begin a part."""
        self.part = part
        self._marks.append((part, self._now()))
        if threading.get_ident() == self._thread:
            self._end_range()
            self._range = torch.profiler.record_function(f"flap: {part}")
            self._range.__enter__()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A context in which time counts for this part; afterwards for the earlier part."""
        before = self.part
        self.mark(part)
        try:
            yield
        finally:
            self.mark(before)

    def end(self) -> None:
        """End the last part."""
        self.mark(OTHER)
        self._end_range()

    def steps(self) -> list[dict[str, float]]:
        """Seconds of the parts of each step; synchronises with the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        pairs = zip(self._marks, self._marks[1:], strict=False)
        for at, ((part, begin), (_, end)) in enumerate(pairs):
            if at in self._begins:
                found.append(defaultdict(float))
            if found:
                found[-1][part] += self._between(begin, end)
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


Now = Callable[[], Timeline | None]
"""Returns the timeline in use, if there is one."""


def timed_batches(batches: Iterator[Any], now: Now) -> Iterator[Any]:
    """The batches; the wait for each is the part `data wait`."""
    while True:
        timeline = now()
        if timeline:
            timeline.mark(DATA_WAIT)
        batch = next(batches, None)
        if timeline:
            timeline.mark(OTHER)
        if batch is None:
            return
        yield batch


@contextmanager
def timed_engine(engine: Engine, now: Now) -> Iterator[Engine]:
    """The engine, with a mark wherever a part of its step begins."""

    def mark(part: str) -> None:
        if timeline := now():
            timeline.mark(part)

    with marked(engine.module, mark):
        yield cast(Engine, _MarkedEngine(engine, mark))  # other attributes are forwarded to it


def timed_teacher(teacher: Teacher | None, now: Now) -> Teacher | None:
    """The teacher, whose forward is the part `teacher`, if there is one."""
    if teacher is None:
        return None

    def timed(batch: Batch) -> dict[str, Tensor]:
        timeline = now()
        with timeline.within(TEACHER) if timeline else nullcontext():
            return teacher(batch)

    return cast(Teacher, timed)


class _MarkedEngine:
    """An engine whose backward begins in the loss, and whose step is the optimizer's."""

    def __init__(self, engine: Engine, mark: Callable[[str], None]):
        self._engine, self._mark = engine, mark
        self.name = engine.name

    @property
    def module(self) -> TwoTowers:
        return self._engine.module

    @property
    def model(self) -> nn.Module:
        return self._engine.model

    def backward(self, loss: Tensor, micro_batches: int = 1, *, last: bool = True) -> None:
        self._mark(LOSS)
        self._engine.backward(loss, micro_batches, last=last)
        self._mark(OTHER)

    def step(self, lr: float) -> Tensor:
        self._mark(OPTIMIZER)
        norm = self._engine.step(lr)
        self._mark(OTHER)
        return norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


# Those that the installed PyTorch has; it does not call the others.
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextmanager
def timed_collectives(timeline: Now) -> Iterator[None]:
    """A context in which waiting for a collective counts as `communication`; overlap does not.

    Open it before the engine is made: DeepSpeed takes hold of the functions then.
    """
    with ExitStack() as patches:
        for name in _COLLECTIVES:
            if (real := getattr(dist, name, None)) is not None:
                setattr(dist, name, _timed_collective(real, timeline))
                patches.callback(setattr, dist, name, real)
        yield


def _timed_collective(real: Callable[..., Any], timeline: Now) -> Any:
    def collective(*arguments: Any, **options: Any) -> Any:
        now = timeline()
        if now is None:
            return real(*arguments, **options)
        with now.within(COMMUNICATION):
            work = real(*arguments, **options)
        return work if work is None else _TimedWork(work, timeline)

    return collective


class _TimedWork:
    """A running collective; waiting for it counts as communication."""

    def __init__(self, work: Any, timeline: Now):
        self._work, self._timeline = work, timeline

    def wait(self, *arguments: Any) -> Any:
        now = self._timeline()
        if now is None:
            return self._work.wait(*arguments)
        with now.within(COMMUNICATION):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
