"""Decoded clips -> log-mels, by the front end and the fusion that the settings ask for.

waves (B, samples)           -> (B, 1, T, F)          each clip cropped or filled
waves (B, longest), lengths  -> (B, 4, T, F), longer  with fusion: whole clips
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flap_fast.config import Audio, Fusion
from flap_fast.data.batch import DecodedBatch, MediaInput, to_device
from flap_fast.data.preprocess.clap_mel import clap_log_mel
from flap_fast.data.preprocess.fusion import four_channels
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import LogMel, pad_frames

FRONT_ENDS = {"kaldi": kaldi_log_mel, "clap": clap_log_mel}


def log_mel(audio: Audio, device: torch.device | str = "cpu") -> LogMel:
    """The front end that audio.mel names: (B, samples) -> (B, T, F), not normalised."""
    return FRONT_ENDS[audio.mel](audio, device)


class MelFrontEnd:
    """Computes log-mels of decoded clips on a device."""

    def __init__(self, audio: Audio, fusion: Fusion, device: torch.device):
        self.audio, self.fusion, self.device = audio, fusion, device
        self._mel = log_mel(audio, device)

    def __call__(self, clips: DecodedBatch) -> MediaInput:
        """Log-mels (B, 1 or 4, T, F), not normalised yet."""
        media = to_device(clips.media, self.device)
        are_mels = media.ndim == 3
        if not self.fusion.on:
            mel = pad_frames(media.float(), self.audio.frames) if are_mels else self._mel(media)
            return MediaInput(mel[:, None], None)
        frames = clips.lengths if are_mels else self.audio.frames_of(clips.lengths)
        chunk = self.audio.frames_of(self.audio.samples)
        groups, order = [], []
        for rows in _groups_by_length(frames, chunk):
            longest, lengths = int(clips.lengths[rows].max()), clips.lengths[rows].to(self.device)
            some = media[rows.to(self.device), :longest]
            mel = some if are_mels else self._mel.whole(some, lengths)
            counts = frames[rows].to(self.device)
            positions = clips.positions[rows, 1:].to(self.device)
            channels = four_channels(mel, counts, chunk, positions)
            groups.append(pad_frames(channels, self.audio.frames))
            order.append(rows)
        inverse = torch.cat(order).argsort().to(self.device)
        return MediaInput(torch.cat(groups)[inverse], frames > chunk)


def _groups_by_length(frames: Tensor, chunk: int) -> Iterator[Tensor]:
    """Groups of rows by decreasing length, each no larger in total than the batch of single crops.

    One long clip then costs its own length, not that of all others padded to it.
    """
    order = frames.argsort(descending=True, stable=True)
    while len(order):
        most = max(1, len(frames) * chunk // int(frames[order[0]]))
        yield order[:most]
        order = order[most:]
