"""One sound file or its bytes -> one mono waveform at a given rate, or pieces of it (CPU, NumPy).

The reference implementation of what DALI decodes; `prepare` and evaluation of plain files use it as
well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import soxr

from flap_fast.config import Audio, Fusion
from flap_fast.data.preprocess.resampling import entry, resampled, resampled_length
from flap_fast.data.preprocess.sound_file import (
    LONGEST_S,
    SILENT,
    Source,
    check_peaks,
    mono,
    open_sound,
    seeks,
    seeks_exactly,
)
from flap_fast.data.preprocess.sound_file import BadSound as BadSound
from flap_fast.data.preprocess.sound_file import Unread as Unread
from flap_fast.data.preprocess.sound_file import Unusable as Unusable

# Samples of a sound that are kept while its length is unknown: 16 MiB.
_KEPT = 2**22

# A gap between pieces, in samples, from which seeking is faster than reading on.
_FAR = 2**16


def decode_clip(
    encoded: bytes, position: float, audio: Audio, fusion: Fusion | None = None
) -> np.ndarray:
    """A clip decoded, cropped and filled, (samples,) float32; raises `BadSound`."""
    longest = (fusion or Fusion()).longest(audio)
    return crop_and_fill(
        read_crop(encoded, audio.sample_rate_hz, longest, position), 0.0, audio, fusion
    )


def crop_and_fill(
    wave: np.ndarray, position: float, audio: Audio, fusion: Fusion | None = None
) -> np.ndarray:
    """The part of a waveform that the encoder takes, filled to the least that it takes."""
    wave = crop(wave, (fusion or Fusion()).longest(audio), position)
    return fill(wave, max(audio.least_samples, len(wave)), audio.filling)


def read_sound(
    source: Source,
    sample_rate_hz: int,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> np.ndarray:
    """The mono waveform, (samples,) float32 in [-1, 1], channels averaged.

    Raises:
        BadSound: unreadable, empty, not finite, or not in [-1, 1] (peaks up to 4 are let pass).
        Unread: missing, or refused by the system.
    """
    return joined(read_blocks(source, sample_rate_hz, start_s=start_s, duration_s=duration_s))


def joined(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Join (n,) float32 blocks, in hardly more memory than the result takes."""
    wave = bytearray()  # grows in place
    for block in blocks:
        wave += block.data
    return np.frombuffer(wave, np.float32)


def read_blocks(
    source: Source,
    sample_rate_hz: int,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
) -> Iterator[np.ndarray]:
    """Yield the waveform of `read_sound` in blocks, none of them empty; raises what it raises."""
    found = False
    with open_sound(source) as file:
        rate = file.samplerate
        for name, seconds in (("start_s", start_s), ("duration_s", duration_s or 0.0)):
            if not 0 <= seconds <= LONGEST_S:
                raise BadSound(f"{name} must be in [0, {LONGEST_S}] s, got {seconds:g}")
        if start_s:
            file.skip(round(start_s * rate), seek=seeks(source))
        frames = file.frames  # asked for all of them, it tells whether some are missing
        if start_s or duration_s is not None:
            frames = round((duration_s or LONGEST_S + 1) * rate)
        for block in resampled(file.mono_blocks(frames), rate, sample_rate_hz):
            found = found or len(block) > 0
            if len(block):
                yield block
    if not found:
        raise BadSound("empty: no samples")


Starts = Callable[[int], Sequence[int]]
"""The first sample of each piece of a sound with so many samples, in ascending order."""


def read_pieces(
    source: Source, sample_rate_hz: int, samples: int, starts: Starts
) -> Iterator[np.ndarray]:
    """Yield `samples` of the waveform of `read_sound` from each start, or those up to the end.

    Of a WAV or FLAC whose length is true, and that is longer than a piece, only what the pieces
    need is read: what cannot be read elsewhere goes unnoticed, and resampling differs by rounding.
    Other files are read forward, twice if they are long and `starts` needs the length first.

    Memory: a few blocks, a piece, and for files of unknown length 16 MiB.

    Raises:
        BadSound: as `read_sound`, also after some of the pieces.
    """
    with open_sound(source) as file:
        length = resampled_length(file.frames, file.samplerate, sample_rate_hz)
    if length > samples and seeks_exactly(source):
        with open_sound(source) as file:
            rate, frames = file.samplerate, file.frames

            def blocks(frame: int) -> Iterator[np.ndarray]:
                file.seek(frame)
                return resampled(file.mono_blocks(frames - frame), rate, sample_rate_hz)

            def frame_before(sample: int) -> tuple[int, int]:
                return entry(sample, rate, sample_rate_hz)

            yield from _pieces(blocks, frame_before, samples, starts(length), length)
        return
    length, wave = _length(source, sample_rate_hz)
    if wave is None:
        forward = read_blocks(source, sample_rate_hz)
        yield from _pieces(lambda _: forward, lambda _: (0, 0), samples, starts(length), length)
    else:
        yield from (wave[start : start + samples].copy() for start in starts(length))


