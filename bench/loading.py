"""Clips per second from FLAC shards to waveforms at 16 kHz: DALI against soundfile + torchaudio.

    python -m bench.loading [--write]      about a minute; all cores, so leave them alone

The clips are the demo's sounds, repeated to 10 s, in shards of 16 kHz (as `flap prepare` writes
them) and of 48 kHz (as data sets come). A pass builds a loader, lets it fill its queues with two
batches and times the next 16, of 16 clips; passes take turns. --write stores the result in
bench/results and makes bench/RESULTS.md anew.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio.functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import report
from bench.machine import ROOT, machine, save
from bench.measure import Timing
from flap_fast.config import Audio
from flap_fast.data.decode import TorchDecoder
from flap_fast.data.prepare import ahead
from flap_fast.data.shards import Shards, open_shards, pack, write_atomically
from flap_fast.data.sound import fill, read_sound

RATE_HZ, SECONDS = 16_000, 10
BATCH, FILLING, TIMED = 16, 2, 16
PREFETCH = 2
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AUDIO = Audio(sample_rate_hz=RATE_HZ, duration_s=SECONDS)
STORED_HZ = (16_000, 48_000)

Batches = Iterator[Tensor]


def write_shards(folder: Path, clips: int) -> dict[int, Shards]:
    """The same clips as shards at each rate."""
    found = {}
    files = sorted((ROOT / "demo" / "audio").glob("*.ogg"))[:clips]
    with ThreadPoolExecutor(CORES) as pool:
        for rate in STORED_HZ:
            samples = rate * SECONDS

            def encode(file: Path, rate: int = rate, samples: int = samples) -> bytes:
                buffer = io.BytesIO()
                wave = fill(read_sound(file, rate), samples, "repeat")[:samples]
                soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
                return buffer.getvalue()

            encoded = pool.map(encode, files)
            rows = [(f"{i:09d}", flac, {"text": ["a sound"]}) for i, flac in enumerate(encoded)]
            tar, index, _ = pack(rows)
            part = folder / str(rate)
            part.mkdir()
            write_atomically(part / "0.idx", index.encode())
            write_atomically(part / "0.tar", tar)
            found[rate] = open_shards([part])
    return found


def _encoded(shards: Shards) -> Iterator[tuple[list[bytes], np.ndarray]]:
    for first in range(0, (FILLING + TIMED) * BATCH, BATCH):
        clips = range(first, first + BATCH)
        yield [shards.sound(i % len(shards)) for i in clips], np.zeros(BATCH)


def dali(shards: Shards) -> Batches:
    """`frontend.backend: dali_wave`."""
    from flap_fast.data.dali import DaliDecoder  # Linux only

    return DaliDecoder(
        _encoded(shards),
        AUDIO,
        batch=BATCH,
        threads=CORES,
        prefetch=PREFETCH,
        device=torch.device("cpu"),
        mel=False,
    )


def twin(shards: Shards) -> Batches:
    """`frontend.backend: torch`."""
    return TorchDecoder(_encoded(shards), AUDIO, threads=CORES, prefetch=PREFETCH)


def usual(sound: bytes) -> Tensor:
    """One clip the way most trainers read it, (samples,)."""
    wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
    mono = torch.from_numpy(wave).mean(1)
    return torchaudio.functional.resample(mono, rate, RATE_HZ)[: RATE_HZ * SECONDS]


class _Clips(Dataset):
    def __init__(self, shards: Shards):
        self._shards = shards

    def __len__(self) -> int:
        return (FILLING + TIMED) * BATCH

    def __getitem__(self, i: int) -> Tensor:
        return usual(self._shards.sound(i % len(self._shards)))


def in_one_process(shards: Shards) -> Batches:
    """soundfile + torchaudio in a loop; PyTorch's threads may use every core."""
    for sounds, _ in _encoded(shards):
        yield torch.stack([usual(sound) for sound in sounds])


