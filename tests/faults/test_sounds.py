"""Damaged sounds: whole and at the right scale, as an independent reading says, or named."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import soundfile

from flap_fast.data.preprocess.unusable import BadSound
from flap_fast.data.preprocess.waveform import read_sound
from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.damage import of_bytes

RATE, SECONDS = 8000, 2.4
# Format, subtype, channels.
KINDS = (
    *(("WAV", "PCM_16", 1), ("WAV", "PCM_16", 2), ("WAV", "PCM_24", 1), ("WAV", "FLOAT", 2)),
    *(("WAV", "ULAW", 1), ("WAV", "IMA_ADPCM", 1), ("WAVEX", "PCM_16", 2), ("RF64", "PCM_16", 1)),
    *(("W64", "PCM_16", 1), ("AIFF", "PCM_16", 1), ("AU", "PCM_16", 2), ("CAF", "PCM_16", 1)),
    *(("FLAC", "PCM_16", 1), ("FLAC", "PCM_24", 2), ("OGG", "VORBIS", 1), ("OGG", "OPUS", 2)),
    *(("MP3", "MPEG_LAYER_III", 1), ("MP3", "MPEG_LAYER_III", 2)),
)
# Samples that codecs add or cut at the ends, and what a damaged frame of one may cost.
SLACK = 4 * 1152


@cache
def sound(kind: int) -> bytes:
    """A chirp that grows louder, so that no part of it is like another."""
    format, subtype, channels = KINDS[kind]
    time = np.arange(round(SECONDS * RATE)) / RATE
    wave = (0.2 + 0.3 * time) * np.sin(2 * np.pi * (300 * time + 400 * time**2))
    out = io.BytesIO()
    waves = np.stack([wave, 0.5 * wave], 1)[:, :channels]
    soundfile.write(out, waves, RATE, format=format, subtype=subtype)
    return out.getvalue()


def independent(sound: Path) -> tuple[np.ndarray, int] | None:
    """(frames, channels) and the rate, as libsndfile alone reads them; None if it refuses."""
    try:
        with soundfile.SoundFile(sound) as file:
            if file.frames > 10**7 or file.channels > 64:
                return None
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, TypeError, ValueError, MemoryError):
        return None


def of_field(data: bytes, draw: Random) -> tuple[bytes, str]:
    """Another number in a header: a rate, a size, a count of channels or samples."""
    size, order = draw.choice((2, 4, 8)), draw.choice(("little", "big"))
    most = 2 ** (8 * size) - 1
    number = draw.choice((0, 1, 2, 60_000, most // 2, most, draw.randrange(most)))
    at = 2 * draw.randrange(2, 40)
    new = (number & most).to_bytes(size, order)
    return data[:at] + new + data[at + size :], "field"


def check(draw: Random, folder: Path) -> str:
    kind = draw.randrange(len(KINDS))
    data, how = (of_field if draw.random() < 0.25 else of_bytes)(sound(kind), draw)
    named = KINDS[kind][0]
    file = folder / "sound"
    file.write_bytes(data)
    found = independent(file)
    rate = found[1] if found and 1000 <= found[1] <= 10**6 else RATE
    source = draw.choice((data, file))
    times = draw.choice((1, 2))
    whole = times * len(read_sound(sound(kind), RATE))
    try:
        wave = read_sound(source, times * rate)
    except BadSound as error:
        assert_sentence(error, "unreadable", "empty")
        return f"{named} refused"
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() <= 4
    slack = times * (SLACK if named in ("MP3", "OGG") else 0.03 * RATE)
    # libsndfile reads what is left of a sound without a word.
    assert len(wave) >= whole - slack, f"{how}: {len(wave)} of {whole} samples"
    assert len(wave) <= 4 * whole + slack, f"{how}: {len(wave)} samples for {whole}"
    if found and times == 1 and len(found[0]) == len(wave):
        mine, theirs = (float(np.sqrt(np.mean(w**2))) for w in (wave, found[0].mean(1)))
        assert theirs / 1.1 - 1e-4 <= mine <= theirs * 1.1 + 1e-4, f"{mine} for {theirs}"
    return f"{named} read"


@sampled(80, 500)
def test_a_damaged_sound_is_read_whole_and_at_its_scale_or_is_named(cases, tmp_path: Path):
    run_cases("sounds", cases, check, tmp_path)