def read_crop(source: Source, sample_rate_hz: int, samples: int, position: float) -> np.ndarray:
    """Return `crop` of the waveform of `read_sound`; reads and raises as `read_pieces`."""

    def starts(length: int) -> list[int]:
        return [crop_start(length, samples, position)]

    (wave,) = read_pieces(source, sample_rate_hz, samples, starts)
    return wave


def _length(source: Source, sample_rate_hz: int) -> tuple[int, np.ndarray | None]:
    """The number of samples, and the waveform itself unless it has more than `_KEPT`."""
    length, kept = 0, []
    for block in read_blocks(source, sample_rate_hz):
        length += len(block)
        if length > _KEPT:
            kept.clear()
        else:
            kept.append(block)
    return length, np.concatenate(kept) if length <= _KEPT else None


def _pieces(
    blocks_from: Callable[[int], Iterator[np.ndarray]],
    frame_before: Callable[[int], tuple[int, int]],
    samples: int,
    starts: Sequence[int],
    length: int,
) -> Iterator[np.ndarray]:
    """Yield the pieces from blocks, holding the blocks of one piece.

    Args:
        blocks_from: takes a frame of the file, gives the samples behind it.
        frame_before: takes a sample, gives the frame to read it from and that frame's sample.
    """
    blocks, held = blocks_from(0), deque[np.ndarray]()
    begin = end = 0  # of what is held
    for start in starts:
        frame, first = frame_before(start)
        if first > end + _FAR:
            blocks, begin, end = blocks_from(frame), first, first
            held.clear()
        while end < start + samples and (block := next(blocks, None)) is not None:
            held.append(block)
            end += len(block)
            while held and begin + len(held[0]) <= start:
                begin += len(held.popleft())
        if end < min(start + samples, length):
            raise BadSound(f"unreadable: it ends {length - end} samples before its length")
        yield np.concatenate(held)[start - begin :][:samples].copy()


def mono_at(wave: np.ndarray, rate: float, sample_rate_hz: int) -> np.ndarray:
    """(samples, channels) float32 at `rate` -> (samples,) at `sample_rate_hz`, channels averaged.

    Raises:
        BadSound: empty, not finite, or a peak beyond 4.
    """
    averaged, peak = mono(wave)
    if peak < SILENT:
        check_peaks(peak, float(np.abs(wave).max(initial=0)))
    if rate != sample_rate_hz:
        averaged = soxr.resample(averaged, rate, sample_rate_hz, quality="HQ")
    if len(averaged) == 0:
        raise BadSound("empty: no samples")
    return averaged


def crop_positions(crops: int) -> np.ndarray:
    """(crops,) float64 in [0, 1) for `crop`: the middle, or equal steps from begin to end."""
    if crops == 1:
        return np.array([0.5])
    return np.minimum(np.linspace(0, 1, crops), np.nextafter(1, 0))


def window_counts(lengths: np.ndarray | float) -> np.ndarray:
    """int64, how many windows cover sounds of these lengths, in windows.

    A sound is not longer by a ten-thousandth: headers and resampling round.
    """
    return np.ceil(np.asarray(lengths) - 1e-4).clip(1).astype(np.int64)


def crop_start(length: int, samples: int, position: float) -> int:
    """The first sample of a crop, `floor(position * (length - samples + 1))`; 0 without a choice.

    `position` is in [0, 1): every start is as likely as any other. Float64, as in DALI's graph.
    """
    return int(np.floor(np.float64(position) * (max(0, length - samples) + 1)))


def crop(wave: np.ndarray, samples: int, position: float) -> np.ndarray:
    """At most `samples` of the wave, from `crop_start`."""
    return wave[crop_start(len(wave), samples, position) :][:samples]


def fill(wave: np.ndarray, samples: int, filling: str) -> np.ndarray:
    """Exactly `samples`: whole repeats then zeros (`repeatpad`), zeros (`pad`), cut repeats.

    Source: LAION-CLAP's published data pipeline, data_filling.
    """
    if len(wave) == samples:
        return wave
    repeats = {"repeatpad": samples // len(wave), "pad": 1, "repeat": samples // len(wave) + 1}
    full = np.tile(wave, repeats[filling])[:samples]
    return np.pad(full, (0, samples - len(full)))
