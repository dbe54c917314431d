"""One pass over clips: what is kept of each is a few numbers, a sketch and its captions.

A sound is read block by block, on threads: decoding and Fourier transforms release the GIL.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from flap_fast.data.preprocess.resampling import resampled
from flap_fast.data.preprocess.sound_file import LONGEST_S, SILENT, open_sound, seeks
from flap_fast.data.preprocess.unusable import BadSound, Unusable
from flap_fast.tools.doctor.clipping import FULL_SCALE, FlatTops, at_full_scale
from flap_fast.tools.doctor.sketch import COMPARED_HZ, COMPARED_S, WIDTH, Spectra
from flap_fast.tools.doctor.sources import Clips, Piece

Item = TypeVar("Item")
Result = TypeVar("Result")

# The pieces of a sound that are silent or not.
_SILENCE_S = 0.05
# Of a sound's peak: what is below it at either end is no part of the recording.
_SILENCE = 1e-3
# A channel this much quieter than `SILENT` x 100 of another is dead.
_LIVE = 100 * SILENT
# A spectrum in equal blocks: how many are below an edge, how many it may take, and the drop.
_BLOCKS, _WIDE, _STEEP, _EDGE_DB = 64, 3, 2, 25.0
_LOWEST_EDGE_HZ = 1800
# Clips that a thread takes at a time.
_CHUNK = 16


class Measured(NamedTuple):
    """What is kept of a sound."""

    seconds: float
    rate_hz: int
    channels: int
    peak: float
    clipped: float
    """Fraction of samples that were cut off at full scale, or below it at the sound's peak."""
    offset: float
    """Mean of the samples, in full scale; 0 where it is less than a fifth of their rms."""
    silent: float
    """Fraction of its pieces of 50 ms whose peak is below -80 dB."""
    dead: bool
    """A channel is silent and another is not."""
    edge_hz: float
    """Where its spectrum breaks off; half the rate where it does not."""
    sketch: np.ndarray
    """(48,) float16."""


@dataclass(frozen=True)
class Sounds:
    """The measurements of n clips, (n,) each; zeros for those in `faults`."""

    seconds: np.ndarray
    rate_hz: np.ndarray
    channels: np.ndarray
    peak: np.ndarray
    clipped: np.ndarray
    offset: np.ndarray
    silent: np.ndarray
    dead: np.ndarray
    edge_hz: np.ndarray
    sketch: np.ndarray
    faults: dict[int, str]
    """Why a sound cannot be read, by its row."""

    @property
    def read(self) -> np.ndarray:
        """(n,) bool: those that could be read."""
        found = np.ones(len(self.seconds), bool)
        found[list(self.faults)] = False
        return found


@dataclass(frozen=True)
class Captions:
    """The M captions of n clips."""

    texts: list[str]
    clip_of_caption: np.ndarray
    """(M,) int64 rows of the clips looked at."""
    without: np.ndarray
    """Rows of clips without any."""
    faults: dict[int, str]
    """Why a clip's JSON cannot be read, by its row."""
    tokens: np.ndarray | None = None
    """(M,) tokens of each caption, not cut; None without a tokenizer."""


def scan_sounds(
    clips: Clips, picked: np.ndarray, threads: int, done: Callable[[int], None]
) -> Sounds:
    """Measure the sounds of some clips.

    Args:
        done: is told how many more are done.
    """
    rows: list[Measured] = []
    faults: dict[int, str] = {}
    chunks = [picked[at : at + _CHUNK] for at in range(0, len(picked), _CHUNK)]
    for found in in_order(chunks, lambda chunk: [_measured(clips, c) for c in chunk], threads):
        for one in found:
            if isinstance(one, str):
                faults[len(rows)] = one
            rows.append(_NOTHING if isinstance(one, str) else one)
        done(len(found))
    columns = {n: np.array([getattr(row, n) for row in rows]) for n in Measured._fields}
    return Sounds(**columns, faults=faults)


def scan_captions(clips: Clips, picked: np.ndarray) -> Captions:
    """The captions of some clips."""
    texts: list[str] = []
    clip_of_caption: list[int] = []
    without, faults = [], {}
    for row, clip in enumerate(picked.tolist()):
        try:
            own = clips.captions(clip)
        except Unusable as why:
            faults[row], own = str(why), []
        if not own and row not in faults:
            without.append(row)
        texts += own
        clip_of_caption += [row] * len(own)
    of = np.array(clip_of_caption, np.int64)
    return Captions(texts, of, np.array(without, np.int64), faults)


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int
) -> Iterator[Result]:
    """Yield what `work` gives for each item, in their order; only a few are done ahead."""
    count = threads or os.cpu_count() or 1
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def waveform(clips: Clips, clip: int) -> np.ndarray:
    """A clip's first 30 s at 8 kHz without the silence around, for `same_recording`."""
    piece, most = clips.piece(clip), COMPARED_S * COMPARED_HZ
    blocks, read = [], 0
    with open_sound(piece.source) as file:
        frames = _frames(piece, file.samplerate)
        if piece.start_s:
            file.skip(round(piece.start_s * file.samplerate), seek=seeks(piece.source))
        for block in resampled(file.mono_blocks(frames), file.samplerate, COMPARED_HZ):
            blocks.append(block)
            read += len(block)
            if read >= most:
                break
    wave = np.concatenate(blocks)[:most]
    loud = np.flatnonzero(np.abs(wave) > _SILENCE * np.abs(wave).max(initial=0))
    return wave[loud[0] : loud[-1] + 1] if len(loud) else wave


