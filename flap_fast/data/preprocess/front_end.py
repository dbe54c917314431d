"""Decoded clips -> log-mels, by the front end and the fusion that the settings ask for.

waves (B, samples)           -> (B, 1, T, F)          each clip cropped or filled
waves (B, longest), lengths  -> (B, 4, T, F), longer  with fusion: whole clips
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Audio, Fusion
from flap_fast.data.preprocess.fusion import four_channels
from flap_fast.data.preprocess.mel import LogMel, kaldi_log_mel, pad_frames
from flap_fast.data.preprocess.mel_clap import ClapLogMel, clap_log_mel
from flap_fast.data.preprocess.waveform import crop, fill

FRONT_ENDS = {"kaldi": kaldi_log_mel, "clap": clap_log_mel}


class Decoded(NamedTuple):
    """Clips as a decoder gives them."""

    sound: Tensor
    """(B, samples) waveforms or (B, frames, F) log-mels (float16 from a cache), zeros behind the
    shorter ones."""
    lengths: Tensor
    """(B,) int64 on the CPU: samples or frames of each."""
    where: Tensor
    """(B, draws) float64 on the CPU: the draws that came with each, in [0, 1)."""


class MediaInput(NamedTuple):
    """What the model is to see of a batch of clips, before it is normalised."""

    media: Tensor
    """(B, 1, T, F), or (B, 4, T, F) with fusion. Of pictures: (B, R, R, 3) uint8."""
    longer: Tensor | None
    """With fusion, (B,) bool on the CPU: clips of which there is more than one channel shows."""


def log_mel(audio: Audio, device: torch.device | str = "cpu") -> LogMel | ClapLogMel:
    """The front end that the settings ask for: (B, samples) -> (B, T, F), not normalised."""
    return FRONT_ENDS[audio.mel](audio, device)


def fitted(wave: np.ndarray, where: float, audio: Audio, fusion: Fusion) -> np.ndarray:
    """A clip cropped and filled: audio.duration_s of it, or with fusion as much or more."""
    wave = crop(wave, fusion.longest(audio), where)
    return fill(wave, max(audio.samples, len(wave)), audio.filling)


def together(waves: Sequence[np.ndarray], where: np.ndarray) -> Decoded:
    """Clips of any lengths as one tensor, and draws (B,) or (B, draws)."""
    lengths = [len(wave) for wave in waves]
    if min(lengths) == max(lengths):
        sound = np.stack(waves)
    else:
        sound = np.zeros((len(waves), max(lengths)), np.float32)
        for row, wave in zip(sound, waves, strict=True):
            row[: len(wave)] = wave
    draws = torch.from_numpy(np.asarray(where, np.float64).reshape(len(waves), -1))
    return Decoded(torch.from_numpy(sound), torch.tensor(lengths), draws)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for: to a GPU only out of pinned memory."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class MelFrontEnd:
    """Decoded clips -> `MediaInput` on a device."""

    def __init__(self, audio: Audio, fusion: Fusion, device: torch.device):
        self.audio, self.fusion, self.device = audio, fusion, device
        self._mel = log_mel(audio, device)

    def __call__(self, clips: Decoded) -> MediaInput:
        sound = to_device(clips.sound, self.device)
        decoded_mels = sound.ndim == 3
        if not self.fusion.on:
            mel = pad_frames(sound.float(), self.audio.frames) if decoded_mels else self._mel(sound)
            return MediaInput(mel[:, None], None)
        frames = clips.lengths if decoded_mels else self.audio.frames_of(clips.lengths)
        chunk = self.audio.frames_of(self.audio.samples)
        parts, order = [], []
        for rows in _alike(frames, chunk):
            most, lengths = int(clips.lengths[rows].max()), clips.lengths[rows].to(self.device)
            some = sound[rows.to(self.device), :most]
            mel = some if decoded_mels else self._mel.whole(some, lengths)
            counts, where = frames[rows].to(self.device), clips.where[rows, 1:].to(self.device)
            parts.append(pad_frames(four_channels(mel, counts, chunk, where), self.audio.frames))
            order.append(rows)
        back = torch.cat(order).argsort().to(self.device)
        return MediaInput(torch.cat(parts)[back], frames > chunk)


def _alike(frames: Tensor, chunk: int) -> Iterator[Tensor]:
    """Rows by falling length, as many at a time as cost no more than the batch at one piece each.

    One long clip then costs its own length, not that of all others padded to it.
    """
    order = frames.argsort(descending=True, stable=True)
    while len(order):
        most = max(1, len(frames) * chunk // int(frames[order[0]]))
        yield order[:most]
        order = order[most:]
