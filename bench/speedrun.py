"""Seconds from the start of `flap train` to a target: `make speedrun`.

    python -m bench.speedrun [TRACK ...] [--write "what changed"] [--seeds N]

A track is a config, its data and a target that the scores at the end of training must reach, both
ways, as the median over seeds. Its time is the median, over seeds, of the seconds of the whole
process: imports, reading, training, the evaluation, the checkpoint, the exit. Preparing the shards
and installing do not count; nothing may be kept from one run to the next.

--write stores a run that reached its target in less time than any record, with what changed since
the last one, and writes bench/SPEEDRUN.md. To beat one: change whatever you like but the data, the
target and how it is scored; commit; run this.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT, machine, slug, write_json
from bench.reproduce import SEEDS, flap
from bench.tables import facts, markdown

RESULTS = ROOT / "bench/results/speedrun"


@dataclass(frozen=True)
class Track:
    """What is trained, and what it must reach."""

    config: str
    settings: tuple[str, ...]
    score: str
    """A score of `flap eval`'s retrieval."""
    target: dict[str, float]
    """By direction."""
    on: str
    threads: int | None = None
    """PyTorch's and OpenMP's; None leaves them."""
    reference: str = ""
    needs: str = ""
    """How to prepare data that does not come with the project."""


def _both(value: float) -> dict[str, float]:
    return {"audio_to_text": value, "text_to_audio": value}


_FAST = ("train.global_batch=32", "optim.name=muon", "train.precision=bf16")
TRACKS = {
    "demo-80": Track(
        config="configs/demo.yaml",
        settings=(*_FAST, "train.steps=80", "sched.warmup_steps=30"),
        score="R@10",
        target=_both(0.80),
        on="2 threads of a CPU",
        threads=2,
    ),
    "demo-90": Track(
        config="configs/demo.yaml",
        settings=(*_FAST, "train.steps=200", "sched.warmup_steps=40"),
        score="R@10",
        target=_both(0.90),
        on="2 threads of a CPU",
        threads=2,
    ),
    "audiocaps": Track(
        config="configs/flap_variable.yaml",
        settings=(
            *("data.train=[data/audiocaps/train]", "data.val=[data/audiocaps/test]"),
            *("audio.max_duration_s=10", "train.epochs=30", "eval.every_steps=0"),
        ),
        score="R@1",
        target={"text_to_audio": 0.42, "audio_to_text": 0.55},
        on="one machine with GPUs",
        reference=(
            "above FLAP's best R@1 on AudioCaps, 0.415 and 0.530 (arXiv 2311.01615, Table 3). "
            "Another of the kind: mAP@16 0.406 on Clotho, the baseline of DCASE 2025 Task 6"
        ),
        needs="flap prepare --source audiocaps AudioCaps data/audiocaps",
    ),
}


def run(name: str, track: Track, seeds: int) -> dict[str, Any]:
    """Train once a seed; the seconds and the scores."""
    facts_before, runs = machine("cpu" if track.threads else "cuda"), []
    for seed in SEEDS[:seeds]:
        with tempfile.TemporaryDirectory() as folder:
            seconds, scores = trained(track, seed, Path(folder))
        runs.append({"seed": seed, "seconds": round(seconds, 2), "scores": scores})
        print(
            f"{name}, seed {seed}: {seconds:.1f} s, {track.score} {_shown(track, scores)}",
            flush=True,
        )
    median = {way: statistics.median(r["scores"][way] for r in runs) for way in track.target}
    return {
        "track": name,
        "command": " ".join(("flap train", track.config, *track.settings)),
        "seconds": statistics.median(r["seconds"] for r in runs),
        "scores": median,
        "reached": all(median[way] >= least for way, least in track.target.items()),
        "runs": runs,
        "machine": facts_before,
    }