def _measured(clips: Clips, clip: int) -> Measured | str:
    """The measurements of a clip, or why there are none."""
    try:
        return measure(clips.piece(clip))
    except Unusable as why:
        return str(why)


def _frames(piece: Piece, rate_hz: int) -> int:
    return round((piece.duration_s or LONGEST_S + 1) * rate_hz)


def measure(piece: Piece) -> Measured:
    """Measure one sound; raises `BadSound`."""
    with open_sound(piece.source) as file:
        rate, whole = file.samplerate, not piece.start_s and piece.duration_s is None
        if piece.start_s:
            file.skip(round(piece.start_s * rate), seek=seeks(piece.source))
        # Asked for all of them, it tells whether some are missing.
        frames = file.frames if whole else _frames(piece, rate)
        spectra, levels = Spectra(rate), _Levels(file.channels, round(rate * _SILENCE_S))
        for block, wave in file.checked_blocks(frames):
            spectra.add(wave)
            levels.add(block, wave)
        channels = file.channels
    if levels.samples == 0:
        raise BadSound("empty: no samples")
    sketch, spectrum = spectra.finish()
    mean, power = levels.total / levels.samples, levels.power / levels.samples
    return Measured(
        seconds=levels.samples / rate,
        rate_hz=rate,
        channels=channels,
        peak=float(levels.peaks.max()),
        clipped=(levels.cut if levels.peaks.max() >= FULL_SCALE else levels.flat.count)
        / levels.samples,
        offset=mean if mean**2 > 0.04 * power else 0.0,
        silent=levels.silent / max(1, levels.pieces),
        dead=bool(levels.peaks.min() < SILENT and levels.peaks.max() > _LIVE),
        edge_hz=edge_of(spectrum, rate),
        sketch=sketch.astype(np.float16),
    )


class _Levels:
    """Sums over a sound's blocks."""

    def __init__(self, channels: int, piece: int):
        self.samples = self.cut = self.silent = self.pieces = 0
        self.flat = FlatTops(channels)
        self.total = self.power = 0.0
        self.peaks = np.zeros(channels)
        self._piece = piece

    def add(self, block: np.ndarray, wave: np.ndarray) -> None:
        self.samples += len(wave)
        self.total += float(wave.sum(dtype=np.float64))
        self.power += float(np.square(wave, dtype=np.float64).sum())
        # Of (n, 2) NumPy takes eighty times as long for the largest of each column.
        channels = np.ascontiguousarray(block.T)
        tops = np.stack([channels.max(1, initial=0), -channels.min(1, initial=0)])
        self.peaks = np.maximum(self.peaks, tops.max(0))
        if self.peaks.max() < FULL_SCALE:
            self.flat.add(channels, tops)
        elif tops.max() >= FULL_SCALE:
            self.cut += at_full_scale(np.abs(channels).max(0) >= FULL_SCALE)
        if len(wave):
            starts = np.arange(0, len(wave), self._piece)
            self.silent += int((np.maximum.reduceat(np.abs(wave), starts) < SILENT).sum())
            self.pieces += len(starts)


def edge_of(spectrum: np.ndarray, rate_hz: int) -> float:
    """Where a mean power spectrum (bins,) breaks off and stays down, in Hz; else half the rate.

    Sounds that were resampled from a lower rate, or filtered by a codec, end at an edge: a drop of
    25 dB over a few hundredths of the spectrum. A sound that only grows weaker with frequency has
    none.
    """
    nyquist, top = rate_hz / 2, spectrum.max(initial=0.0)
    each = len(spectrum) // _BLOCKS
    if top <= 0 or each == 0:
        return nyquist
    level = 10 * np.log10(np.maximum(spectrum[: each * _BLOCKS] / top, 1e-14))
    blocks = np.median(level.reshape(_BLOCKS, each), axis=1)
    highest_behind = np.maximum.accumulate(blocks[::-1])[::-1]
    below = np.median(np.lib.stride_tricks.sliding_window_view(blocks, _WIDE), axis=1)
    drops = below[: _BLOCKS - _WIDE - _STEEP] - highest_behind[_WIDE + _STEEP :]
    edges_hz = np.arange(_WIDE, _WIDE + len(drops)) * nyquist / _BLOCKS
    drops[edges_hz < _LOWEST_EDGE_HZ] = 0
    best = int(drops.argmax())
    return float(edges_hz[best]) if drops[best] > _EDGE_DB else nyquist


_NOTHING = Measured(0.0, 0, 0, 0.0, 0.0, 0.0, 0.0, False, math.inf, np.zeros(WIDTH, np.float16))
