"""All GPU tests and benchmarks in one command: tests first, then what is worth most.

    python -m bench.gpu            on a CUDA device, within 13 minutes (--quick: within 4)
    python -m bench.gpu --resume   goes on where a run of this commit was cut off
    python -m bench.gpu --device cpu --quick      the same code at small sizes, to try it

Needs torch, triton, pytest and pytest-benchmark; peers that are installed are measured as well, and
training steps where the trainer's packages are. `python -m bench.plan` prints the steps. Writes
results/DEVICE-DATE-COMMIT-sweep.json under --out after each of them, RESULTS.md at the end, and
prints its table last. Ends with 1 if a test fails or ours fails anywhere: then no time counts.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_tests, plan, report
from bench.deadline import age_s, last_resort
from bench.machine import machine, save
from bench.peers import ours
from bench.run_steps import Run, run_steps
from flap_kernels.launch import interpreted

# Minutes in all, seconds of one task's rounds, seconds of one call that may hang.
_LIMITS = {False: (13.0, 8.0, 60.0), True: (4.0, 3.0, 30.0)}
# A call that nothing interrupts ends the run so many seconds late.
_LAST_RESORT_S = 14.0


def main(arguments: list[str] | None = None, *, begun: float | None = None) -> int:
    """Run the command; returns its exit status. `begun` is in the time of time.monotonic()."""
    begun = time.monotonic() if begun is None else begun
    asked = _parser().parse_args(arguments)
    minutes, budget_s, hang_s = _LIMITS[asked.quick]
    deadline = begun + 60 * (asked.minutes or minutes)
    with last_resort(deadline + _LAST_RESORT_S, lambda: print("bench.gpu: out of time")):
        why_not = _why_not(asked)
        if why_not:
            print(why_not, file=sys.stderr)
            return 2
        facts = machine(asked.device)
        print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}", end=", ")
        print(f"commit {facts['commit']}", flush=True)
        out = Path(asked.out or ("bench" if asked.device == "cuda" else "scratch/bench"))
        result = _begin(asked, facts, out)
        run = Run(
            device=asked.device,
            deadline=deadline,
            budget_s=0.3 if asked.device == "cpu" else budget_s,
            hang_s=hang_s,
            without=_words(asked.without),
            result=result,
            save=partial(save, out, result),
        )
        steps = plan.plan(asked.device, quick=asked.quick)
        run_steps(plan.only(steps, ops=_words(asked.ops), names=_words(asked.steps)), run)
        file = save(out, result)
        report.write(out)
        print(report.sweep_table(result))
        print(f"{time.monotonic() - begun:.0f} s; written: {file}, {out / 'RESULTS.md'}")
    mine = [row for row in result["rows"] if row["provider"] == ours(asked.device)]
    broken = any(row["status"] == "failed" and row["launches"] for row in mine)
    return 1 if broken or gpu_tests.voids(result) else 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and tests")
    parser.add_argument("--minutes", type=float, help="end within this time, to 20 s")
    parser.add_argument("--resume", action="store_true", help="leave out the steps that are done")
    parser.add_argument("--ops", default="", help="only these ops, separated by commas")
    parser.add_argument("--steps", default="", help="only steps whose names contain one of these")
    parser.add_argument(
        "--without", default="", help="skip providers whose names contain one of these"
    )
    parser.add_argument("--out", help="folder (bench; scratch/bench on a CPU)")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _why_not(asked: argparse.Namespace) -> str:
    """Why there is nothing to measure here; empty if there is."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        return (
            "bench.gpu needs a CUDA device, and torch sees none; "
            "to try its code on the CPU: python -m bench.gpu --device cpu --quick"
        )
    if asked.device == "cpu" and not asked.quick:
        return "bench.gpu on a CPU is for trying it: add --quick"
    if interpreted():
        return "a benchmark must not be interpreted: unset TRITON_INTERPRET"
    return ""


def _begin(asked: argparse.Namespace, facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """An empty result; with --resume, the newest one of this device and commit in the folder."""
    same = {"kind": "sweep", "device": asked.device, "quick": asked.quick}
    if asked.resume:
        for found in report.read(out / "results"):
            wanted = same | {"machine": {name: facts[name] for name in ("device", "commit")}}
            mine = {"machine": {name: found["machine"][name] for name in ("device", "commit")}}
            if mine | {name: found.get(name) for name in same} == wanted and "steps" in found:
                print(f"goes on with the run of {found['machine']['date']}")
                return found
        print("nothing of this device and commit to go on with")
    not_run = {"status": "not run", "reason": "not reached"}
    return {**same, "machine": facts, "ceilings": {}, "gpu_tests": not_run, "rows": [], "steps": []}


if __name__ == "__main__":
    # Steps run in groups of their own: what ends this process, such as `timeout`, must end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(begun=time.monotonic() - age_s()))