def trained(track: Track, seed: int, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the whole process, and its scores by direction."""
    own = (f"run.folder={folder}", "run.name=run", f"run.seed={seed}")
    begun = time.perf_counter()
    flap("train", track.config, *track.settings, *own, threads=track.threads)
    seconds = time.perf_counter() - begun
    (found,) = json.loads((folder / "run/eval.json").read_text())["retrieval"].values()
    return seconds, {way: found[way][track.score] for way in track.target}


def record_s(track: str) -> float:
    """The least seconds of a track; infinity without a record."""
    found = (json.loads(file.read_text()) for file in RESULTS.glob("*.json"))
    return min((r["seconds"] for r in found if r["track"] == track), default=math.inf)


def store(result: dict[str, Any], change: str) -> Path:
    """Store a record with what changed."""
    file = RESULTS / f"{result['track']}-{slug(result['machine'])}.json"
    write_json(file, result | {"change": change})
    return file


def write_table(results: Path, file: Path) -> None:
    """Write the records of each track, oldest first."""
    records = [json.loads(path.read_text()) for path in results.glob("*.json")]
    records.sort(key=lambda record: record["machine"]["date"])
    blocks = [_HEAD]
    for name, track in TRACKS.items():
        mine = [record for record in records if record["track"] == name]
        least = ", ".join(f"{way.replace('_', ' ')} {v:.2f}" for way, v in track.target.items())
        blocks.append(f"## {name}: {track.score} {least}, on {track.on}\n")
        blocks += [f"Reference: {track.reference}.\n"] if track.reference else []
        blocks += [f"Data: `{track.needs}`.\n"] if track.needs else []
        if not mine:
            blocks.append(f"Not measured. `python -m bench.speedrun {name}`.\n")
            continue
        rows = [["seconds", "range", track.score, "seeds", "won by", "commit", "date"]]
        rows += [_row(track, record) for record in mine]
        last = f"The last: `{mine[-1]['command']}`; {facts(mine[-1]['machine'])}.\n"
        blocks += [markdown(rows), "", last]
    file.write_text("\n".join(blocks))


_HEAD = """\
<!-- Generated by `python -m bench.speedrun` from bench/results/speedrun/*.json. Do not edit. -->

# Speedrun

Seconds from the start of `flap train` to its end, the median over seeds, where the median of the
scores reaches the target in each direction. `make speedrun` runs the tracks of a CPU. The rules,
and how to beat a record: `bench/speedrun.py`.
"""


def _row(track: Track, record: dict[str, Any]) -> list[str]:
    seconds = [r["seconds"] for r in record["runs"]]
    at, about = f"{min(seconds):.1f} to {max(seconds):.1f}", record["machine"]
    commit = about["commit"] + (" and changes" if about["dirty"] else "")
    row = [f"**{record['seconds']:.1f}**", at, _shown(track, record["scores"])]
    return [*row, str(len(seconds)), record["change"], commit, about["date"][:10]]


def _shown(track: Track, scores: dict[str, float]) -> str:
    return " / ".join(f"{scores[way]:.3f}" for way in track.target)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status is 1 where a target, or a record to store, was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speedrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = [name for name, track in TRACKS.items() if not track.needs]
    parser.add_argument("tracks", nargs="*", metavar="TRACK", help=f"some of {', '.join(TRACKS)}")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--write", metavar="WHAT CHANGED", help="store a record")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.tracks if name not in TRACKS]:
        parser.error(f"TRACK must be one of {', '.join(TRACKS)}, got {', '.join(unknown)}")
    if asked.write and asked.seeds < len(SEEDS):
        parser.error(f"--write must come with all {len(SEEDS)} seeds, got {asked.seeds}")
    missed = False
    for name in asked.tracks or own:
        result = run(name, TRACKS[name], asked.seeds)
        missed |= not result["reached"]
        said = "reached" if result["reached"] else "missed"
        scores = f"{TRACKS[name].score} {_shown(TRACKS[name], result['scores'])}"
        print(f"{name}: {said}, {result['seconds']:.1f} s, {scores} (medians)", flush=True)
        if not (asked.write and result["reached"]):
            continue
        if (least := record_s(name)) <= result["seconds"]:
            print(f"{name}: no record, {least:.1f} s is; nothing is stored", flush=True)
            missed = True
        else:
            print(store(result, asked.write))
    write_table(RESULTS, ROOT / "bench/SPEEDRUN.md")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
