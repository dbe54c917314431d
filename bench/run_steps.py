"""Runs the steps of a plan until a deadline, and saves the result after each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import gpu_tests
from bench.deadline import in_a_group
from bench.peers import any_installed, is_package
from bench.plan import CONTRACT, GpuTests, Program, Step, Sweep
from bench.records import merge, merge_rows
from bench.sweep import Row
from bench.sweep_process import complete_lines, last_line, sweep
from bench.tasks import providers

# A step begins if it has this share of its estimate left: what it writes on its way is kept.
_ENOUGH = 0.4


@dataclass(frozen=True)
class Run:
    """What the steps of a run share."""

    device: str
    deadline: float
    """In the time of time.monotonic()."""
    budget_s: float
    """Time for the rounds of one task."""
    hang_s: float
    """Time for one call that may hang."""
    without: tuple[str, ...]
    """Providers whose names contain one of these are left out."""
    result: dict[str, Any]
    save: Callable[[], object]


def run_steps(steps: list[Step], run: Run) -> None:
    """Run the steps that are not done; `result["steps"]` says of each what became of it.

    Its status is `done`, `failed`, `cut off`, `skipped` or `not reached`.
    """
    before = {record["step"]: record for record in run.result["steps"]}
    records = [before.get(step.name) or _record(step) for step in steps]
    run.result["steps"] = records
    for step, record in zip(steps, records, strict=True):
        if record["status"] == "done":
            continue
        left_s = run.deadline - time.monotonic()
        if left_s < max(0.5, _ENOUGH * step.estimate_s):
            record.update(_NOT_REACHED, reason=f"{max(0.0, left_s):.0f} s were left")
            continue
        print(f"{step.name} ...", flush=True)
        record.update(status="cut off", reason="the run ended in it")
        run.save()  # what a file says that is left by a killed run
        since = time.monotonic()
        status, reason = _run(step, run, min(run.deadline, since + step.limit_s))
        record.update(status=status, reason=reason, seconds=round(time.monotonic() - since, 1))
        run.save()
        print(f"{step.name}: {status}, {record['seconds']:g} s {reason}".rstrip(), flush=True)
    run.save()


_NOT_REACHED = {"status": "not reached", "seconds": None}


def _record(step: Step) -> dict[str, Any]:
    return {"step": step.name, "estimate_s": step.estimate_s, **_NOT_REACHED, "reason": ""}


def _run(step: Step, run: Run, deadline: float) -> tuple[str, str]:
    """Run one step; returns its status and the reason."""
    needs = () if isinstance(step.work, Sweep) else step.work.needs
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        return "skipped", f"needs {', '.join(missing)}"
    if isinstance(step.work, GpuTests):
        return _run_tests(step, step.work, run, deadline)
    if isinstance(step.work, Sweep):
        return _run_sweep(step.work, run, deadline)
    return _run_program(step.work, run, deadline)


def _run_tests(step: Step, tests: GpuTests, run: Run, deadline: float) -> tuple[str, str]:
    found = gpu_tests.run(run.device, tests.paths, limit_s=deadline - time.monotonic())
    if step.name == CONTRACT:
        run.result["gpu_tests"] = found
    else:
        run.result.setdefault("more_tests", {})[step.name] = found
    print(gpu_tests.sentence(found))
    status = {"passed": "done", "not run": "done", "not finished": "cut off"}
    return status.get(found["status"], "failed"), found.get("reason", "")


def _run_sweep(work: Sweep, run: Run, deadline: float) -> tuple[str, str]:
    left_out = {}
    if not work.peers:
        names = {name for task in work.tasks for name in providers(task.op, run.device)}
        left_out = {name: "see the step `peers`" for name in names if is_package(name)}
    elif not any_installed():
        return "skipped", "no peer is installed"

    def each(rows: list[Row]) -> None:
        merge_rows(run.result, [asdict(row) for row in rows])
        run.save()

    rows = sweep(
        list(work.tasks),
        run.device,
        deadline,
        budget_s=run.budget_s,
        hang_s=run.hang_s,
        without=run.without,
        left_out=left_out,
        each=each,
    )
    # Reasons why a task has no numbers; they replace none.
    known = {(row["op"], row["B"]) for row in run.result["rows"]}
    merge_rows(run.result, [asdict(row) for row in rows if (row.op, row.B) not in known])
    late = {f"{row.op} B={row.B or 'paper'}" for row in rows if row.status == "no time"}
    return ("cut off", f"without {', '.join(sorted(late))}") if late else ("done", "")


def _run_program(work: Program, run: Run, deadline: float) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder) / "results", Path(folder) / "log"
        results.touch()
        command = [sys.executable, "-m", work.module, *work.arguments, str(results)]
        with (
            log.open("w") as output,
            results.open() as lines,
            in_a_group(command, output) as process,
        ):
            while True:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(0.2, max(0.0, deadline - time.monotonic())))
                for line in complete_lines(lines):
                    merge(run.result, json.loads(line))
                    run.save()
                if process.returncode is not None:
                    break
                if time.monotonic() >= deadline:
                    return "cut off", f"longer than its time; last: {last_line(log)}"
        said = last_line(log)
        print(said)
        return ("done", "") if process.returncode == 0 else ("failed", said)
