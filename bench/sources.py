"""How well a recipe does on a source that it was not trained on: leave-one-source-out.

    python -m bench.sources run NAME CONFIG [SETTING=VALUE ...] --data MANIFEST [--data ...]
    python -m bench.sources table

`run` trains CONFIG on all sources of the manifests but one (rows name their `source`) for
--seconds of wall time, and retrieves among the sounds of the one left out; so for each source and
each seed. It stores each training in bench/results/sources/NAME.json as it ends: the same command
goes on where it was stopped. `table` writes bench/SOURCES.md from these files.

Training takes the rows of split `train`, scoring all rows of the source left out. Captions that are
equal are right for each other's sounds (eval.equal_captions). Beside it stands the first manifest's
`val`, where no source of it was left out.

--seconds are those of the whole process: a pilot on this machine tells how many steps they buy.
--pretrain trains the same sources before, with further settings; the audio tower goes on from it.
--together leaves out several sources at a time, each scored alone: fewer trainings, of less data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, alone, machine, write_json
from bench.reproduce import DIRECTIONS, SEEDS, flap
from bench.sources_table import write_table
from flap_fast.checks import require
from flap_fast.config.file import load_config
from flap_fast.data.enriched import FILE as CAPTIONS
from flap_fast.files import read_rows

RESULTS = ROOT / "bench/results/sources"
CURVE = 4
"""Evaluations in a training, the last one at its end."""
PILOT_STEPS = (40, 120)
SCORES = ("R@1", "R@5", "R@10", "mAP@10")


@dataclass(frozen=True)
class Shards:
    """The shards of all sources."""

    folder: Path
    sources: dict[str, int]
    """The clips of each source."""
    seen: frozenset[str]
    """Sources of the first manifest, whose `val` is scored beside."""
    val: bool
    """Whether it has one."""

    def settings(self, left_out: tuple[str, ...]) -> list[str]:
        """data.train and data.val of a training."""
        train = [self.folder / "train" / s for s in self.sources if s not in left_out]
        val = [self.folder / "whole" / s for s in left_out]
        if self.val and not self.seen & set(left_out):
            val.append(self.folder / "val/val")
        return [f"data.{k}=[{','.join(map(str, v))}]" for k, v in (("train", train), ("val", val))]


def prepared(manifests: list[Path], folder: Path, enrich: Sequence[str] = ()) -> Shards:
    """Shards of each source: whole, its split `train`, and the first manifest's `val`.

    With `enrich`, arguments of `flap enrich`, those to train on have enriched captions.
    """
    rows = [
        row | {"audio": str((file.parent / row["audio"]).resolve()), "first": file == manifests[0]}
        for file in manifests
        for _, row in read_rows(file)
    ]
    missing = sum("source" not in row or "split" not in row for row in rows)
    require(not missing, "each row of the manifests", "have source and split", f"{missing} without")
    sources = sorted({row["source"] for row in rows})
    trained = {row["source"] for row in rows if row["split"] == "train"}
    rule = "have rows of split train"
    require(trained == set(sources), "each source", rule, f"none of {set(sources) - trained}")
    parts = {
        "whole": [row | {"split": row["source"]} for row in rows],
        "train": [row | {"split": row["source"]} for row in rows if row["split"] == "train"],
        "val": [row for row in rows if row["first"] and row["split"] == "val"],
    }
    for name, some in parts.items():
        if not some:
            continue  # no val: nothing is scored beside
        listed = folder / f"{name}.jsonl"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(json.dumps(row) + "\n" for row in some))
        flap("prepare", str(listed), str(folder / name))
    for source in sources:
        train = folder / "train" / source
        if enrich:
            flap("enrich", str(train), str(train), *enrich)
            continue
        rule, remedy = "have no enriched captions without --enrich", "name another folder"
        require(not (train / CAPTIONS).exists(), "the shards of --shards", rule, train, remedy)
    counts = {s: sum(row["source"] == s for row in rows) for s in sources}
    seen = frozenset(row["source"] for row in rows if row["first"])
    return Shards(folder, counts, seen, bool(parts["val"]))


def folds(sources: dict[str, int], together: int) -> list[tuple[str, ...]]:
    """Sources to leave out at a time: largest with smallest, that no fold lacks much data."""
    ordered = sorted(sources, key=lambda s: (-sources[s], s))
    count = -(-len(ordered) // together)
    out: list[list[str]] = [[] for _ in range(count)]
    for n, source in enumerate(ordered):
        turn, fold = divmod(n, count)
        out[fold if turn % 2 == 0 else count - 1 - fold].append(source)
    return [tuple(fold) for fold in out]


def run(asked: argparse.Namespace) -> None:
    """Train and store what is not stored yet."""
    shards = prepared(asked.data, asked.shards, asked.enrich.split())
    unknown = set(asked.only or ()) - set(shards.sources)
    require(not unknown, "--only", f"be some of {', '.join(shards.sources)}", unknown)
    file = RESULTS / f"{asked.name}.json"
    recipe = {
        "config": str(asked.config.resolve().relative_to(ROOT)),
        "settings": asked.settings,
        "seconds": asked.seconds,
        "together": asked.together,
        "threads": asked.threads,
        "enrich": asked.enrich,
        "pretrain": asked.pretrain,
        "pretrain_steps": asked.pretrain_steps,
        "config_sha256": _digest(load_config(asked.config, asked.settings).model_dump_json()),
        "data_sha256": _digest(*(file.read_text() for file in asked.data)),
    }
    if file.exists():
        found = json.loads(file.read_text())
        if asked.steps:
            recipe["steps"] = asked.steps
        # Files of before say nothing of what is new here; those without digests stay as they are.
        was = {"enrich": "", "pretrain": "", "pretrain_steps": 0} | found
        was = {name: was.get(name) for name in recipe}
        if was != recipe:
            sys.exit(f"{file} must hold the same recipe, got {was}; take another NAME")
    else:
        steps = asked.steps or steps_in(asked, shards)
        batch = load_config(asked.config, asked.settings).train.global_batch
        about = {"steps": steps, "batch": batch, "machine": machine("cpu")}
        found = {"name": asked.name, **recipe, **about}
        found["runs"] = []
    done = {(tuple(r["left_out"]), r["seed"]) for r in found["runs"]}
    left = [
        (out, seed)
        for seed in SEEDS[: asked.seeds]
        for out in folds(shards.sources, asked.together)
        if (out, seed) not in done and (not asked.only or set(out) & set(asked.only))
    ]

    def train_one(out: tuple[str, ...], seed: int) -> None:
        one = trained(asked, shards, found["steps"], out, seed)
        _store(file, found, one)
        print(_line(one), flush=True)

    with ThreadPoolExecutor(asked.jobs) as pool:
        trainings = [pool.submit(train_one, *of) for of in left]
        try:
            for training in as_completed(trainings):
                training.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run end, and are stored
            raise


def _store(file: Path, begun: dict[str, Any], one: dict[str, Any]) -> None:
    """Add a training to the file, or to that of another process with the same recipe."""
    with alone(file.parent):
        found = json.loads(file.read_text()) if file.exists() else begun
        stored = [(r["left_out"], r["seed"]) for r in found["runs"]]
        if (one["left_out"], one["seed"]) not in stored:
            found["runs"].append(one)
            write_json(file, found)


def trained(
    asked: argparse.Namespace, shards: Shards, steps: int, left_out: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """One training: its scores on the sources left out, on `val`, and on its way."""
    name = f"{asked.name}-{'-'.join(left_out)}-{seed}"
    more = [*shards.settings(left_out), f"eval.every_steps={-(-steps // CURVE)}"]
    took = 0.0
    if asked.pretrain:
        first = [shards.settings(left_out)[0], "data.val=[]", *asked.pretrain.split()]
        took += train(asked, first, f"{name}-first", seed, asked.pretrain_steps)
        more.append(f"train.init_audio_from={asked.runs / name}-first")
    took += train(asked, more, name, seed, steps)
    folder = asked.runs / name
    scores = json.loads((folder / "eval.json").read_text())["retrieval"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "eval_s" in row]
    curve = [
        [row["step"], *(_mean(row[f"{s}/{way}/R@10"] for s in left_out) for way in DIRECTIONS)]
        for row in rows
    ]
    chosen = {
        among: {
            way: {key: found[way][key] for key in SCORES} | {"chance": found["chance"][way]["R@10"]}
            for way in DIRECTIONS
        }
        for among, found in scores.items()
    }
    about = {"left_out": list(left_out), "seed": seed, "seconds": round(took, 1)}
    return {**about, "steps": steps, "curve": curve, "scores": chosen}


def steps_in(asked: argparse.Namespace, shards: Shards) -> int:
    """Steps that the seconds buy on this machine, with the start and one evaluation of four."""
    left_out = folds(shards.sources, asked.together)[0]
    took = [
        train(asked, shards.settings(left_out), f"pilot-{steps}", SEEDS[0], steps)
        for steps in PILOT_STEPS
    ]
    step_s = (took[1] - took[0]) / (PILOT_STEPS[1] - PILOT_STEPS[0])
    return PILOT_STEPS[1] + int((asked.seconds - took[1]) / step_s)


def train(asked: argparse.Namespace, more: list[str], name: str, seed: int, steps: int) -> float:
    """Seconds of `flap train`, from the start of its process to the end.

    Args:
        more: settings beside the recipe's.
    """
    own = [f"run.folder={asked.runs}", f"run.name={name}", f"run.seed={seed}"]
    own += [f"train.steps={steps}", "train.epochs=null", "eval.equal_captions=true"]
    own += ["ckpt.every_steps=0", "ckpt.keep_best=false", "log.tensorboard=false"]
    shutil.rmtree(asked.runs / name, ignore_errors=True)
    begun = time.perf_counter()
    flap("train", str(asked.config), *asked.settings, *more, *own, threads=asked.threads)
    return time.perf_counter() - begun


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _line(one: dict[str, Any]) -> str:
    each = [
        f"{among} " + "/".join(f"{found[way]['R@10']:.3f}" for way in DIRECTIONS)
        for among, found in one["scores"].items()
    ]
    return f"seed {one['seed']}, {one['steps']} steps, {one['seconds']:.0f} s: {', '.join(each)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = parser.add_subparsers(dest="command", required=True)
    named.add_parser("table", help="write bench/SOURCES.md")
    own = named.add_parser("run", help="train a recipe, one source left out at a time")
    own.add_argument("name", help="of the result")
    own.add_argument("config", type=Path)
    own.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    own.add_argument("--data", type=Path, action="append", required=True, metavar="MANIFEST")
    own.add_argument("--seconds", type=float, default=400.0, help="of wall time, each training")
    own.add_argument("--steps", type=int, help="instead of what a pilot finds")
    own.add_argument("--seeds", type=int, default=3, choices=range(1, len(SEEDS) + 1))
    own.add_argument("--together", type=int, default=1, help="sources left out at a time")
    own.add_argument("--only", nargs="*", metavar="SOURCE", help="leave out only these")
    own.add_argument("--threads", type=int, default=0, help="of a training; 0: PyTorch's choice")
    own.add_argument("--jobs", type=int, default=1, help="trainings at a time; for timings 1")
    own.add_argument("--enrich", default="", help="of flap enrich, in quotes: '--model none'")
    own.add_argument("--pretrain", default="", help="settings of a run before, in quotes")
    own.add_argument("--pretrain-steps", type=int, default=0, help="its steps, beside --steps")
    own.add_argument("--shards", type=Path, default=ROOT / "data/sources")
    own.add_argument("--runs", type=Path, default=ROOT / "runs/sources")
    asked = parser.parse_args(arguments)
    if asked.command == "table":
        print(write_table(RESULTS, ROOT / "bench/SOURCES.md"))
        return 0
    before = bool(asked.pretrain), bool(asked.pretrain_steps), bool(asked.pretrain and asked.steps)
    if any(before) and not all(before):
        parser.error("--pretrain must come with --steps and --pretrain-steps")
    run(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
