"""10,000 small clips from disk and from an S3 server on loopback: the same batches, clips a second.

    python -m bench.remote_data [--clips N] [--pairs N]     needs s3fs, moto and flask

Clips are 1 s of noise as FLAC. One pass over all of them in batches of 50, by the training loader
alone: from disk; from S3 with an empty cache; then disk and S3 with a full cache in turns. `read`
is the clips' bytes and JSON without decoding, in random order. Every pass must give the same bits.
Last, an epoch is trained from disk, and from S3 by a process that is killed, loses half of its
cache and is started again: both must end with the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import soundfile

from bench.machine import machine
from bench.report import facts
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import Shards, open_shards, pack
from flap_fast.data.tokenize import tokenizer
from flap_fast.files import write_atomically
from flap_fast.ranks import Ranks

RATE_HZ, BATCH, SHARD_CLIPS = 16_000, 50, 500
_TINY = (
    *("audio.size=tiny", "audio.width=32", "audio.depth=2", "audio.heads=2", "frontend.threads=1"),
    *("audio.duration_s=1.0", "audio.frames=112", "joint.width=16", "frontend.backend=torch"),
    *("text.width=32", "text.depth=2", "text.heads=2", f"train.global_batch={BATCH}"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.remote_data")
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=3, help="of disk and S3, in turns")
    asked = parser.parse_args(arguments)
    print(facts(machine("cpu")))
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "shards"), Path(place, "cache")
        write_shards(folder, asked.clips)
        with s3_server():
            bucket = fsspec.filesystem("s3")
            bucket.mkdir("bench")
            bucket.put(f"{folder}/", "bench/shards/", recursive=True)
            disk = settings(str(folder), cache)
            s3 = settings("s3://bench/shards", cache)
            measure(disk, s3, cache, asked.clips, asked.pairs)
            compare_killed(folder, Path(place))
    return 0


def compare_killed(shards: Path, place: Path) -> None:
    """Train from disk, and from S3 with a kill in the middle, and compare the weights."""
    wanted = Training("disk", str(shards), place)
    assert wanted.start().wait() == 0
    killed = Training("S3", "s3://bench/shards", place)
    process = killed.start()
    while not killed.steps_done() > wanted.steps_done() // 3:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    process.kill()
    process.wait()
    held = sorted((killed.cache / "shards").iterdir())
    for file in held[::2]:
        file.unlink()
    gone = f"{len(held[::2])} of {len(held)} files of its cache deleted"
    print(f"killed after step {killed.steps_done()}, {gone}")
    assert killed.start("--resume").wait() == 0
    assert killed.weights() == wanted.weights(), "other weights from S3"
    print(f"resumed to step {killed.steps_done()}: the weights of the run from disk, bit for bit")


class Training(NamedTuple):
    """A run of one epoch, in a process of its own."""

    name: str
    train: str
    place: Path

    @property
    def cache(self) -> Path:
        return self.place / f"cache of {self.name}"

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """The process; what it prints goes to a file."""
        config = self.place / f"{self.name}.yaml"
        config.write_text("{}\n")
        found = (
            *(*_TINY, f"data.train={self.train}", f"data.cache={self.cache}", "data.val=[]"),
            *(f"run.folder={self.place}", f"run.name={self.name}", "train.epochs=1"),
            *("log.every_steps=5", "ckpt.every_steps=20"),
        )
        command = [sys.executable, "-m", "flap_fast", "train", str(config), *found, *options]
        with open(self.place / f"{self.name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def steps_done(self) -> int:
        """The last step in metrics.jsonl, 0 before the first."""
        file = self.place / self.name / "metrics.jsonl"
        rows = file.read_text().splitlines() if file.exists() else []
        return max((json.loads(row).get("step", 0) for row in rows), default=0)

    def weights(self) -> bytes:
        """Of the last checkpoint."""
        last = sorted((self.place / self.name / "checkpoints").glob("step-*"))[-1]
        return (last / "model.safetensors").read_bytes()


def measure(disk: Config, s3: Config, cache: Path, clips: int, pairs: int) -> None:
    """Print clips a second of each pass, and the medians' ratio."""
    first = timed("disk, first pass", clips, lambda: passed(disk)).digest
    cold = timed("S3, empty cache", clips, lambda: passed(s3)).digest
    assert cold == first, "other batches from S3"
    for what, run in (("loader", passed), ("read", read)):
        found: list[tuple[Pass, Pass]] = []
        for _ in range(pairs):
            on_disk = timed(f"{what}: disk", clips, lambda run=run: run(disk))
            on_s3 = timed(f"{what}: S3, full cache", clips, lambda run=run: run(s3))
            assert on_s3.digest == on_disk.digest, "other bits from S3"
            found.append((on_disk, on_s3))
        assert run is read or found[0][0].digest == first
        rates = {"clips/s": [(a.rate, b.rate) for a, b in found]}
        rates["clips per CPU second"] = [(a.cpu_rate, b.cpu_rate) for a, b in found]
        for name, both in rates.items():
            ratios = [b / a for a, b in both]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            middle = statistics.median(ratios)
            print(f"{what}: {name}, S3 / disk: median {middle:.3f} of pairs {shown}")
    held = sum(file.stat().st_size for file in (cache / "shards").iterdir())
    print(f"the cache holds {held / 2**20:.0f} MiB; all batches were the same bits")


