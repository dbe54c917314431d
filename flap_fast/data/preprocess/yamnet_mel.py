"""YAMNet's log-mel, on any device; exact within float32's rounding.

    frames = wave[160 m : 160 m + 400]                     behind the sound zeros, while 160 m < n
    logmel = log(|rfft(hann frames, 512)| M^T + 0.001)     M (64, 257), 125 to 7,500 Hz

Magnitudes, not powers, and a floor well above float32's: quiet sounds are nearly silent to it. The
frames at the end that hold zeros are a good part of a short sound: without them the vector that the
trained YAMNet makes of one of 0.2 to 0.5 s is a quarter off, in the median.

The encoder's pieces of 96 frames, one every 48, are counted by frames, and those that overlap the
end count too. Google counts 1 + ceil(max(0, n - 15600) / 7680) pieces. So of 240 of each 7,680
lengths (15,361 to 15,600 samples, 23,041 to 23,280, and so on) there is one piece more here, half
of it silence; of all other lengths there are as many.

n samples

Source: YAMNet's params.py and features.py, in the TensorFlow models' audioset/yamnet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flap_fast.config import Audio
from flap_fast.data.preprocess.clap_mel import hann
from flap_fast.data.preprocess.kaldi_mel import fft_size, mel_matrix
from flap_fast.data.preprocess.log_mel import FramedLogMel
from flap_kernels.precision import float32_products

OFFSET = 0.001


@dataclass(frozen=True)
class YamnetLogMel(FramedLogMel):
    """The `LogMel` of YAMNet: window and mel matrix; `yamnet_log_mel(audio, device)` makes one."""

    window: Tensor  # (400,) float32
    mel: Tensor  # (F, bins) float32

    def _frames(self, wave: Tensor) -> Tensor:
        return super()._frames(pad(wave, (0, self.audio.window - 1)))

    def _log_mel(self, frames: Tensor) -> Tensor:
        """(..., M, window) -> (..., M, F)."""
        with torch.autocast(frames.device.type, enabled=False), float32_products("ieee"):
            spectrum = torch.fft.rfft(frames * self.window, fft_size(self.audio.window))
            real, imaginary = torch.view_as_real(spectrum).unbind(-1)
            magnitude = real.square().addcmul_(imaginary, imaginary).sqrt_()
            return (magnitude @ self.mel.T).add_(OFFSET).log_()

    @property
    def silence(self) -> float:
        """The log-mel of silence: its lowest value."""
        return math.log(OFFSET)


def yamnet_log_mel(audio: Audio, device: torch.device | str = "cpu") -> YamnetLogMel:
    """The front end's window and matrix, computed in float64 and stored in float32."""
    matrix = mel_matrix(audio.mel_bins, audio.window, audio.sample_rate_hz, *audio.range_hz)
    window, mel = torch.from_numpy(hann(audio.window)), torch.from_numpy(matrix)
    return YamnetLogMel(audio, window.float().to(device), mel.float().to(device))
