"""Ends what takes too long: processes in groups that are killed whole, and a last resort."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench.machine import ROOT

_RUNNING: list[subprocess.Popen[bytes]] = []  # what the last resort kills


@contextmanager
def in_a_group(
    command: Sequence[str], output: IO[Any] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the project's folder; it and all that it started are killed on exit."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    _RUNNING.append(process)
    try:
        yield process
    finally:
        kill(process)
        # A process that waits inside the driver may outlive its kill; nothing waits for it.
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
        _RUNNING.remove(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `in_a_group` with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def last_resort(at: float, before: Callable[[], None]) -> Iterator[None]:
    """End this process at `at`, in the time of time.monotonic(), if the body still runs then.

    For calls that no signal of Python's interrupts, such as one into a GPU's driver. `before` is
    called first, and gets a second.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(max(0.0, at - time.monotonic())):
            return
        for process in list(_RUNNING):
            kill(process)
        saving = threading.Thread(target=before, daemon=True)
        saving.start()
        saving.join(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def age_s() -> float:
    """Seconds since this process was started, its imports included; 0 where it is not known."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started_s
    except (OSError, IndexError, ValueError):
        return 0.0
