"""Clips of 10 s from FLAC shards to waveforms at 16 kHz, in batches: DALI, threads, and peers.

The clips are the demo's sounds, repeated, in shards of 16 kHz (as `flap prepare` writes them) and
of 48 kHz (as data sets come). A loader gives FILLING batches, in which its queues fill, and TIMED
ones after them.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.functional
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.machine import ROOT
from flap_fast.config import Audio
from flap_fast.data.batch import EncodedBatch
from flap_fast.data.preprocess.decoders import ThreadedDecoder
from flap_fast.data.preprocess.waveform import BadSound, decode_clip, fill, read_sound
from flap_fast.data.shards import Shards, open_shards, pack
from flap_fast.files import write_atomically
from flap_fast.preparation.prepare import ahead

RATE_HZ, SECONDS = 16_000, 10
BATCH, FILLING, TIMED = 16, 2, 10
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
            shards = folder / str(rate)
            shards.mkdir()
            write_atomically(shards / "0.idx", index.encode())
            write_atomically(shards / "0.tar", tar)
            found[rate] = open_shards([shards])
    return found


def _encoded(shards: Shards) -> Iterator[EncodedBatch]:
    for first in range(0, (FILLING + TIMED) * BATCH, BATCH):
        clips = range(first, first + BATCH)
        yield EncodedBatch([shards.encoded(i % len(shards)) for i in clips], np.zeros(BATCH))


def dali(shards: Shards) -> Batches:
    """`frontend.backend: dali_wave`."""
    from flap_fast.data.preprocess.dali import DaliDecoder, audio_graph  # Linux only

    decoder = DaliDecoder(
        _encoded(shards),
        audio_graph(AUDIO, mel=False),
        error=BadSound,
        batch=BATCH,
        threads=CORES,
        prefetch=PREFETCH,
        device=torch.device("cpu"),
    )
    return (clips.stacked for clips in decoder)


def threaded(shards: Shards) -> Batches:
    """`frontend.backend: torch`."""

    def decode(clip: bytes, position: float) -> np.ndarray:
        return decode_clip(clip, position, AUDIO)

    decoder = ThreadedDecoder(_encoded(shards), decode, threads=CORES, prefetch=PREFETCH)
    return (clips.stacked for clips in decoder)


def usual(sound: bytes) -> Tensor:
    """One clip read with soundfile and torchaudio, as most trainers do, (samples,)."""
    wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
    mono = torch.from_numpy(wave).mean(1)
    return torchaudio.functional.resample(mono, rate, RATE_HZ)[: RATE_HZ * SECONDS]


class _Clips(Dataset):
    def __init__(self, shards: Shards):
        self._shards = shards

    def __len__(self) -> int:
        return (FILLING + TIMED) * BATCH

    def __getitem__(self, i: int) -> Tensor:
        return usual(self._shards.encoded(i % len(self._shards)))


def in_one_process(shards: Shards) -> Batches:
    """soundfile + torchaudio in a loop, on one core: PyTorch's threads do not help one clip."""
    with _one_thread():
        for sounds, *_ in _encoded(shards):
            yield torch.stack([usual(sound) for sound in sounds])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_processes(shards: Shards) -> Batches:
    """soundfile + torchaudio in a DataLoader with a worker for each core."""
    # Not forked from here: a copy of a process with DALI's threads crashes.
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["bench.loaders"])
    loader = DataLoader(
        _Clips(shards),
        BATCH,
        num_workers=CORES,
        prefetch_factor=PREFETCH,
        multiprocessing_context=clean,
    )
    return iter(loader)


def in_threads(shards: Shards) -> Batches:
    """soundfile + torchaudio in a thread for each core; one thread within each resampling."""
    with _one_thread(), ThreadPoolExecutor(CORES) as pool:
        sounds = (sound for batch in _encoded(shards) for sound in batch.clips)
        waves = ahead(pool, usual, sounds, limit=PREFETCH * BATCH)
        for _ in range(FILLING + TIMED):
            yield torch.stack([next(waves) for _ in range(BATCH)])


@dataclass(frozen=True)
class LoaderCase:
    """A loader and the sample rate of its shards."""

    loader: Callable[[Shards], Batches]
    stored_hz: int
    name: str

    def filled(self, shards: dict[int, Shards]) -> Batches:
        """The batches of a loader whose queues are full."""
        batches = self.loader(shards[self.stored_hz])
        for _ in range(FILLING):
            next(batches)
        return batches


def drain(batches: Batches) -> None:
    """Consume the batches that are timed."""
    for _ in range(TIMED):
        assert next(batches).shape == (BATCH, RATE_HZ * SECONDS)


DALI, THREADED = "DALI (dali_wave)", "soundfile + soxr (torch)"
ONE_CORE = "soundfile + torchaudio, one core"
PEERS = {
    ONE_CORE: in_one_process,
    "soundfile + torchaudio, DataLoader": in_processes,
    "soundfile + torchaudio, threads": in_threads,
}
LOADER_CASES = [
    LoaderCase(loader, rate, name)
    for rate in STORED_HZ
    for name, loader in ({DALI: dali, THREADED: threaded} | PEERS).items()
]