def in_processes(shards: Shards) -> Batches:
    """soundfile + torchaudio in a DataLoader with a worker for each core."""
    loader = DataLoader(_Clips(shards), BATCH, num_workers=CORES, prefetch_factor=PREFETCH)
    return iter(loader)


def in_threads(shards: Shards) -> Batches:
    """soundfile + torchaudio in a thread for each core; one thread within each resampling."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(CORES) as pool:
            sounds = (sound for batch, _ in _encoded(shards) for sound in batch)
            waves = ahead(pool, usual, sounds, limit=PREFETCH * BATCH)
            for _ in range(FILLING + TIMED):
                yield torch.stack([next(waves) for _ in range(BATCH)])
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Way:
    """Who loads which shards."""

    loader: Callable[[Shards], Batches]
    stored_hz: int
    name: str

    def filled(self, shards: dict[int, Shards]) -> Batches:
        """A loader whose queues are full."""
        batches = self.loader(shards[self.stored_hz])
        for _ in range(FILLING):
            next(batches)
        return batches


def drain(batches: Batches) -> None:
    """Take the batches that are timed."""
    for _ in range(TIMED):
        assert next(batches).shape == (BATCH, RATE_HZ * SECONDS)


DALI, TWIN = "DALI (dali_wave)", "soundfile + soxr (torch)"
ALONE = "soundfile + torchaudio, one process"
PEERS = {
    ALONE: in_one_process,
    "soundfile + torchaudio, DataLoader": in_processes,
    "soundfile + torchaudio, threads": in_threads,
}
WAYS = [
    Way(loader, rate, name)
    for rate in STORED_HZ
    for name, loader in ({DALI: dali, TWIN: twin} | PEERS).items()
]


def measure(clips: int, rounds: int) -> dict[str, Any]:
    """The rate of each way, and the figures that the goals are about."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), clips)
        times: dict[Way, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, found in times.items():
                batches = way.filled(shards)
                start = time.perf_counter()
                drain(batches)
                found.append(1000 * (time.perf_counter() - start))
                del batches  # its workers and threads end here, not in the next one's time
    rows, rates = [], {}
    for way, found in times.items():
        timing, total = Timing.of(found), 1000 * BATCH * TIMED
        rates[way.name, way.stored_hz] = total / timing.median_ms
        row = {"shards": f"{way.stored_hz // 1000} kHz FLAC", "way": way.name}
        row |= {"clips_per_s": total / timing.median_ms, "low": total / timing.high_ms}
        rows.append({**row, "high": total / timing.low_ms, "rounds": rounds})
    mine = rates[DALI, RATE_HZ]
    figures = {
        "same_shards": mine / max(rates[name, RATE_HZ] for name in PEERS),
        "same_shards_one_process": mine / rates[ALONE, RATE_HZ],
        "usual_path": mine / max(rates[name, STORED_HZ[-1]] for name in PEERS),
        "usual_path_one_process": mine / rates[ALONE, STORED_HZ[-1]],
    }
    if CORES == 16:
        figures["clips_per_s_16_cores"] = mine
    return {"rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading")
    parser.add_argument("--rounds", type=int, default=7, help="of each, in turns")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="store the result")
    asked = parser.parse_args(arguments)
    facts = machine("cpu")
    result = measure(asked.clips, asked.rounds)
    if asked.write:
        print(save(Path("bench"), {"kind": "loading", "machine": facts, **result}))
        report.write(Path("bench"))
    print(report.facts(facts))
    for row in result["rows"]:
        rate = f"{row['clips_per_s']:6.0f} clips/s ({row['low']:.0f}-{row['high']:.0f})"
        print(f"{row['shards']}  {row['way']:36} {rate}")
    figures = result["figures"]
    for peer, ending in (("the fastest peer", ""), ("one process", "_one_process")):
        print(
            f"DALI on 16 kHz shards over {peer}: {figures['same_shards' + ending]:.2f} on the same "
            f"shards (goal >= 2), {figures['usual_path' + ending]:.2f} from 48 kHz (goal >= 8)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
