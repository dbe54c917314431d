"""Peak FLOP/s and free memory of a device, and the memory that this process uses."""

from __future__ import annotations

import os
import resource
import time
from itertools import accumulate
from pathlib import Path

import torch

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MACHINE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Memory:
    """This process's memory on a device, in bytes: what PyTorch has allocated on a GPU; on a CPU,
    the growth of the resident set since this object was made."""

    def __init__(self, device: torch.device):
        self._device = device
        self._base = 0 if device.type == "cuda" else resident_bytes()

    @property
    def what(self) -> str:
        """Description of the numbers."""
        if self._device.type == "cuda":
            return "allocated on the GPU by PyTorch"
        return "resident, above the start"

    def begin(self) -> None:
        """Reset the peak (on a CPU: if the kernel allows it)."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _REFERENCES.exists():
            _REFERENCES.write_text("5")

    def peak(self) -> int:
        """Peak since `begin`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status("VmHWM", _peak_of_the_process) - self._base

    def steady(self) -> int:
        """Memory in use now, between steps."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return resident_bytes() - self._base


def resident_bytes() -> int:
    """This process's resident set."""
    return _status("VmRSS", _peak_of_the_process)


def free_bytes(device: torch.device) -> int:
    """Free bytes of a device: of a CPU, before the machine or its container swaps."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MACHINE.exists():
        lines = dict(line.split(":", 1) for line in _MACHINE.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    most, now = _GROUP / "memory.max", _GROUP / "memory.current"
    if most.exists() and now.exists() and (limit := most.read_text().strip()).isdigit():
        free = min(free, int(limit) - int(now.read_text()))
    return free


def measure_ceiling(device: torch.device, *, half: bool, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest of several large matrix products of random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if half else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    torch.mm(a, b, out=out)
    best, until = float("inf"), wait() + seconds
    begun = wait()
    while begun < until or best == float("inf"):
        torch.mm(a, b, out=out)
        now = wait()
        best, begun = min(best, now - begun), now
    return 2 * size**3 / best


def most_allocated(traced: torch.profiler.profile) -> int:
    """Peak bytes that PyTorch allocated on a CPU above those at the start."""
    assert traced.profiler is not None
    events = traced.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    sizes = (e.nbytes() for e in memory)  # type: ignore[attr-defined]
    return max(accumulate(sizes, initial=0))


def _status(name: str, otherwise) -> int:
    if not _STATUS.exists():
        return otherwise()
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _peak_of_the_process() -> int:
    """Peak bytes of the process where /proc does not exist."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
