"""Runs bench/sweep.py in a process, and starts it again when a call dies or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.deadline import in_a_group
from bench.peers import ours
from bench.sweep import BOTH, Row
from bench.tasks import Task, providers

_COMMAND = (sys.executable, "-m", "bench.sweep")


def sweep(
    order: list[Task],
    device: str,
    deadline: float,
    *,
    budget_s: float,
    hang_s: float,
    without: Sequence[str],
    left_out: Mapping[str, str] | None = None,
    each: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all tasks; tasks that were not reached in time get rows with status `no time`.

    `deadline` is in the time of time.monotonic(). A process that dies or hangs is restarted
    without the provider that it was running. `each` gets the rows of a task when it is done.
    Providers whose names contain a word of `without` are left out, and those of `left_out`, for the
    reason there.
    """
    barred: dict[str, dict[str, str]] = {task.name: {} for task in order}
    for task in order:
        for name in providers(task.op, device):
            if left_out and name in left_out:
                barred[task.name][name] = f"left out: {left_out[name]}"
            if any(piece in name for piece in without):
                barred[task.name][name] = "left out: on request"
    done: dict[int, list[Row]] = {}
    while len(done) < len(order) and time.monotonic() < deadline:
        left = {i: task for i, task in enumerate(order) if i not in done}
        culprit = _work(left, device, deadline, budget_s, hang_s, barred, done, each)
        if culprit is None:
            break
        number, stage, why = culprit
        task = order[number]
        if stage in barred[task.name] or stage in ("", "arguments", "timing"):
            done[number] = _without_numbers(task, device, "failed", f"{why}, at {stage or 'start'}")
            continue
        # A peer that crashed its process once is not run again.
        again = [t for t in order if t.op == task.op and stage != ours(device)]
        for other in (task, *again):
            barred[other.name].setdefault(stage, f"failed: {why}, at {task.name}")
    late = {
        i: _without_numbers(task, device, "no time", "the time was up")
        for i, task in enumerate(order)
        if i not in done
    }
    return [row for _, rows in sorted({**done, **late}.items()) for row in rows]


def _work(
    left: dict[int, Task],
    device: str,
    deadline: float,
    budget_s: float,
    hang_s: float,
    barred: dict[str, dict[str, str]],
    done: dict[int, list[Row]],
    each: Callable[[list[Row]], None],
) -> tuple[int, str, str] | None:
    """Run tasks in a process and fill `done`; returns the task, stage and reason of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        order, results, log = (Path(folder) / name for name in ("order", "results", "log"))
        results.touch()
        spec = {
            "device": device,
            "tasks": [(i, asdict(task)) for i, task in left.items()],
            "budget_s": budget_s,
            "barred": barred,
        }
        order.write_text(json.dumps(spec))
        number, stage, since = next(iter(left)), "", time.monotonic()
        with _process(order, results, log) as process, results.open() as lines:
            while True:
                ended = process.poll() is not None
                for line in complete_lines(lines):
                    event, since = json.loads(line), time.monotonic()
                    number, stage = event["task"], event.get("begin", "")
                    if "rows" in event:
                        done[number] = [Row(**row) for row in event["rows"]]
                        each(done[number])
                        print(f"  {left[number].name}", flush=True)
                now = time.monotonic()
                if now > deadline or (ended and all(i in done for i in left)):
                    return None
                if ended:
                    return number, stage, f"its process ended: {last_line(log)}"
                # Imports, and the timing of all providers, get twice the limit.
                limit_s = 2 * hang_s if stage in ("", "timing") else hang_s
                if now - since > limit_s:
                    return number, stage, f"longer than {limit_s:g} s"
                time.sleep(0.05)


@contextmanager
def _process(order: Path, results: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start bench/sweep.py in a process, which is killed on exit."""
    with log.open("w") as output, in_a_group([*_COMMAND, str(order), str(results)], output) as it:
        yield it


def complete_lines(lines: Any) -> Iterator[str]:
    """Yield the complete lines; an incomplete last line is left for the next call."""
    while True:
        at = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(at)
            return
        yield line


def last_line(log: Path) -> str:
    """The last line that a process printed."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"


def _without_numbers(task: Task, device: str, status: str, why: str) -> list[Row]:
    names = providers(task.op, device)
    return [Row(task.op, task.B, name, BOTH, status, reason=why) for name in names]
