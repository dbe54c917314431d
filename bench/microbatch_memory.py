"""Peak memory of steps with cached gradients: it depends on the micro-batch, not batch or ranks.

    python -m bench.microbatch_memory [--write]      some minutes; 2048 clips of noise, tiny towers

Each row trains in processes of its own, one a rank: loader, both passes, Adam, 3 steps. Its number
is the peak resident memory above what was resident when model, engine and data were loaded, of the
rank that took most. Each rank takes 64 or 512 clips, in micro-batches of 32: what matters is the
ratio of the two, on 1, 2 and 4 ranks. On a CPU `train.replay=auto` decodes sounds again; `keep`
caches inputs. --write stores the result in bench/results and regenerates bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 3
MICRO_BATCH = 32
SETTINGS = (
    *("audio.width=64", "audio.depth=2", "audio.heads=2", "audio.duration_s=2.5"),
    *("audio.frames=256", "text.width=64", "text.depth=2", "text.heads=2", "frontend.threads=1"),
    *("loss.recon.weight=1", "decoder.width=64", "decoder.depth=2", "decoder.heads=2"),
)
# Environment variable with the row that a process trains.
_ROW = "FLAP_BENCH_ROW"
RANKS, FEW, MANY = (1, 2, 4), 64, 512
# Ranks, the global batch, train.replay.
ROWS = (
    *((ranks, ranks * clips, "auto") for ranks in RANKS for clips in (FEW, MANY)),
    *((ranks, MANY, "auto") for ranks in RANKS[1:]),
    (1, MANY, "keep"),
)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    # Here, so that the processes of a row do not load what they do not measure.
    from bench import report
    from bench.machine import machine, save

    parser = argparse.ArgumentParser(prog="python -m bench.microbatch_memory")
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    result = measure()
    if asked.write:
        print(save(Path("bench"), {"kind": "microbatch_memory", "machine": facts, **result}))
        report.write(Path("bench"))
    for name, value in result["figures"].items():
        print(f"{name}: {value:.3f}")
    return 0


def measure() -> dict[str, Any]:
    """Train and print every row; the rows and their ratios."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), clips=max(RANKS) * MANY)
        print("ranks  global batch  train.replay  peak MiB above loaded")
        for row in ROWS:
            peaks[row] = peak_mib(Path(folder), *row)
            ranks, clips, replay = row
            print(f"{ranks:5}  {clips:12}  {replay:>12}  {peaks[row]:21.1f}", flush=True)
    rows = [
        {"ranks": ranks, "global_batch": clips, "replay": replay, "peak_mib": peak}
        for (ranks, clips, replay), peak in peaks.items()
    ]
    return {"micro_batch": MICRO_BATCH, "rows": rows, "figures": figures(peaks)}


def figures(peaks: dict[tuple[int, int, str], float]) -> dict[str, float]:
    """Ratios of 512 clips a rank to 64, for each number of ranks; and of 512 clips over ranks."""
    found = {
        f"{MANY} over {FEW} clips a rank, {ranks} rank(s)": peaks[ranks, ranks * MANY, "auto"]
        / peaks[ranks, ranks * FEW, "auto"]
        for ranks in RANKS
    }
    return found | {
        f"{MANY} clips on {ranks} ranks over 1": peaks[ranks, MANY, "auto"] / peaks[1, MANY, "auto"]
        for ranks in RANKS[1:]
    }


def write_shards(folder: Path, clips: int) -> None:
    """Write shards of one second of noise, each with its caption."""
    import numpy as np
    import soundfile

    from flap_fast.preparation.prepare import prepare

    for n in range(clips):
        noise = 0.1 * np.random.default_rng(n).standard_normal(16_000)
        soundfile.write(folder / f"{n}.flac", noise.astype(np.float32), 16_000)
    rows = ({"audio": f"{n}.flac", "caption": f"noise number {n}"} for n in range(clips))
    (folder / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "noise.jsonl", folder / "data", threads=2, show=False)


def peak_mib(folder: Path, ranks: int, clips: int, replay: str) -> float:
    """The largest peak memory among the ranks of a training."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # One arena: what is freed is given back, so that the peak is what was held.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment[_ROW] = json.dumps([str(folder), clips, replay])
    command = [sys.executable, "-m", "bench.microbatch_memory"]
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a rank failed; its output is above")
    return max(float(lines.split()[-1]) for lines in printed)


def take_steps(folder: Path, clips: int, replay: str) -> float:
    """Train some steps; peak resident MiB above those before the first batch."""
    from flap_fast.config.file import load_config
    from flap_fast.data.loader import TrainingLoader
    from flap_fast.data.shards import open_shards
    from flap_fast.data.tokenize import tokenizer
    from flap_fast.model.two_towers import TwoTowers
    from flap_fast.ranks import join_ranks, leave_ranks
    from flap_fast.training.engine import make_engine
    from flap_fast.training.step import Gradients

    batch = (f"train.global_batch={clips}", f"train.micro_batch={MICRO_BATCH}")
    where = (f"data.train={folder}/data/train", f"train.replay={replay}")
    config = load_config(None, [*where, *SETTINGS, *batch])
    ranks = join_ranks()
    shards = open_shards(config.data.train)
    loader = TrainingLoader(config, shards, tokenizer(config.text), ranks)
    engine = make_engine(config, TwoTowers(config), ranks)
    gradients = Gradients(config, ranks, engine, STEPS, loader.sampler.steps_per_epoch)
    loaded = resident_mib("VmRSS")
    batches = loader.batches(0, STEPS, times=gradients.reads)
    for step in range(1, STEPS + 1):
        gradients(step, batches)
        engine.step(1e-4)
    peak = resident_mib("VmHWM")
    leave_ranks()
    return peak - loaded


def resident_mib(field: str) -> float:
    """A field of /proc/self/status: VmRSS is resident now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    if os.environ.get(_ROW):
        folder, clips, replay = json.loads(os.environ[_ROW])
        print(take_steps(Path(folder), clips, replay))
    else:
        sys.exit(main())
