"""Sounds by formula: tones, chirps and noises, as samples and as files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def tone(hz: float, seconds: float, rate: int, level: float = 0.3) -> np.ndarray:
    """(samples,) float32."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def chirp(low_hz: float, high_hz: float, seconds: float, rate: int) -> np.ndarray:
    """(samples,) float32, the frequency rising in a straight line."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (low_hz * t + (high_hz - low_hz) * t**2 / (2 * seconds))
    return (0.3 * np.sin(phase)).astype("f4")


def noise(seed: int, seconds: float, rate: int, rms: float = 0.05, slope: float = 0) -> np.ndarray:
    """(samples,) float32; white, or with power like `1 / f ** slope`: 1 is pink, 2 brown."""
    white = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    spectrum = np.fft.rfft(white)
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (slope / 2)
    wave = np.fft.irfft(spectrum, len(white))
    return (wave * rms / np.sqrt(np.mean(wave**2))).astype("f4")


def encode(wave: np.ndarray, rate: int, format: str = "FLAC", subtype: str | None = None) -> bytes:
    """A sound file's bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def write_manifest(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_corpus(folder: Path, clips: int, *, val: int = 0) -> Path:
    """Sounds of 0.4 s to 2 s at five rates in three formats, with captions; gives the manifest.

    The last `val` of them are of the split `val`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(clips):
        rate = (16_000, 48_000, 44_100, 22_050, 8_000)[n % 5]
        format = ("wav", "flac", "ogg")[n % 3]
        seconds = 0.4 + 1.6 * (n * 7 % 11) / 10
        hz = 200 + 60 * n
        wave, captions = (
            (tone(hz, seconds, rate), [f"A steady tone of {hz} hertz.", f"A {hz} Hz beep."]),
            (chirp(hz, 3 * hz, seconds, rate), [f"A tone that rises from {hz} hertz."]),
            (noise(n, seconds, rate, slope=n % 3), [f"Noise number {n}.", "A hiss.", "Static."]),
        )[n // 3 % 3]
        if n % 4 == 0:
            wave = np.stack([wave, 0.5 * wave], 1)
        name = f"{n:02d}.{format}"
        (folder / name).write_bytes(encode(wave, rate, format.upper()))
        split = "val" if n >= clips - val else "train"
        rows.append({"audio": name, "captions": captions, "split": split, "id": f"clip-{n}"})
    return write_manifest(folder / "manifest.jsonl", rows)
