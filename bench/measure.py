"""Measures time and peak memory of a call, and a device's limits, for all benchmarks.

Time on a GPU: device events around the call, its L2 cache emptied before each; launches count, as
far as the device waits for them (`graphed` leaves them out). On a CPU: the wall clock. Calls that
are compared take turns, so that what disturbs the machine disturbs them alike. Medians, and the
20th and 80th percentile with them.

Peak memory is what a call adds to what was there before it, its results included. On a GPU: what
PyTorch's allocator hands out, which is all that the providers here use. On a CPU: resident pages
of the process, from Linux's own high-water mark, after freed memory was given back; what a library
keeps between calls (its scratch, threads' stacks) was there before, as calls are warmed up.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flap_kernels.launch import interpreted

Call = Callable[[], object]

# On a GPU each call runs this many times in a row before the next provider's.
_TURNS, _IN_A_ROW = 4, 25
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Timing:
    """Time of a call over its rounds."""

    median_ms: float
    low_ms: float
    """20 % of the rounds were faster."""
    high_ms: float
    """20 % of the rounds were slower."""
    rounds: int

    @classmethod
    def of(cls, times_ms: list[float]) -> Timing:
        """The statistics of one or more measured times."""
        ranked = sorted(times_ms)
        at = [ranked[round(fraction * (len(ranked) - 1))] for fraction in (0.2, 0.8)]
        return cls(statistics.median(ranked), at[0], at[1], len(ranked))


def interleaved(
    calls: Mapping[str, Call], device: str, *, budget_s: float, least_rounds: int = 3
) -> dict[str, Timing]:
    """Time warmed-up calls, interleaved, for about `budget_s` in all.

    Each gets `least_rounds` even if that takes longer. Raises RuntimeError under Triton's
    interpreter: such a time says nothing.
    """
    if interpreted():
        raise RuntimeError("a benchmark must not be interpreted: unset TRITON_INTERPRET")
    if device == "cpu":
        once_s = sum(_cpu_times(call, 1)[0] for call in calls.values()) / 1000
        rounds = min(_MOST_ROUNDS, max(least_rounds, math.floor(budget_s / max(once_s, 1e-9))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name] += _cpu_times(call, 1)
    else:
        times = _cuda_turns(calls, budget_s, least_rounds)
    return {name: Timing.of(found) for name, found in times.items()}


def _cuda_turns(
    calls: Mapping[str, Call], budget_s: float, least_rounds: int
) -> dict[str, list[float]]:
    turns = max(_TURNS, least_rounds)
    turn_ms = 1000 * budget_s / max(len(calls), 1) / turns
    once_ms = {name: _cuda_times(call, 1)[0] for name, call in calls.items()}
    # A call that takes longer than its turn has few rounds: this one counts.
    slow = {name for name, once in once_ms.items() if once > turn_ms}
    times = {name: [once] if name in slow else [] for name, once in once_ms.items()}
    for _ in range(turns):
        for name, call in calls.items():
            if name in slow and len(times[name]) >= least_rounds:
                continue
            torch.cuda.empty_cache()  # no other call's blocks, and no search for room while timed
            if once_ms[name] < 1000:
                call()
            count = min(_IN_A_ROW, max(1, math.floor(turn_ms / max(once_ms[name], 1e-3))))
            times[name] += _cuda_times(call, count)
    return times


def _cpu_times(call: Call, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


def _cuda_times(call: Call, count: int) -> list[float]:
    marks = []
    for _ in range(count):
        _larger_than_l2().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


@cache
def _larger_than_l2() -> Tensor:
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(4 * l2, dtype=torch.int8, device="cuda")


def graphed(call: Call) -> Call:
    """The replay of a CUDA graph of the call: device time without launch overhead.

    Raises RuntimeError where a call cannot be captured, because it waits for the device.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def peak_bytes(call: Call, device: str) -> int | None:
    """Peak memory that a warmed-up call adds; None where the system does not report it."""
    gc.collect()
    if device == "cuda":
        _larger_than_l2()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    _give_freed_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    except OSError:
        return None
    before = _resident("VmRSS")
    results = call()
    peak = _resident("VmHWM")
    del results
    return max(0, peak - before)


def _give_freed_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others hold little back
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    """A size of this process in bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function with static shapes."""
    return torch.compile(function, dynamic=False)


@cache
def why_not_compiled(device: str) -> str | None:
    """Why torch.compile does not work here (for example, no C++ compiler); None if it does."""
    try:
        compiled(torch.sin)(torch.ones(3, device=device))
    except Exception as error:
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text}"[:200]


def ceilings(device: str, *, size: int = 8192, copy_mib: int = 1024) -> dict[str, float]:
    """Peak FLOP/s and bandwidth of this machine, from a library product and a copy of random data.

    `matmul_tflops` in bfloat16 on a GPU, float32 on a CPU; `copy_tb_per_s` counts bytes read plus
    bytes written.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(copy_mib * 2**18, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = interleaved(calls, device, budget_s=2.0 if device == "cuda" else 0.2)
    return {
        "matmul_tflops": 2 * size**3 / times["matmul"].median_ms / 1e9,
        "copy_tb_per_s": 2 * source.nbytes / times["copy"].median_ms / 1e9,
    }
