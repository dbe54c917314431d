"""Which part of a step runs when, without a wait in between.

A mark ends one part and begins another, so the parts of a step add up to the step. On a CPU a mark
is the clock; on a GPU an event in its stream, which no one waits for. The backward is split by the
gradients that arrive: autograd goes back through the loss first, then through the towers in the
opposite order of their forward, one after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_fast.model.two_towers import TwoTowers
from flap_fast.train.engine import Engine

# In the order of a step, as far as they have one: each micro-batch is waited for.
PARTS = (
    "data wait",
    "audio tower",
    "text tower",
    "decoder",
    "loss",
    "optimizer",
    "communication",
    "other",
)
_WAIT, _REST = PARTS[0], PARTS[-1]
# The modules of a model whose time is a part's.
_MODULES = {
    "audio": "audio tower",
    "audio_head": "audio tower",
    "text": "text tower",
    "text_head": "text tower",
    "decoder": "decoder",
}


class Timeline:
    """Marks, and after the last of them the seconds between them.

    Args:
        ranges: name the parts in a profiler's trace too, as far as the thread that steps runs them.
    """

    def __init__(self, device: torch.device, *, ranges: bool = False):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._begins: set[int] = set()
        self._thread = threading.get_ident() if ranges else None
        self._range: Any = None
        self.part = _REST

    def begin_step(self) -> None:
        """A step begins: with whatever is no part's."""
        self._begins.add(len(self._marks))
        self.mark(_REST)

    def mark(self, part: str) -> None:
        """From here on it is this part."""
        self.part = part
        self._marks.append((part, self._now()))
        if threading.get_ident() == self._thread:
            self._end_range()
            self._range = torch.profiler.record_function(f"flap: {part}")
            self._range.__enter__()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """This part inside, and after it the one before."""
        before = self.part
        self.mark(part)
        try:
            yield
        finally:
            self.mark(before)

    def end(self) -> None:
        """The last mark."""
        self.mark(_REST)
        self._end_range()

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step; waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        pairs = zip(self._marks, self._marks[1:], strict=False)
        for at, ((part, begin), (_, end)) in enumerate(pairs):
            if at in self._begins:
                found.append(dict.fromkeys(PARTS, 0.0))
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
"""Gives the timeline in use, if there is one."""


def waited_for(batches: Iterator[Any], now: Now) -> Iterator[Any]:
    """The batches, with a mark around the wait for each."""
    while True:
        timeline = now()
        if timeline:
            timeline.mark(_WAIT)
        batch = next(batches, None)
        if timeline:
            timeline.mark(_REST)
        if batch is None:
            return
        yield batch


@contextmanager
def watched(engine: Engine, now: Now) -> Iterator[Engine]:
    """The engine, with a mark wherever a part of its step begins.

    After a forward comes the loss: what is done with the embeddings, in two passes for each
    micro-batch and for all of them.
    """

    def mark(part: str) -> None:
        if timeline := now():
            timeline.mark(part)

    with ExitStack() as hooks:
        for name, part in _MODULES.items():
            module = getattr(engine.module, name, None)
            if isinstance(module, nn.Module):
                _watch_module(module, part, mark, hooks)
        after = engine.module.register_forward_hook(lambda *_: mark("loss"))
        hooks.callback(after.remove)
        yield cast(Engine, _Watched(engine, mark))  # the rest goes through to it


class _Watched:
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

    def backward(self, loss: Tensor) -> None:
        self._mark("loss")
        self._engine.backward(loss)
        self._mark(_REST)

    def step(self, lr: float) -> Tensor:
        self._mark("optimizer")
        norm = self._engine.step(lr)
        self._mark(_REST)
        return norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _watch_module(
    module: nn.Module, part: str, mark: Callable[[str], None], hooks: ExitStack
) -> None:
    def before(*_: Any) -> None:
        mark(part)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                # Runs as its gradient is there, before what made the tensor is gone through.
                tensor.register_hook(lambda _: mark(part))
        mark(_REST)

    hooks.callback(module.register_forward_pre_hook(before).remove)
    hooks.callback(module.register_forward_hook(after).remove)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for one in output:
            yield from _tensors(one)


# Whatever of these a PyTorch has; a name it lacks is not called either.
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
def watched_collectives(timeline: Now) -> Iterator[None]:
    """Inside, a collective that is waited for is `communication`; one that overlaps is not.

    Open it before the engine is made: DeepSpeed takes hold of the functions then.
    """
    with ExitStack() as patches:
        for name in _COLLECTIVES:
            if (real := getattr(dist, name, None)) is not None:
                setattr(dist, name, _watched_collective(real, timeline))
                patches.callback(setattr, dist, name, real)
        yield


def _watched_collective(real: Callable[..., Any], timeline: Now) -> Any:
    def collective(*arguments: Any, **options: Any) -> Any:
        now = timeline()
        if now is None:
            return real(*arguments, **options)
        with now.within("communication"):
            work = real(*arguments, **options)
        return work if work is None else _WatchedWork(work, timeline)

    return collective


class _WatchedWork:
    """A collective on its way: waiting for it is communication."""

    def __init__(self, work: Any, timeline: Now):
        self._work, self._timeline = work, timeline

    def wait(self, *arguments: Any) -> Any:
        now = self._timeline()
        if now is None:
            return self._work.wait(*arguments)
        with now.within("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
