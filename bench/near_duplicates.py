"""How often `flap doctor` takes two sounds for one recording, and misses one that was re-encoded.

    python -m bench.near_duplicates MANIFEST... [--every 3]

Each sound is encoded, resampled, cut and made quieter; found are those whose sketches and waveforms
are near enough. All pairs of different sounds that are taken for one recording are printed.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import soxr

from flap_fast.tools.doctor import recordings
from flap_fast.tools.doctor.neighbours import near_pairs
from flap_fast.tools.doctor.scan import measure, waveform
from flap_fast.tools.doctor.sketch import same_recording
from flap_fast.tools.doctor.sources import Clips, Piece, open_data

_RATE = 22_050


def encoded(wave: np.ndarray, rate: int, format: str, level: float | None = None) -> bytes:
    """A sound file's bytes; `level` 0 is the best quality, 1 the smallest file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format, compression_level=level)
    return buffer.getvalue()


def copies(wave: np.ndarray) -> dict[str, bytes]:
    """Copies of a waveform at 22,050 Hz, as they happen."""
    tenth = _RATE // 10
    cut = soxr.resample(wave[len(wave) // 50 :] * 0.5, _RATE, 44_100)
    found = {
        "MP3": encoded(wave, _RATE, "MP3"),
        "MP3, small": encoded(wave, _RATE, "MP3", 0.9),
        "Ogg, small": encoded(wave, _RATE, "OGG", 0.9),
        "8 kHz": encoded(soxr.resample(wave, _RATE, 8000), 8000, "FLAC"),
        "44.1 kHz": encoded(soxr.resample(wave, _RATE, 44_100), 44_100, "FLAC"),
        "14 dB quieter": encoded(wave * 0.2, _RATE, "FLAC"),
        "stereo": encoded(np.stack([wave, 0.5 * wave], 1), _RATE, "FLAC"),
        "cut by 2 %, 6 dB quieter, 44.1 kHz, MP3": encoded(cut, 44_100, "MP3"),
    }
    white = wave.std() * np.random.default_rng(0).standard_normal(len(wave))
    for decibel in (20, 30):
        noisy = wave + 10 ** (-decibel / 20) * white
        found[f"white noise, {decibel} dB below"] = encoded(0.5 * noisy, _RATE, "FLAC")
    if len(wave) > 10 * tenth:
        found["cut by 0.1 s at both ends"] = encoded(wave[tenth:-tenth], _RATE, "FLAC")
    return found


def main() -> None:
    """Print both rates."""
    parser = argparse.ArgumentParser()
    parser.add_argument("manifests", nargs="+", type=Path)
    parser.add_argument("--every", type=int, default=3)
    asked = parser.parse_args()
    clips = [(c, n) for c in open_data(asked.manifests).values() for n in range(c.count)]
    sketches = np.stack([measure(c.piece(n)).sketch for c, n in clips]).astype(np.float32)
    hits: Counter[tuple[str, str]] = Counter()
    tried: Counter[tuple[str, str]] = Counter()
    for row in range(0, len(clips), asked.every):
        own, number = clips[row]
        with soundfile.SoundFile(io.BytesIO(bytes_of(own.piece(number)))) as file:
            wave = file.read(dtype="float32", always_2d=True).mean(1)
            wave = soxr.resample(wave, file.samplerate, _RATE)
        for name, data in copies(wave).items():
            copy = measure(Piece(data))
            far = np.sqrt(np.square(sketches - copy.sketch.astype(np.float32)).mean(1))
            near = far[row] <= recordings.RADIUS and (far < far[row]).sum() < recordings.NEAREST
            one = Clips(1, "sounds", str, lambda _, d=data: Piece(d), lambda _: [])
            same = near and same_recording(waveform(own, number), waveform(one, 0))
            for length in ("all", "2 s or longer" if len(wave) >= 2 * _RATE else "shorter"):
                tried[name, length] += 1
                hits[name, length] += same >= recordings.SAME
    for key, count in sorted(tried.items()):
        print(f"{key[0]:40} {key[1]:14} found {hits[key]} of {count} = {hits[key] / count:.1%}")
    pairs = near_pairs(sketches, recordings.RADIUS, recordings.NEAREST)
    print(f"{len(clips)} sounds, {len(pairs)} pairs compared; taken for one recording:")
    for one, other in pairs.tolist():
        same = same_recording(waveform(*clips[one]), waveform(*clips[other]))
        if same >= recordings.SAME - 0.1:
            print(f"{same:.3f} {' = '.join(c.name(n) for c, n in (clips[one], clips[other]))}")


def bytes_of(piece: Piece) -> bytes:
    """The bytes of a file."""
    return piece.source if isinstance(piece.source, bytes) else piece.source.read_bytes()


if __name__ == "__main__":
    main()
