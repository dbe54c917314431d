"""Encoded clips -> log-mels on the training device, through DALI or its PyTorch twin."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import need
from flap_fast.config import Audio, Frontend
from flap_fast.data.mel import LogMel
from flap_fast.data.mel_clap import ClapLogMel
from flap_fast.data.sound import crop, fill, read_sound

Encoded = tuple[list[bytes], np.ndarray]


class TorchDecoder:
    """The twin of `DaliDecoder`: libsndfile on threads; the same interface, the same numbers."""

    def __init__(self, batches: Iterator[Encoded], audio: Audio, *, threads: int, prefetch: int):
        self._pool = ThreadPoolExecutor(threads)
        self._audio = audio
        self._batches = batches
        self._prefetch = prefetch
        self._waiting: deque[list[Future[np.ndarray]]] = deque()

    def __iter__(self) -> TorchDecoder:
        return self

    def __next__(self) -> Tensor:
        """(B, samples) float32; raises `BadSound` for a batch with a clip that cannot be read."""
        while len(self._waiting) < self._prefetch:
            encoded = next(self._batches, None)
            if encoded is None:
                break
            self._waiting.append(self._begin(encoded))
        if not self._waiting:
            raise StopIteration
        return torch.from_numpy(np.stack([clip.result() for clip in self._waiting.popleft()]))

    def _begin(self, encoded: Encoded) -> list[Future[np.ndarray]]:
        sounds, where = encoded
        return [
            self._pool.submit(decode_one, sound, float(w), self._audio)
            for sound, w in zip(sounds, where, strict=True)
        ]


def decode_one(sound: bytes, where: float, audio: Audio) -> np.ndarray:
    """One clip as `Decoder` gives it, (samples,) float32; raises `BadSound`."""
    wave = crop(read_sound(sound, audio.sample_rate_hz), audio.samples, where)
    return fill(wave, audio.samples, audio.filling)


def backend(frontend: Frontend) -> str:
    """The back end in force: `auto` is DALI's where it is installed.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    there = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if frontend.backend == "auto":
        return "dali_wave" if there else "torch"
    need(
        there is not None or frontend.backend == "torch",
        "frontend.backend",
        "be 'torch' where DALI is not installed",
        frontend.backend,
        "pip install nvidia-dali-cuda130",
    )
    return frontend.backend


def log_mels(
    batches: Iterator[Encoded],
    *,
    audio: Audio,
    frontend: Frontend,
    batch: int,
    device: torch.device,
    mel: LogMel | ClapLogMel,
    local_ranks: int = 1,
) -> Iterator[Tensor]:
    """(B, T, F) log-mels on the device, in order, decoded ahead.

    A batch with a clip that cannot be decoded raises `BadSound` at its turn; the next one follows.
    """
    kind = backend(frontend)
    threads = frontend.threads or max(1, (os.cpu_count() or 1) // local_ranks)
    if kind == "torch":
        decoder = TorchDecoder(batches, audio, threads=threads, prefetch=frontend.prefetch)
    else:
        from flap_fast.data.dali import DaliDecoder

        decoder = DaliDecoder(
            batches,
            audio,
            batch=batch,
            threads=threads,
            prefetch=frontend.prefetch,
            device=device,
            mel=kind == "dali_mel",
        )
    return _Mels(decoder, mel if kind != "dali_mel" else None, device)


class _Mels:
    """An iterator, not a generator: it goes on after it has raised."""

    def __init__(self, decoder: Iterator[Tensor], mel: LogMel | ClapLogMel | None, device: torch.device):
        self._decoder, self._mel, self._device = decoder, mel, device

    def __iter__(self) -> _Mels:
        return self

    def __next__(self) -> Tensor:
        out = next(self._decoder).to(self._device, non_blocking=True)
        return out if self._mel is None else self._mel(out)
