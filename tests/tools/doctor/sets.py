"""Small data sets of many kinds, without faults: sounds by formula, captions by rule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.sounds import encode, write_manifest


@dataclass(frozen=True)
class Row:
    """A clip: a waveform (samples,) or (samples, channels), and its captions."""

    wave: np.ndarray
    captions: tuple[str, ...]
    split: str = "train"
    rate: int = 16_000
    format: str = "WAV"
    name: str = ""
    cut_bytes: int = 0
    """Bytes that are missing at the file's end."""


def write(folder: Path, rows: list[Row]) -> Path:
    """The sounds and a manifest of them."""
    folder.mkdir()
    table: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        name = row.name or f"clip{number}"
        file = folder / f"{name}.{row.format.lower()}"
        data = encode(row.wave, row.rate, row.format)
        file.write_bytes(data[: len(data) - row.cut_bytes])
        own = {"id": name, "split": row.split, "captions": list(row.captions)}
        table.append({"audio": file.name, **own})
    return write_manifest(folder / "manifest.jsonl", table)


def shaped(seed: int, seconds: float, rate: int = 16_000, level: float = 0.2) -> np.ndarray:
    """Noise whose level and spectrum change: no two seeds are alike."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    wave = np.zeros(count)
    hz = np.fft.rfftfreq(count, 1 / rate)
    for _ in range(3):
        middle, octaves = rng.uniform(200, 0.45 * rate), rng.uniform(0.3, 2)
        gain = np.exp(-((np.log2(np.maximum(hz, 1) / middle) / octaves) ** 2)) + 0.02
        part = np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * gain, count)
        knots = rng.uniform(0.1, 1, 6)
        wave += part / np.abs(part).max() * np.interp(np.linspace(0, 5, count), range(6), knots)
    return (level * wave / np.abs(wave).max()).astype(np.float32)


def notes(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    """An instrument's decaying notes over a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.002 * rng.standard_normal(len(t))
    for start in rng.uniform(0, 0.6 * seconds, 3):
        hz, decay = 110 * 2 ** (rng.integers(0, 36) / 12), rng.uniform(2, 8)
        late = np.maximum(t - start, 0)
        for n in range(1, 9):
            if n * hz < rate / 2:
                tone = np.sin(2 * np.pi * n * hz * late) * np.exp(-decay * n**0.5 * late)
                wave += 0.2 / n ** rng.uniform(0.7, 2) * tone * (t >= start)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def speech(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    """Pulses through formants in syllables with pauses, and hisses between them."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    pitch = rng.uniform(90, 240) * (1 + 0.1 * np.sin(np.linspace(0, 9, count)))
    pulses = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0.0) + 0.03 * rng.standard_normal(
        count
    )
    spectrum, hz = np.fft.rfft(pulses), np.fft.rfftfreq(count, 1 / rate)
    gain = 0.02 + sum(
        1 / (1 + ((hz - f) / 90) ** 2) for f in (rng.uniform(300, 900), rng.uniform(1000, 2500))
    )
    voiced = np.fft.irfft(spectrum * gain, count)
    syllables = np.repeat(rng.uniform(0, 1, 1 + count // 2400) > 0.35, 2400)[:count]
    hiss = 0.02 * rng.standard_normal(count) * np.roll(~syllables, 300)
    wave = voiced / np.abs(voiced).max() * syllables + hiss
    return (0.4 * wave / np.abs(wave).max()).astype(np.float32)


_THINGS = ("dog", "train", "door", "kettle", "crowd", "river", "engine", "bird", "piano", "child")
_DEEDS = ("barks loudly", "rattles by", "closes slowly", "whistles", "cheers", "hums", "sings")
_PLACES = (
    "in a yard",
    "near a wall",
    "while rain falls",
    "as wind blows",
    "with echoes",
    "far away",
)
_SENTENCES = ("A {} {} {}.", "The {} {} {}", "One hears that a {} {} {}.", "Some {} {} {} twice")


def captions(count: int, first: int = 0) -> list[str]:
    """English sentences, none of them twice."""
    every = list(itertools.product(_THINGS, _DEEDS, _PLACES))
    picked = np.random.default_rng(5).permutation(len(every))[first : first + count]
    return [_SENTENCES[n % 4].format(*every[n]) for n in picked.tolist()]


def rows_of(
    make: Callable[[int, float], np.ndarray], count: int = 32, val: int = 8, **settings: Any
) -> list[Row]:
    """Clips of 0.3 to 0.7 s; the last `val` are of another split."""
    texts, lengths = captions(count), np.random.default_rng(1).uniform(0.3, 0.7, count)
    return [
        replace(
            Row(make(n, float(lengths[n])), (texts[n],)),
            split="val" if n >= count - val else "train",
            **settings,
        )
        for n in range(count)
    ]


@functools.cache
def _sound() -> list[Row]:
    return rows_of(shaped)


def sound() -> list[Row]:
    """The set that faults are planted into."""
    return list(_sound())


def _telephone(seed: int, seconds: float) -> np.ndarray:
    wave = speech(seed, seconds)
    spectrum, hz = np.fft.rfft(wave), np.fft.rfftfreq(len(wave), 1 / 16_000)
    return np.fft.irfft(spectrum * ((hz > 50) & (hz < 7000)), len(wave)).astype(np.float32)


def _master(seed: int, seconds: float) -> np.ndarray:
    """Loud music through a limiter, in stereo at 44.1 kHz."""
    mixed = [
        notes(seed, seconds, 44_100) + 0.3 * shaped(seed + s, seconds, 44_100) for s in (0, 500)
    ]
    return np.stack([0.98 * np.tanh(2.5 * wave / wave.std() / 3) for wave in mixed], 1).astype("f4")


def _barks(seed: int, seconds: float) -> np.ndarray:
    """Bursts in the hum of a room, half of the time."""
    rng = np.random.default_rng(seed)
    wave = 0.001 * rng.standard_normal(round(seconds * 16_000))
    half = len(wave) // 2
    wave[:half] += shaped(seed, half / 16_000)[:half]
    return wave.astype(np.float32)


def _chip(seed: int, seconds: float) -> np.ndarray:
    """Square waves and triangles that fade in steps, as of a game's sound chip, and low tones."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16_000)) / 16_000
    phase = 110 * 2 ** (seed / 12) * t % 1
    wave = (np.where(phase < rng.choice([0.25, 0.5]), 0.4, -0.4), 0.8 * abs(1 - 2 * phase))
    tone = 0.03 * np.sin(2 * np.pi * 40 * 1.06**seed * t)
    fading = np.ceil(15 * np.exp(-rng.uniform(0, 4) * t)) / 15
    made = tone if seed % 3 == 2 else wave[seed % 3] * fading
    return (made - made.mean()).astype("f4")


def _german() -> list[Row]:
    """Captions in German throughout."""
    things = ("Hund bellt", "Zug fährt", "Vogel singt", "Motor brummt", "Wind weht", "Mann ruft")
    places = ("im Garten", "auf der Straße", "in einem Haus", "bei den Bäumen", "mit dem Regen")
    every = [f"Ein {thing} {place}." for thing in things for place in places]
    return [
        replace(row, captions=(f"{every[n % 30]} {'Und ein Kind lacht.' * (n // 30)}".strip(),))
        for n, row in enumerate(rows_of(shaped))
    ]


def _five_captions() -> list[Row]:
    texts = captions(5 * 24, first=40)
    return [
        replace(r, captions=tuple(texts[5 * n : 5 * n + 5]))
        for n, r in enumerate(rows_of(speech, 24))
    ]


def _labelled() -> list[Row]:
    """Two words a clip, most of them for several clips, none in both splits."""
    names = [f"{thing} {deed.split()[0]}" for thing in _THINGS for deed in _DEEDS[:2]]
    return [
        replace(row, captions=(names[n % 12 if row.split == "train" else 12 + n % 8],))
        for n, row in enumerate(rows_of(notes))
    ]


SOUND_SETS: dict[str, Callable[[], list[Row]]] = {
    "noises": sound,
    "instruments": lambda: rows_of(notes),
    "speech": lambda: rows_of(speech),
    "quiet recordings": lambda: rows_of(lambda n, s: shaped(n, s, level=0.003), format="FLAC"),
    "short effects": lambda: rows_of(lambda n, s: shaped(n, 0.1 + s / 10)),
    "loud masters": lambda: rows_of(_master, 24, rate=44_100),
    "telephone at 16 kHz": lambda: rows_of(_telephone),
    "pieces of one length": lambda: rows_of(lambda n, _: speech(n, 0.8)),
    "MP3 at 22 kHz": lambda: rows_of(lambda n, s: notes(n, s, 22_050), rate=22_050, format="MP3"),
    "Ogg in stereo at 48 kHz": lambda: rows_of(
        lambda n, s: np.stack([shaped(n, s, 48_000), shaped(n + 900, s, 48_000)], 1),
        24,
        rate=48_000,
        format="OGG",
    ),
    "German throughout": _german,
    "Chinese throughout": lambda: [
        replace(
            row,
            captions=("".join(chr(0x4E00 + ord(s) * 7 + n) for s in row.captions[0][n % 7 : 24]),),
        )
        for n, row in enumerate(sound())
    ],
    "five captions a clip": _five_captions,
    "labels as captions": _labelled,
    "chip music": lambda: rows_of(_chip),
    "barks and silence": lambda: rows_of(_barks),
}
