"""LAION-CLAP's log-mel in decibels, on any device.

    power  = |STFT|^2          1024 samples, periodic Hann, a frame every 10 ms, ends reflected
    logmel = 10 log10(max(M power, 1e-10))                 M (64, 513)

Of M there are two. LAION's models without fusion were trained with librosa's (`slaney_norm`), those
with fusion with torchaudio's (`htk_none`); the wrong one costs accuracy without an error.

Source: LAION-CLAP's published code (HTSAT and data pipeline), librosa.filters.mel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flap_fast.config import Audio
from flap_fast.data.preprocess.log_mel import pad_frames, to_16_bits
from flap_kernels.precision import float32_products

FLOOR = 1e-10
# Slaney's scale: linear below 1 kHz, then 27 steps to each factor of 6.4.
_LINEAR_HZ, _BREAK_HZ, _STEP = 200 / 3, 1000.0, math.log(6.4) / 27


@dataclass(frozen=True)
class ClapLogMel:
    """The `LogMel` of CLAP: window and mel matrix; `clap_log_mel(audio, device)` makes one."""

    audio: Audio
    window: Tensor  # (1024,) float32
    mel: Tensor  # (F, 513) float32

    def __call__(self, wave: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, T, F) in decibels, padded with zero rows."""
        half = self.audio.window // 2
        wave = pad(self._rounded(wave), (half, half), mode="reflect")
        return pad_frames(self._log_mel(wave), self.audio.frames)

    def packed(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (samples,) of any lengths -> (M, F), their frames end to end, in decibels."""
        half = self.audio.window // 2
        ended = (pad(self._rounded(wave)[None], (half, half), mode="reflect") for wave in waves)
        return torch.cat([self._log_mel(wave)[0] for wave in ended])

    def whole(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """(B, longest), zeros behind each clip's length -> (B, M, F), valid up to its frames."""
        half, longest = self.audio.window // 2, wave.shape[1]
        at = (torch.arange(-half, longest + half, device=wave.device)).abs()[None, :]
        last = (lengths - 1)[:, None]
        # What lies behind the reflected end is in no valid frame: any sample will do.
        at = torch.where(at > last, 2 * last - at, at).clamp(min=0)
        return self._log_mel(self._rounded(wave).gather(1, at))

    @property
    def silence(self) -> float:
        """The log-mel of silence: its lowest value, in decibels."""
        return 10 * math.log10(FLOOR)

    def _rounded(self, wave: Tensor) -> Tensor:
        return to_16_bits(wave) if self.audio.int16_roundtrip else wave

    def _log_mel(self, wave: Tensor) -> Tensor:
        """(B, samples + 1024) with its ends -> (B, frames, F)."""
        size, hop = self.audio.window, self.audio.hop
        with torch.autocast(wave.device.type, enabled=False), float32_products("ieee"):
            spectrum = torch.stft(
                wave, size, hop, window=self.window, center=False, return_complex=True
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            logmel = (self.mel @ power).clamp_(min=FLOOR).log10_().mul_(10)
        return logmel.transpose(1, 2)


def clap_log_mel(audio: Audio, device: torch.device | str = "cpu") -> ClapLogMel:
    """The front end's window and matrix, computed in float64 and stored in float32."""
    mel = torch.from_numpy(mel_matrix(audio)).float().to(device)
    return ClapLogMel(audio, torch.from_numpy(hann(audio.window)).float().to(device), mel)


def hann(window: int) -> np.ndarray:
    """The periodic Hann window, float64."""
    return 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(window) / window)


def mel_matrix(audio: Audio) -> np.ndarray:
    """(F, 513) float64: triangles linear in Hz, of unit height (HTK) or unit area (Slaney)."""
    slaney = audio.mel_variant == "slaney_norm"
    to_mel, to_hz = (_slaney, _slaney_hz) if slaney else (_htk, _htk_hz)
    points = np.linspace(to_mel(audio.low_hz), to_mel(audio.high_hz), audio.mel_bins + 2)
    corners = to_hz(points)[:, None]
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    at = np.linspace(0, audio.sample_rate_hz / 2, audio.window // 2 + 1)[None, :]
    rising, falling = (at - low) / (peak - low), (high - at) / (high - peak)
    matrix = np.maximum(0.0, np.minimum(rising, falling))
    return matrix * 2 / (high - low) if slaney else matrix


def _htk(hz):
    return 2595.0 * np.log10(1 + hz / 700.0)


def _htk_hz(mel):
    return 700.0 * (10 ** (mel / 2595.0) - 1)


def _slaney(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + math.log(hz / _BREAK_HZ) / _STEP


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
    above = mel - _BREAK_HZ / _LINEAR_HZ
    return np.where(above < 0, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_STEP * above))
