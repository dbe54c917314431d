"""One sound file or its bytes -> one mono waveform at a given rate (CPU, NumPy).

The reference implementation of what DALI decodes; `prepare` and evaluation of plain files use it as
well. Files: whatever libsndfile reads (WAV, FLAC, OGG, MP3).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from flap_fast.config import Audio, Fusion

# Frames read at a time: a header may claim any number, but memory is only used for real ones.
_BLOCK = 2**20


class Unusable(ValueError):
    """A clip that cannot be used, and the reason."""


class BadSound(Unusable):
    """A sound that cannot be used, and the reason."""


class Unread(BadSound):
    """A sound that the system failed to read; a retry may succeed."""


# libsndfile's code for it.
_SYSTEM = 2


def decode_clip(
    encoded: bytes, position: float, audio: Audio, fusion: Fusion | None = None
) -> np.ndarray:
    """A clip decoded, cropped and filled, (samples,) float32; raises `BadSound`."""
    return crop_and_fill(read_sound(encoded, audio.sample_rate_hz), position, audio, fusion)


def crop_and_fill(
    wave: np.ndarray, position: float, audio: Audio, fusion: Fusion | None = None
) -> np.ndarray:
    """The part of a waveform that the encoder takes, filled to the least that it takes."""
    wave = crop(wave, (fusion or Fusion()).longest(audio), position)
    return fill(wave, max(audio.least_samples, len(wave)), audio.filling)


def read_sound(
    source: Path | bytes,
    sample_rate_hz: int,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> np.ndarray:
    """The mono waveform, (samples,) float32 in [-1, 1], channels averaged.

    Raises:
        BadSound: unreadable, empty, or not finite.
        Unread: missing, or refused by the system.
    """
    if isinstance(source, Path) and not os.path.isfile(source):  # a name may be too long to ask
        raise Unread("missing: no such file")
    # As bytes, for names that are no UTF-8: soundfile cannot encode them.
    file = io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
    try:
        with _Forward(file) as f:  # type: ignore[arg-type] - takes bytes, says str
            rate = f.samplerate
            f.seek(min(round(start_s * rate), f.frames))
            wave = _blocks(f, f.frames if duration_s is None else round(duration_s * rate))
    except soundfile.LibsndfileError as error:
        kind = Unread if error.code == _SYSTEM else BadSound
        raise kind(f"unreadable: {error.error_string}") from None
    except (OSError, RuntimeError, TypeError) as error:  # TypeError: x.raw, which has no header
        kind = Unread if isinstance(error, OSError) else BadSound
        raise kind(f"unreadable: {error}") from None
    return mono_at(wave, rate, sample_rate_hz)


class _Forward(soundfile.SoundFile):
    """A file that is only read forward.

    soundfile seeks to the end of each read, if it can: MP3 then loses what it kept of the frame
    before, and FLAC with a wrong length fails.
    """

    def seekable(self) -> bool:
        return False


def _blocks(file: _Forward, frames: int) -> np.ndarray:
    """(samples, channels) float32: at most `frames` from the current position, up to the end."""
    blocks: list[np.ndarray] = []
    while not blocks or (frames and len(blocks[-1]) == _BLOCK):
        blocks.append(file.read(min(frames, _BLOCK), dtype="float32", always_2d=True))
        frames -= len(blocks[-1])
    return np.concatenate(blocks)


def mono_at(wave: np.ndarray, rate: float, sample_rate_hz: int) -> np.ndarray:
    """(samples, channels) float32 at `rate` -> (samples,) at `sample_rate_hz`, channels averaged.

    Raises:
        BadSound: empty, or not finite.
    """
    mono = wave.mean(1) if wave.shape[1] > 1 else wave[:, 0]
    if not np.isfinite(mono).all():
        raise BadSound("unreadable: samples are not finite")
    if rate != sample_rate_hz:
        mono = soxr.resample(mono, rate, sample_rate_hz, quality="HQ")
    if len(mono) == 0:
        raise BadSound("empty: no samples")
    return np.ascontiguousarray(mono, dtype=np.float32)


def crop_positions(crops: int) -> np.ndarray:
    """(crops,) float64 in [0, 1) for `crop`: the middle, or equal steps from begin to end."""
    if crops == 1:
        return np.array([0.5])
    return np.minimum(np.linspace(0, 1, crops), np.nextafter(1, 0))


def crop(wave: np.ndarray, samples: int, position: float) -> np.ndarray:
    """At most `samples` of the wave, from `floor(position * (len - samples + 1))`.

    `position` is in [0, 1): every start is as likely as any other. Float64, as in DALI's graph.
    """
    spare = len(wave) - samples
    if spare <= 0:
        return wave
    start = int(np.floor(np.float64(position) * (spare + 1)))
    return wave[start : start + samples]


def fill(wave: np.ndarray, samples: int, filling: str) -> np.ndarray:
    """Exactly `samples`: whole repeats then zeros (`repeatpad`), zeros (`pad`), cut repeats.

    Source: LAION-CLAP's published data pipeline, data_filling.
    """
    if len(wave) == samples:
        return wave
    repeats = {"repeatpad": samples // len(wave), "pad": 1, "repeat": samples // len(wave) + 1}
    full = np.tile(wave, repeats[filling])[:samples]
    return np.pad(full, (0, samples - len(full)))
