"""Encoded clips -> log-mels on the training device, through DALI or its PyTorch twin."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flap_fast.checks import require
from flap_fast.config import Audio, Frontend, Fusion
from flap_fast.data.preprocess.cached_mel import crop_cached
from flap_fast.data.preprocess.front_end import Decoded, MediaInput, MelFrontEnd, fitted, together
from flap_fast.data.preprocess.waveform import read_sound

# Clips and the draws of each, (B,) or (B, draws) in [0, 1): where to crop it, then fusion's pieces.
Encoded = tuple[list[bytes], np.ndarray]
Read = Callable[[bytes, float], np.ndarray]
"""A clip's bytes and where to crop it -> its waveform, or cached log-mel."""


class TorchDecoder:
    """The twin of `DaliDecoder`: libsndfile on threads; the same interface, the same numbers.

    Cached log-mels are read by it, too.
    """

    def __init__(self, batches: Iterator[Encoded], read: Read, *, threads: int, prefetch: int):
        self._pool = ThreadPoolExecutor(threads)
        self._batches, self._read, self._prefetch = batches, read, prefetch
        self._waiting: deque[tuple[list[Future[np.ndarray]], np.ndarray]] = deque()

    def __iter__(self) -> TorchDecoder:
        return self

    def __next__(self) -> Decoded:
        """Waveforms or log-mels; raises `BadSound` for a batch with a clip that cannot be read."""
        while len(self._waiting) < self._prefetch:
            encoded = next(self._batches, None)
            if encoded is None:
                break
            self._waiting.append(self._begin(encoded))
        if not self._waiting:
            raise StopIteration
        clips, where = self._waiting.popleft()
        return together([clip.result() for clip in clips], where)

    def _begin(self, encoded: Encoded) -> tuple[list[Future[np.ndarray]], np.ndarray]:
        sounds, where = encoded
        clips = [
            self._pool.submit(self._read, sound, float(np.ravel(draws)[0]))
            for sound, draws in zip(sounds, where, strict=True)
        ]
        return clips, where


def decode_one(
    sound: bytes, where: float, audio: Audio, fusion: Fusion | None = None
) -> np.ndarray:
    """One clip as a decoder gives it, (samples,) float32; raises `BadSound`."""
    wave = read_sound(sound, audio.sample_rate_hz)
    return fitted(wave, where, audio, fusion or Fusion())


def reader(kind: str, audio: Audio, fusion: Fusion | None = None) -> Read:
    """How a clip is read from shards of a kind, `sounds` or `mels`."""
    if kind == "mels":
        return lambda data, where: crop_cached(data, where, audio)
    return lambda sound, where: decode_one(sound, where, audio, fusion)


def backend(frontend: Frontend) -> str:
    """The back end in force: `auto` is DALI's where it is installed.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    there = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if frontend.backend == "auto":
        return "dali_wave" if there else "torch"
    require(
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
    mel: MelFrontEnd,
    frontend: Frontend,
    batch: int,
    local_ranks: int = 1,
    shards: str = "sounds",
) -> Iterator[MediaInput]:
    """Log-mels on the device, in order, decoded ahead.

    A batch with a clip that cannot be decoded raises `BadSound` at its turn; the next one follows.

    Args:
        shards: their kind; cached log-mels (`mels`) are read alike by every back end.
    """
    kind = "torch" if shards == "mels" else backend(frontend)
    threads = frontend.threads or max(1, (os.cpu_count() or 1) // local_ranks)
    ahead = {"threads": threads, "prefetch": frontend.prefetch}
    if kind == "torch":
        read = reader(shards, mel.audio, mel.fusion)
        return _Mels(TorchDecoder(batches, read, **ahead), mel)
    from flap_fast.data.preprocess.dali import DaliDecoder

    decoder = DaliDecoder(
        batches,
        mel.audio,
        batch=batch,
        device=mel.device,
        mel=kind == "dali_mel",
        fusion=mel.fusion,
        **ahead,
    )
    return _Mels(decoder, mel)


class _Mels:
    """An iterator, not a generator: it goes on after it has raised."""

    def __init__(self, decoder: Iterator[Decoded], mel: MelFrontEnd):
        self._decoder, self._mel = decoder, mel

    def __iter__(self) -> _Mels:
        return self

    def __next__(self) -> MediaInput:
        return self._mel(next(self._decoder))
