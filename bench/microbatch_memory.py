"""Peak memory of steps in micro-batches: of the micro-batch, not of the global batch.

    python -m bench.microbatch_memory            the loop's own step on noise, tiny towers, CPU

A row is a training of its own process (one a rank): loader, both passes, Adam, 3 steps. Its number
is the peak resident memory above what was resident when model, engine and data were loaded, of the
rank that took most. The last line is the ratio that matters: 512 clips over 64, both in
micro-batches of 32. On a CPU `train.replay=auto` decodes sounds again; `keep` holds log-mels.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 3
MICRO_BATCH = 32
SETTINGS = (
    *("audio.width=64", "audio.depth=2", "audio.heads=2", "audio.duration_s=2.5"),
    *("audio.frames=256", "text.width=64", "text.depth=2", "text.heads=2", "frontend.threads=1"),
    *("loss.recon.weight=1", "decoder.width=64", "decoder.depth=2", "decoder.heads=2"),
)
ROWS = (
    *((1, 64, "auto"), (1, 256, "auto"), (1, 512, "auto"), (1, 512, "keep")),
    *((2, 512, "auto"), (4, 512, "auto")),
)


def main() -> None:
    """Measure every row and print it; the ratio last."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        print("ranks  global batch  train.replay  peak MiB above loaded")
        for row in ROWS:
            peaks[row] = peak_mib(Path(folder), *row)
            ranks, clips, replay = row
            print(f"{ranks:5}  {clips:12}  {replay:>12}  {peaks[row]:21.1f}", flush=True)
    print(f"512 clips take {peaks[1, 512, 'auto'] / peaks[1, 64, 'auto']:.3f} of the peak of 64")


def write_shards(folder: Path) -> None:
    """512 seconds of noise, each with its caption."""
    import numpy as np
    import soundfile

    from flap_fast.data.prepare import prepare

    for n in range(512):
        noise = 0.1 * np.random.default_rng(n).standard_normal(16_000)
        soundfile.write(folder / f"{n}.flac", noise.astype(np.float32), 16_000)
    rows = ({"audio": f"{n}.flac", "caption": f"noise number {n}"} for n in range(512))
    (folder / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "noise.jsonl", folder / "data", threads=2, show=False)


def peak_mib(folder: Path, ranks: int, clips: int, replay: str) -> float:
    """The most that any rank of a training took."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # One arena: what is freed is given back, so that the peak is what was held.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "bench.microbatch_memory", str(folder), str(clips), replay]
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a rank failed; what it said stands above")
    return max(float(lines.split()[-1]) for lines in said)


def take_steps(folder: Path, clips: int, replay: str) -> float:
    """Train; peak resident MiB above what was resident before the first batch."""
    from flap_fast.configfile import load_config
    from flap_fast.data.captions import tokenizer
    from flap_fast.data.loader import TrainingLoader
    from flap_fast.data.shards import open_shards
    from flap_fast.model.flap import Flap
    from flap_fast.ranks import join_ranks, leave_ranks
    from flap_fast.train.engine import make_engine
    from flap_fast.train.microbatch import Gradients

    batch = (f"train.global_batch={clips}", f"train.micro_batch={MICRO_BATCH}")
    where = (f"data.train={folder}/data/train", f"train.replay={replay}")
    config = load_config(None, [*where, *SETTINGS, *batch])
    ranks = join_ranks()
    shards = open_shards(config.data.train)
    loader = TrainingLoader(config, shards, tokenizer(config.text), ranks)
    engine = make_engine(config, Flap(config), ranks)
    gradients = Gradients(config, ranks, engine, STEPS, loader.order.steps_per_epoch)
    loaded = resident_mib("VmRSS")
    batches = loader.batches(0, STEPS, times=gradients.reads)
    for step in range(1, STEPS + 1):
        gradients(step, batches)
        engine.step(1e-4)
    peak = resident_mib("VmHWM")
    leave_ranks()
    return peak - loaded


def resident_mib(field: str) -> float:
    """What Linux says of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(take_steps(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
    else:
        main()
