"""The steps of bench/gpu.py in their order: the most valuable first, since time may run out.

    python -m bench.plan [--quick]      the steps and their time

Estimates are guesses from counts of compilations and calls, no measurements; limits are what a step
may take at most. Whatever a step compiles counts as its time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from bench.tables import markdown
from bench.tasks import ALL_PATCHES, OF_PATCHES, PAPER_CLIPS, Task, others

CONTRACT = "contract tests"
"""The first step: every kernel's contract."""


@dataclass(frozen=True)
class GpuTests:
    """Tests marked `gpu`, compiled; one that fails voids every time of the run."""

    paths: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""


@dataclass(frozen=True)
class Sweep:
    """Tasks with their providers, side by side."""

    tasks: tuple[Task, ...]
    peers: bool = False
    """Whether packages of others are measured as well; without any installed, nothing is."""


@dataclass(frozen=True)
class Program:
    """A module of bench that appends JSON lines to the file that it is given last."""

    module: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    name: str
    work: GpuTests | Sweep | Program
    estimate_s: float
    limit_s: float


def plan(device: str, *, quick: bool) -> list[Step]:
    """The steps for a device."""
    if device == "cpu":
        return _on_cpu()
    steps = _quick() if quick else _full()
    return [
        Step(CONTRACT, GpuTests(("tests/kernels/test_every_kernel.py",)), 60, 120),
        Step("ceilings", Program("bench.ceilings"), 15, 40),
        *steps,
    ]


_TILES = Program("bench.tiles", needs=("triton",))
_TRAINER = ("pydantic", "yaml", "transformers", "typer")
_TESTED = (*_TRAINER, "soundfile", "webdataset", "PIL")


def _full() -> list[Step]:
    large = Task("infonce", 65_536)
    small = tuple(Task("infonce", B) for B in (4608, 2304))
    paper = tuple(Task(op, PAPER_CLIPS) for op in ALL_PATCHES)
    duplicates = tuple(
        Task(op, 65_536) for op in ("sigmoid_loss", "infonce_mask", "infonce_positive")
    )
    rest = (
        *others("paper"),
        *(Task("infonce", B) for B in (32_768, 8192)),
        *(Task("cyclic", B) for B in (4608, 32_768)),
        *(Task(op, clips) for clips in (72, 36) for op in OF_PATCHES),
    )
    return [
        Step("InfoNCE at 65,536", Sweep((large,)), 45, 90),
        Step("tiles and library products", _TILES, 80, 130),
        Step("InfoNCE at 4,608 and 2,304", Sweep(small), 50, 80),
        Step("patches at 288 clips", Sweep(paper), 70, 110),
        Step("sigmoid loss and ids at 65,536", Sweep(duplicates), 45, 80),
        Step("training step", Program("bench.training_step", needs=_TRAINER), 110, 150),
        Step("peers", Sweep((large, small[0]), peers=True), 60, 100),
        Step(
            "trainer's GPU tests", GpuTests(("tests/training", "tests/encoders"), _TESTED), 70, 110
        ),
        Step("InfoNCE at 262,144", Sweep((Task("infonce", 262_144),)), 15, 40),
        Step("all kernel tests", GpuTests(("tests/kernels",)), 70, 150),
        Step("other sizes", Sweep(rest), 90, 200),
    ]


def _quick() -> list[Step]:
    paper = tuple(Task(op, PAPER_CLIPS) for op in ALL_PATCHES)
    return [
        Step("InfoNCE at 65,536 and 4,608", Sweep((Task("infonce", 65_536), *_4608)), 50, 70),
        Step("patches at 288 clips", Sweep(paper), 50, 70),
        Step("others", Sweep(tuple(others("paper"))), 30, 60),
    ]


_4608 = (Task("infonce", 4608), Task("sigmoid_loss", 4608))


def _on_cpu() -> list[Step]:
    """Small sizes, to try the code."""
    squared = tuple(Task("infonce", B) for B in (256, 512))
    losses = ("cyclic", "sigmoid_loss", "infonce_mask", "infonce_positive")
    rest = (
        *(Task(op, 256) for op in losses),
        *(Task(op, 2) for op in ALL_PATCHES),
        *others("odd"),
    )
    return [
        Step(CONTRACT, GpuTests(()), 0, 10),
        Step("ceilings", Program("bench.ceilings", ("--device", "cpu")), 8, 40),
        Step("InfoNCE", Sweep(squared), 20, 120),
        Step("peers", Sweep(squared[:1], peers=True), 10, 60),
        Step("others", Sweep(rest), 60, 300),
    ]


def tasks(device: str, *, quick: bool) -> list[Task]:
    """All tasks of the plan, each once."""
    sweeps = (step.work for step in plan(device, quick=quick))
    found = (task for work in sweeps if isinstance(work, Sweep) for task in work.tasks)
    return list(dict.fromkeys(found))


def only(steps: list[Step], *, ops: tuple[str, ...], names: tuple[str, ...]) -> list[Step]:
    """The steps whose names contain one of `names`, with only the tasks of `ops`, where given.

    The contract tests and the ceilings stay: without them no time counts.
    """
    found = steps[:2]
    for step in steps[2:]:
        work = step.work
        if names and not any(name in step.name for name in names):
            continue
        if ops:
            if not isinstance(work, Sweep):
                continue
            work = replace(work, tasks=tuple(task for task in work.tasks if task.op in ops))
            if not work.tasks:
                continue
        found.append(replace(step, work=work))
    return found


def table(steps: list[Step]) -> str:
    """The steps, their estimates and the time at which each would end."""
    rows, at = [["step", "estimate s", "limit s", "ends at min"]], 0.0
    for step in steps:
        at += step.estimate_s
        rows.append([step.name, f"{step.estimate_s:g}", f"{step.limit_s:g}", f"{at / 60:.1f}"])
    return markdown(rows)


def main() -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan")
    parser.add_argument("--quick", action="store_true")
    print(table(plan("cuda", quick=parser.parse_args().quick)))


if __name__ == "__main__":
    main()
