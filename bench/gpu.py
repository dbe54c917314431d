"""All GPU tests and benchmarks in one command: tests first, then time and memory.

    python -m bench.gpu            on a CUDA device, within 9 minutes (--quick: within 2)
    python -m bench.gpu --device cpu --quick      the same code at small sizes, to try it

Needs torch, triton, pytest and pytest-benchmark; peers that are installed are measured as well.
Writes results/DEVICE-DATE-COMMIT-sweep.json and RESULTS.md under --out, and prints its table last.
Ends with 1 if a test fails or ours fails anywhere: then the times count for nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import gpu_tests, report
from bench.machine import ROOT, machine, save
from bench.measure import ceilings
from bench.peers import ours
from bench.sweep import BOTH, Row
from bench.tasks import Task, providers, tasks
from flap_kernels.launch import interpreted

_COMMAND = (sys.executable, "-m", "bench.sweep")
# Time limits in seconds: in all, of the tests, of one task's rounds, of one call that may hang.
_LIMITS = {False: (530.0, 170.0, 10.0, 90.0), True: (110.0, 40.0, 3.0, 30.0)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    begun = time.monotonic()
    asked = _parser().parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.gpu needs a CUDA device, and torch sees none; "
            "to try its code on the CPU: python -m bench.gpu --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    if asked.device == "cpu" and not asked.quick:
        print("bench.gpu on a CPU is for trying it: add --quick", file=sys.stderr)
        return 2
    if interpreted():
        print("a benchmark must not be interpreted: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    whole_s, tests_s, budget_s, hang_s = _LIMITS[asked.quick]
    deadline = begun + (asked.minutes * 60 if asked.minutes else whole_s)
    if asked.device == "cpu":
        budget_s = 0.3
    facts = machine(asked.device)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {facts['commit']}")
    small = {"size": 512, "copy_mib": 32} if asked.device == "cpu" else {}
    result: dict[str, Any] = {
        "kind": "sweep",
        "device": asked.device,
        "quick": asked.quick,
        "machine": facts,
        "ceilings": ceilings(asked.device, **small),
        "gpu_tests": gpu_tests.run(asked.device, quick=asked.quick, limit_s=tests_s),
    }
    print(gpu_tests.sentence(result["gpu_tests"]))
    chosen = [task for task in tasks(asked.device, quick=asked.quick) if _wanted(task, asked.ops)]
    without = [name for name in asked.without.split(",") if name]
    rows = sweep(chosen, asked.device, deadline, budget_s=budget_s, hang_s=hang_s, without=without)
    result["rows"] = [asdict(row) for row in rows]
    out = Path(asked.out or ("bench" if asked.device == "cuda" else "scratch/bench"))
    file = save(out, result)
    report.write(out)
    print(report.sweep_table(result))
    print(f"{time.monotonic() - begun:.0f} s; written: {file}, {out / 'RESULTS.md'}")
    broken = [row for row in rows if row.provider == ours(asked.device) and row.status == "failed"]
    return 1 if broken or gpu_tests.is_red(result["gpu_tests"]) else 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and tests")
    parser.add_argument("--minutes", type=float, help="end within this time")
    parser.add_argument("--ops", default="", help="only these ops, separated by commas")
    parser.add_argument(
        "--without", default="", help="skip providers whose names contain one of these"
    )
    parser.add_argument("--out", help="folder (bench; scratch/bench on a CPU)")
    return parser


def _wanted(task: Task, ops: str) -> bool:
    return not ops or task.op in ops.split(",")


def sweep(
    order: list[Task],
    device: str,
    deadline: float,
    *,
    budget_s: float,
    hang_s: float,
    without: list[str],
) -> list[Row]:
    """The rows of all tasks; tasks that were not reached in time get rows with status `no time`.

    `deadline` is in the time of time.monotonic(). A process that dies or hangs is restarted
    without the provider that it was running.
    """
    barred: dict[str, dict[str, str]] = {task.name: {} for task in order}
    for task in order:
        for name in providers(task.op, device):
            if any(piece in name for piece in without):
                barred[task.name][name] = "left out: on request"
    done: dict[int, list[Row]] = {}
    while len(done) < len(order) and time.monotonic() < deadline:
        left = {i: task for i, task in enumerate(order) if i not in done}
        culprit = _work(left, device, deadline, budget_s, hang_s, barred, done)
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
                for line in _complete(lines):
                    event, since = json.loads(line), time.monotonic()
                    number, stage = event["task"], event.get("begin", "")
                    if "rows" in event:
                        done[number] = [Row(**row) for row in event["rows"]]
                        print(f"  {left[number].name}", flush=True)
                now = time.monotonic()
                if now > deadline or (ended and all(i in done for i in left)):
                    return None
                if ended:
                    return number, stage, f"its process ended: {_last_line(log)}"
                # Imports, and the timing of all providers, get twice the limit.
                limit_s = 2 * hang_s if stage in ("", "timing") else hang_s
                if now - since > limit_s:
                    return number, stage, f"longer than {limit_s:g} s"
                time.sleep(0.05)


@contextmanager
def _process(order: Path, results: Path, log: Path) -> Iterator[subprocess.Popen]:
    """Start bench/sweep.py in a process, which is killed on exit."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [*_COMMAND, str(order), str(results)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _complete(lines: Any) -> Iterator[str]:
    """Yield the complete lines; an incomplete last line is left for the next call."""
    while True:
        at = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(at)
            return
        yield line


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"


def _without_numbers(task: Task, device: str, status: str, why: str) -> list[Row]:
    names = providers(task.op, device)
    return [Row(task.op, task.B, name, BOTH, status, reason=why) for name in names]


if __name__ == "__main__":
    sys.exit(main())
