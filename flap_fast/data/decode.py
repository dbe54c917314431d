"""Encoded clips -> log-mels on the training device, through DALI or its PyTorch twin."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import need
from flap_fast.config import Audio, Frontend
from flap_fast.data.cached import crop_cached
from flap_fast.data.mel import LogMel, pad_frames
from flap_fast.data.sound import crop, fill, read_sound

Encoded = tuple[list[bytes], np.ndarray]
Decode = Callable[[bytes, float, Audio], np.ndarray]


class TorchDecoder:
    """The twin of `DaliDecoder`: libsndfile on threads; the same interface, the same numbers.

    Cached log-mels are read by it too, `decode` being `crop_cached`.
    """

    def __init__(
        self,
        batches: Iterator[Encoded],
        audio: Audio,
        *,
        threads: int,
        prefetch: int,
        decode: Decode | None = None,
    ):
        self._pool = ThreadPoolExecutor(threads)
        self._audio, self._decode = audio, decode or decode_one
        self._batches = batches
        self._prefetch = prefetch
        self._waiting: deque[list[Future[np.ndarray]]] = deque()

    def __iter__(self) -> TorchDecoder:
        return self

    def __next__(self) -> Tensor:
        """(B, samples) float32, or (B, t, F) float16 of cached log-mels.

        Raises `BadSound` for a batch with a clip that cannot be read.
        """
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
            self._pool.submit(self._decode, sound, float(w), self._audio)
            for sound, w in zip(sounds, where, strict=True)
        ]


def decode_one(sound: bytes, where: float, audio: Audio) -> np.ndarray:
    """One clip as `Decoder` gives it, (samples,) float32; raises `BadSound`."""
    wave = crop(read_sound(sound, audio.sample_rate_hz), audio.samples, where)
    return fill(wave, audio.samples, audio.filling)


def decoder(kind: str) -> Decode:
    """How one clip is read from shards of a kind: a waveform, or a cached log-mel."""
    return crop_cached if kind == "mels" else decode_one


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
    mel: LogMel,
    local_ranks: int = 1,
    shards: str = "sounds",
) -> Iterator[Tensor]:
    """(B, T, F) log-mels on the device, in order, decoded ahead.

    A batch with a clip that cannot be decoded raises `BadSound` at its turn; the next one follows.

    Args:
        shards: their kind; log-mels are cached ones, whatever the back end.
    """
    kind = "torch" if shards == "mels" else backend(frontend)
    threads = frontend.threads or max(1, (os.cpu_count() or 1) // local_ranks)
    if kind == "torch":
        source = TorchDecoder(
            batches,
            audio,
            threads=threads,
            prefetch=frontend.prefetch,
            decode=decoder(shards),
        )
    else:
        from flap_fast.data.dali import DaliDecoder

        source = DaliDecoder(
            batches,
            audio,
            batch=batch,
            threads=threads,
            prefetch=frontend.prefetch,
            device=device,
            mel=kind == "dali_mel",
        )
    return _Mels(source, mel, device)


class _Mels:
    """An iterator, not a generator: it goes on after it has raised."""

    def __init__(self, decoder: Iterator[Tensor], mel: LogMel, device: torch.device):
        self._decoder, self._mel, self._device = decoder, mel, device

    def __iter__(self) -> _Mels:
        return self

    def __next__(self) -> Tensor:
        return as_log_mel(next(self._decoder), self._mel, self._device)


def as_log_mel(decoded: Tensor, mel: LogMel, device: torch.device) -> Tensor:
    """(B, samples) waveforms, or log-mels already, (B, <= T, F) -> (B, T, F) on the device."""
    on_device = to_device(decoded, device)
    if decoded.ndim == 2:
        return mel(on_device)
    return pad_frames(on_device.float(), mel.audio.frames)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: to a GPU only out of pinned memory."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
