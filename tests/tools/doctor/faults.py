"""Faults of data, one function each: rows without a fault -> rows with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import soxr

from tests.tools.doctor.sets import Row, sound


def _each(change: Callable[[Row], Row], share: float = 0.5) -> Callable[[], list[Row]]:
    """Change a share of the clips."""

    def planted() -> list[Row]:
        rows = sound()
        return [change(r) if n % 8 < 8 * share else r for n, r in enumerate(rows)]

    return planted


def _wave(
    change: Callable[[np.ndarray], np.ndarray], share: float = 0.5
) -> Callable[[], list[Row]]:
    return _each(lambda row: replace(row, wave=change(row.wave).astype(np.float32)), share)


def _text(change: Callable[[str], str], share: float = 0.5) -> Callable[[], list[Row]]:
    """Change captions of train."""

    def changed(row: Row) -> Row:
        train = row.split == "train"
        return replace(row, captions=tuple(map(change, row.captions))) if train else row

    return _each(changed, share)


def _leak() -> list[Row]:
    """A third of val is from train: resampled, quieter, cut a little and encoded as MP3."""
    rows = sound()
    for n in (24, 27, 30):
        wave = soxr.resample(0.5 * rows[n - 20].wave[200:-150], 16_000, 44_100)
        rows[n] = replace(rows[n], wave=wave, rate=44_100, format="MP3")
    return rows


def _padded_leak() -> list[Row]:
    """A third of val is from train, with half a second of silence before and a second behind."""
    rows = sound()
    for n in (24, 27, 30):
        wave = np.pad(rows[n - 20].wave, (8000, 16_000))
        rows[n] = replace(rows[n], wave=wave)
    return rows


def _noisy_leak() -> list[Row]:
    """A third of val is from train, with noise of a hundredth of its power."""
    rows, rng = sound(), np.random.default_rng(0)
    for n in (24, 27, 30):
        wave = rows[n - 20].wave
        noise = 0.1 * wave.std() * rng.standard_normal(len(wave))
        rows[n] = replace(rows[n], wave=(wave + noise).astype(np.float32))
    return rows


def _again() -> list[Row]:
    rows = sound()
    stereo = [np.stack([rows[n].wave, 0.7 * rows[n].wave], 1) for n in (0, 1, 2)]
    return [
        *rows,
        *(replace(r, wave=w, format="OGG") for r, w in zip(rows[8:11], stereo, strict=True)),
    ]


def _same_captions_in_val() -> list[Row]:
    rows = sound()
    return [
        replace(r, captions=rows[n - 20].captions) if n >= 28 else r for n, r in enumerate(rows)
    ]


def _nearly_same_captions_in_val() -> list[Row]:
    rows = sound()
    texts = [f"{row.captions[0].rstrip('.')}!!" for row in rows]
    return [
        replace(r, captions=(f"{texts[n - 20]} s",)) if n >= 28 else r for n, r in enumerate(rows)
    ]


def _cut_at(count: int) -> Callable[[str], str]:
    return lambda text: f"{text} and goes on and on without an end in sight"[:count]


def _slow(wave: np.ndarray) -> np.ndarray:
    """The wave at a quarter of its frequencies, as long."""
    return soxr.resample(wave, 4_000, 16_000)[: len(wave)]


def _lacking(text: str) -> str:
    every = (
        "None",
        "N/A",
        "-",
        "nan",
        "No caption available.",
        "unknown",
        "<NULL>",
        "?",
        "[missing]",
    )
    return every[len(text) % len(every)]


_GERMAN = ("Ein Hund bellt auf der Straße,", "Das Auto fährt mit dem Kind,", "Wind und Regen sind")
_CHINESE = "一只狗在院子里叫雨水打风吹过海鸟儿唱歌"
_LONG = " ".join(["and then another dog barks"] * 30)

FAULTS: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "silence": ("silent sounds", _wave(np.zeros_like, 0.25)),
    "silence around": (
        "mostly silent sounds",
        _wave(lambda w: np.concatenate([w, np.zeros(9 * len(w))]), 0.25),
    ),
    "clipping": ("clipped sounds", _wave(lambda w: np.clip(20 * w, -1, 1))),
    "clipping, then made quieter": (
        "clipped sounds",
        _wave(lambda w: 0.5 * np.clip(20 * w, -1, 1)),
    ),
    "clipping on one side of one channel": (
        "clipped sounds",
        _wave(lambda w: np.stack([np.maximum(_slow(w), -0.05), w], 1)),
    ),
    "an offset": ("DC offset", _wave(lambda w: 0.5 * w + 0.2)),
    "a dead channel": ("dead channels", _wave(lambda w: np.stack([w, 0 * w], 1))),
    "a lower rate": (
        "lower rate",
        _each(lambda r: replace(r, wave=soxr.resample(r.wave, 16_000, 8000), rate=8000)),
    ),
    "a lower rate, resampled": (
        "upsampled sounds",
        _wave(lambda w: soxr.resample(soxr.resample(w, 16_000, 8000), 8000, 16_000)),
    ),
    "a hundredth of a second": ("too short sounds", _wave(lambda w: w[:500])),
    "a truncated file": ("unreadable sounds", _each(lambda r: replace(r, cut_bytes=3000), 0.125)),
    "a recording in two splits": ("sounds in two splits", _leak),
    "a recording in two splits, with noise": ("sounds in two splits", _noisy_leak),
    "a recording in two splits, in silence": ("sounds in two splits", _padded_leak),
    "a recording twice": ("sounds twice in a split", _again),
    "no caption": ("clips without captions", _each(lambda r: replace(r, captions=()), 0.125)),
    "signs that captions are lacking": ("placeholders", _text(_lacking, 0.25)),
    "mojibake": ("broken characters", _text(lambda t: f"{t} in a cafÃ©", 0.125)),
    "spaces of no width": ("broken characters", _text(lambda t: t.replace(" ", " \u200b"), 0.125)),
    "lists that were written out": ("markup", _text(lambda t: str([t]), 0.125)),
    "a language model's words": (
        "a language model's own words",
        _text(lambda t: f"Sure! Here is a caption: {t}", 0.125),
    ),
    "HTML": ("markup", _text(lambda t: f"<b>{t}</b> &amp; more", 0.125)),
    "addresses": ("markup", _text(lambda t: f"{t} https://example.org/1", 0.125)),
    "names of files": (
        "file names as captions",
        _text(lambda t: t[7:].replace(" ", "_") + "01.wav"),
    ),
    "Chinese": ("another script", _text(lambda t: "".join(_CHINESE[ord(s) % 19] for s in t[:20]))),
    "German": ("another language", _text(lambda t: f"{_GERMAN[len(t) % 3]} {t[::-1]}.")),
    "labels of a word": ("captions of one word", _text(lambda t: t.split()[1])),
    "cut at 60 characters": ("cut captions", _text(_cut_at(60))),
    "cut with dots": ("cut captions", _text(lambda t: f"{t[:14]}...")),
    "too many tokens": ("captions over max_tokens", _text(lambda t: f"{t} {_LONG}", 0.125)),
    "one caption": ("one caption for many clips", _text(lambda _: "A sound.")),
    "a template": ("templated captions", _text(lambda t: f"This is the sound of {t}", 1.0)),
    "a template of three words": ("templated captions", _text(lambda t: f"The sound of {t}", 1.0)),
    "a template at the end": (
        "templated captions",
        _text(lambda t: f"{t.rstrip('.')} in the background.", 1.0),
    ),
    "val's captions from train": ("captions in two splits", _same_captions_in_val),
    "val's captions nearly from train": ("captions in two splits", _nearly_same_captions_in_val),
}