class Pass(NamedTuple):
    """A pass over all clips."""

    rate: float
    """Clips a second."""
    cpu_rate: float
    """Clips a second of this process's CPU time, which other processes disturb less."""
    digest: str


def timed(what: str, clips: int, run: Callable[[], str]) -> Pass:
    """Run a pass, and print its rates."""
    started, cpu_started = time.perf_counter(), time.process_time()
    digest = run()
    cpu_s, wall_s = time.process_time() - cpu_started, time.perf_counter() - started
    print(
        f"{what:28} {clips / wall_s:6.0f} clips/s, {clips / cpu_s:6.0f} per CPU second", flush=True
    )
    return Pass(clips / wall_s, clips / cpu_s, digest)


def opened(config: Config) -> Shards:
    """The shards of data.train."""
    return open_shards(config.data.train, ("sounds",), config.data)


def passed(config: Config) -> str:
    """A digest of all batches of an epoch; opening the shards counts."""
    loader = TrainingLoader(config, opened(config), tokenizer(config.text), Ranks())
    digest = hashlib.sha256()
    for batch in loader.batches(0, loader.sampler.steps_per_epoch):
        for tensor in (batch.stacked, batch.ids, batch.attention_mask, batch.sample_index):
            digest.update(tensor.numpy().data)
    return digest.hexdigest()


def read(config: Config) -> str:
    """A digest of all clips' bytes and captions, in random order."""
    shards, digest = opened(config), hashlib.sha256()
    for clip in np.random.default_rng(0).permutation(len(shards)).tolist():
        digest.update(shards.encoded(clip))
        digest.update(shards.record(clip)["text"][0].encode())
    return digest.hexdigest()


def settings(train: str, cache: Path) -> Config:
    """Small front end and batches, so that reading is as much of the work as it can be."""
    return load_config(None, [*_TINY, f"data.train={train}", f"data.cache={cache}"])


def write_shards(folder: Path, clips: int) -> None:
    """Clips of 1 s of noise, each with a caption of its number."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def sample(number: int) -> tuple[str, bytes, dict[str, Any]]:
        wave = np.cumsum(rng.normal(0, 0.02, RATE_HZ)) * np.hanning(RATE_HZ) / 4
        buffer = io.BytesIO()
        soundfile.write(buffer, wave.clip(-1, 1), RATE_HZ, format="FLAC", subtype="PCM_16")
        return f"{number:09d}", buffer.getvalue(), {"text": [f"noise number {number}"]}

    for shard, start in enumerate(range(0, clips, SHARD_CLIPS)):
        some = range(start, min(start + SHARD_CLIPS, clips))
        tar, index, _ = pack(sample(number) for number in some)
        write_atomically(folder / f"{shard}.tar", tar)
        write_atomically(folder / f"{shard}.idx", index.encode())


@contextmanager
def s3_server() -> Iterator[None]:
    """A server in a process of its own, which the environment names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
