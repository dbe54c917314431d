"""Kaldi's log-mel, on any device; exact within float32's rounding.

    frames = wave[160 m : 160 m + 400]                     m < 998 for 10 s
    x      = hann (y[n] - 0.97 y[n - 1]),  y = frames - mean(frames)
    power  = |rfft(x, 512)|^2
    logmel = log(max(power M^T, 2**-23))                   M (128, 257)

The window is zero at its first sample, so the frame that is transformed begins with its second,
which turns phases alone. True float32 throughout: TF32 would lift the noise floor of quiet bins.

Source: torchaudio.compliance.kaldi.fbank, as AudioMAE's published code calls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Audio
from flap_fast.data.preprocess.log_mel import FramedLogMel
from flap_kernels.precision import float32_products

FLOOR = 2.0**-23
PREEMPHASIS = 0.97


@dataclass(frozen=True)
class KaldiLogMel(FramedLogMel):
    """The `LogMel` of Kaldi: window and mel matrix; `kaldi_log_mel(audio, device)` makes one."""

    window: Tensor  # (399,) float32, without its first sample, which is 0
    mel: Tensor  # (F, bins) float32

    def _levelled(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A sound without its mean."""
        if lengths is None:
            return wave - wave.mean(-1, keepdim=True)
        return wave - wave.sum(1, keepdim=True) / lengths[:, None]

    def _log_mel(self, frames: Tensor) -> Tensor:
        """(..., M, window) -> (..., M, F)."""
        with torch.autocast(frames.device.type, enabled=False), float32_products("ieee"):
            frames = frames - frames.mean(-1, keepdim=True)
            x = frames[..., 1:].sub(frames[..., :-1], alpha=PREEMPHASIS).mul_(self.window)
            real, imaginary = torch.view_as_real(torch.fft.rfft(x, self.size)).unbind(-1)
            power = real.square().addcmul_(imaginary, imaginary)
            return (power @ self.mel.T).clamp_(min=FLOOR).log_()

    @property
    def silence(self) -> float:
        """The log-mel of silence: its lowest value."""
        return math.log(FLOOR)

    @property
    def size(self) -> int:
        """Samples that are transformed, the last of them zeros."""
        return fft_size(self.audio.window)


def kaldi_log_mel(audio: Audio, device: torch.device | str = "cpu") -> KaldiLogMel:
    """The front end's window and matrix, computed in float64 and stored in float32."""
    window = torch.from_numpy(hann(audio.window)[1:])
    mel = torch.from_numpy(
        mel_matrix(audio.mel_bins, audio.window, audio.sample_rate_hz, *audio.range_hz)
    )
    return KaldiLogMel(audio, window.float().to(device), mel.float().to(device))


def fft_size(window: int) -> int:
    """The window's length, rounded up to a power of two."""
    return 1 << (window - 1).bit_length()


def hann(window: int) -> np.ndarray:
    """The symmetric Hann window, float64."""
    return 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(window) / (window - 1))


def mel_matrix(
    bins: int, window: int, sample_rate_hz: int, low_hz: float, high_hz: float
) -> np.ndarray:
    """(F, fft/2 + 1) float64: triangles in mel from the lowest frequency to the highest.

    None at Nyquist.
    """
    size = fft_size(window)

    def mel(hz):
        return 1127.0 * np.log1p(hz / 700.0)

    low, high = mel(low_hz), mel(high_hz)
    step = (high - low) / (bins + 1)
    left = low + step * np.arange(bins)[:, None]
    at = mel(np.arange(size // 2) * sample_rate_hz / size)[None, :]
    rising, falling = (at - left) / step, (left + 2 * step - at) / step
    matrix = np.maximum(0.0, np.minimum(rising, falling))
    return np.pad(matrix, ((0, 0), (0, 1)))
