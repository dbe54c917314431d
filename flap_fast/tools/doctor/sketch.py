"""Sketches of sounds, alike where recordings are the same, and the comparison that decides.

    sound -> power in 24 bands, frames of 64 ms -> 48 numbers:
        energy of each band, in dB of the loudest band's        which frequencies
        (sum of power)^2 / sum of power^2 of each, in dB        for how many frames they sound

Neither depends on gain, on the rate (8 kHz or more), on the channels or on silence around; encoding
and cutting a little change them little. Two sounds with sketches nearby are decoded and correlated:
`same_recording` is near 1 only where the waveforms themselves agree.
"""

from __future__ import annotations

import functools

import numpy as np

BANDS = 24
WIDTH = 2 * BANDS
_EDGES_HZ = np.geomspace(120, 3600, BANDS + 1)
_FRAME_S = 0.064
# A band 20 dB below the loudest one counts as empty: what is there may be the encoder, or noise.
_FLOOR = 1e-2
# Frames transformed together: the arrays stay in a core's cache.
_AT_ONCE = 32
# The rate at which waveforms are compared, and how much of them.
COMPARED_HZ, COMPARED_S = 8000, 30
# The most that one may begin later than the other.
_LAG_S = 1.0
# Lags between two samples: resampling and cutting move a sound by fractions of one.
_STEPS = 4
# The energy of each sound that must lie where both are.
_OVERLAP = 0.5


class Spectra:
    """Spectra of a sound's frames, block by block: memory does not grow with the sound."""

    def __init__(self, rate_hz: int):
        self._frame = max(2, round(rate_hz * _FRAME_S))
        self._hop = self._frame // 2
        self._bins = 1 << (self._frame - 1).bit_length()
        self._bands = _bands(self._bins, rate_hz)
        self._window = np.hanning(self._frame).astype(np.float32)
        self._rest = np.empty(0, np.float32)
        self._first, self._second = np.zeros(BANDS), np.zeros(BANDS)
        self._spectrum = np.zeros(self._bins // 2 + 1)
        self._frames = 0

    def add(self, wave: np.ndarray) -> None:
        """Add the next block, (n,) float32."""
        wave = np.concatenate([self._rest, wave])
        count = max(0, 1 + (len(wave) - self._frame) // self._hop)
        if count:
            self._add(wave, count)
        self._rest = wave[count * self._hop :]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """(48,) float32 sketch, zeros of silence, and the (bins,) mean power spectrum."""
        new = len(self._rest) - (self._frame - self._hop if self._frames else 0)
        if new > 0:
            self._add(np.pad(self._rest, (0, self._frame - len(self._rest))), 1)
        spectrum = self._spectrum / max(1, self._frames)
        top = self._first.max()
        if top <= 0:
            return np.zeros(WIDTH, np.float32), spectrum
        floor = _FLOOR * top
        energy = (self._first + floor) / top
        lasting = (self._first + floor) ** 2 / (self._second + floor**2)
        return (10 * np.log10(np.concatenate([energy, lasting]))).astype(np.float32), spectrum

    def _add(self, wave: np.ndarray, count: int) -> None:
        frames = np.lib.stride_tricks.sliding_window_view(wave, self._frame)[:: self._hop]
        for start in range(0, count, _AT_ONCE):
            some = frames[start : min(start + _AT_ONCE, count)]
            spectra = np.fft.rfft(some * self._window, self._bins)
            power = spectra.real**2 + spectra.imag**2
            bands = (power @ self._bands).astype(np.float64)
            self._first += bands.sum(0)
            self._second += (bands**2).sum(0)
            self._spectrum += power.sum(0)
        self._frames += count


@functools.lru_cache(16)
def _bands(bins: int, rate_hz: int) -> np.ndarray:
    """(bins / 2 + 1, 24) float32: how much of each bin lies in each band."""
    width = rate_hz / bins
    middle = np.arange(bins // 2 + 1)[:, None] * width
    low = np.maximum(_EDGES_HZ[:-1], middle - width / 2)
    high = np.minimum(_EDGES_HZ[1:], middle + width / 2)
    return (np.maximum(0, high - low) / width).astype(np.float32)


def same_recording(one: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of two waveforms (samples,) at 8 kHz over lags, in [0, 1].

    High frequencies are raised (first differences), else a common bass note would decide. Lags go
    up to a second and a quarter of the shorter sound; half of the energy of each must lie where
    both are. A sign that was turned does not matter.
    """
    if min(len(one), len(other)) < 2:
        return 0.0
    one, other = np.diff(one), np.diff(other)
    most = int(min(_LAG_S * COMPARED_HZ, min(len(one), len(other)) // 4))
    lags = np.arange(-most * _STEPS, most * _STEPS + 1)
    whole = np.round(lags / _STEPS).astype(np.int64)
    bins = 1 << (len(one) + len(other)).bit_length()
    spectrum = np.fft.rfft(one, bins) * np.fft.rfft(other, bins).conj()
    products = _STEPS * np.fft.irfft(spectrum, bins * _STEPS)[lags]
    begin, end = np.maximum(whole, 0), np.minimum(len(one), len(other) + whole)
    energy_one, whole_one = _energy(one, begin, end)
    energy_other, whole_other = _energy(other, begin - whole, end - whole)
    valid = (energy_one > _OVERLAP * whole_one) & (energy_other > _OVERLAP * whole_other)
    if not valid.any():
        return 0.0
    found = np.abs(products[valid]) / np.sqrt(energy_one * energy_other)[valid]
    return float(min(1.0, found.max()))


def _energy(wave: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, float]:
    """The energy between samples, and of all."""
    sums = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    return sums[end] - sums[begin], float(sums[-1])
