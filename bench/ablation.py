"""Relative ablations on the demo's sounds: the same steps and seeds for every system.

    make data && python -m bench.ablation masking [--seeds 3] [--steps 150] [--jobs 2]
    make data && python -m bench.ablation objectives --steps 100

Each run is `flap train configs/demo.yaml` with the overrides below, a smaller tower and one thread,
scored once, at its end, on the demo's 64 validation clips. Throughput is measured afterwards, one
system at a time. A finished run is not repeated, so a stopped command can be resumed. On a data set
this small the spread between seeds is large: a difference within it is no evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from bench import report
from bench.machine import ROOT, machine, save
from bench.report_training import ablation_table
from flap_fast.config.file import load_config
from flap_fast.evaluation.flops import encoder_flops
from flap_fast.evaluation.run import selection_score

# Half of the demo's duration, which most of its sounds fit in, and a ninth of its parameters.
# On a fixed grid, as the papers train.
_SMALL = (
    *("audio.length=fixed", "audio.duration_s=2.5", "audio.frames=256", "audio.width=96"),
    *("audio.depth=3", "audio.use_cls=true", "sched.warmup_steps=30"),
)
_DECODER = ("loss.recon.weight=1", "decoder.width=96", "decoder.depth=2")
ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "masking": {
        "no mask": ("mask.kind=none",),
        "1-D 0.4": ("mask.kind=1d", "mask.ratio=0.4"),
        "2-D 0.2/0.2": ("mask.kind=2d",),
        "2-D 0.2/0.2 + reconstruction": ("mask.kind=2d", *_DECODER),
    },
}
# From scratch, at the 16 kHz of the demo's shards: an HTSAT of two stages, a small RoBERTa.
_CLAP = (
    *("audio.encoder=htsat", "audio.mel=clap", "audio.sample_rate_hz=16000", "audio.high_hz=8000"),
    *("audio.frames=251", "audio.mel_bins=32", "audio.depth=null", "audio.depths=[2,2]"),
    *("audio.width=32", "audio.use_cls=null", "mask.kind=none"),
    *("text.folder=null", "text.freeze=false"),
    *("text.dropout=0.1", "text.width=128", "text.depth=2", "text.heads=4"),
)
_CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")
ABLATIONS["objectives"] = {
    "CLAP": _CLAP,
    "CyCLAP": (*_CLAP, *_CYCLIC),
    "CyCLAPs": (*_CLAP, *_CYCLIC, "loss.simcse.weight=0.1"),
}
_RUNS = ROOT / "runs" / "ablation"
_TIMED_STEPS = 16


def main() -> None:
    """Train the missing runs, time each system, store and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("ablation", choices=ABLATIONS)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    given = arguments.parse_args()
    systems = ABLATIONS[given.ablation]
    seeds = range(1, given.seeds + 1)
    todo = [(name, seed) for seed in seeds for name in systems]
    facts = machine("cpu")
    with ThreadPoolExecutor(given.jobs) as pool:
        scores = list(pool.map(lambda one: _score(systems, one[0], one[1], given.steps), todo))
    rows = []
    for name, overrides in systems.items():
        mine = [score for (n, _), score in zip(todo, scores, strict=True) if n == name]
        rows.append(
            {
                "system": name,
                "overrides": list(overrides),
                "scores": mine,
                "gflops": _gflops(overrides),
                "clips_per_s": _throughput(name, overrides),
            }
        )
    result = {
        "kind": f"ablation_{given.ablation}",
        "machine": facts,
        "steps": given.steps,
        "seeds": list(seeds),
        "rows": rows,
    }
    file = save(ROOT / "bench", result)
    report.write(ROOT / "bench")
    print(ablation_table(result))
    print(f"written to {file.relative_to(ROOT)}")


def _score(
    systems: dict[str, tuple[str, ...]], name: str, seed: int, steps: int
) -> dict[str, float]:
    """Scores of a run on the validation clips; trains the run first if necessary."""
    folder = f"{name}-{seed}-{steps}".replace("/", "_").replace(" ", "_").replace("+", "and")
    done = _RUNS / folder / "eval.json"
    if not done.is_file():
        _train(folder, f"run.seed={seed}", f"train.steps={steps}", *systems[name])
    found = json.loads(done.read_text())
    (val,) = found["retrieval"].values()
    return {
        "mAP@10": selection_score(found),
        "A-T R@10": val["audio_to_text"]["R@10"],
        "T-A R@10": val["text_to_audio"]["R@10"],
    }


def _gflops(overrides: tuple[str, ...]) -> float:
    """GFLOP of the audio encoder's forward pass over one clip, masked as in training."""
    config = load_config(ROOT / "configs/demo.yaml", [*_SMALL, *overrides])
    return encoder_flops(config, fused=True) / 1e9


def _throughput(name: str, overrides: tuple[str, ...]) -> float:
    """Median clips/s of a run's steps after warm-up, with one thread."""
    folder = f"timed-{name}".replace("/", "_").replace(" ", "_").replace("+", "and")
    shutil.rmtree(_RUNS / folder, ignore_errors=True)
    _train(folder, f"train.steps={_TIMED_STEPS}", "log.every_steps=1", "data.val=[]", *overrides)
    rows = [json.loads(line) for line in (_RUNS / folder / "metrics.jsonl").open()]
    return statistics.median(row["clips_per_s"] for row in rows[_TIMED_STEPS // 4 :])


def _train(name: str, *overrides: str) -> None:
    command = [sys.executable, "-m", "flap_fast", "train", "configs/demo.yaml", "--resume"]
    fixed = (f"run.folder={_RUNS}", f"run.name={name}", "frontend.threads=1", *_SMALL)
    done = subprocess.run(
        [*command, *fixed, *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    print(f"{name}: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
