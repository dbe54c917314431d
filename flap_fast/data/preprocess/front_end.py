"""Decoded clips -> log-mels, as the settings ask for: front end, lengths, fusion.

waves of one length  -> (B, 1, T, F)
waves of any lengths -> `PackedMels`              audio.length = variable
                     -> (B, 4, T, F), longer      with fusion
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flap_fast.config import Audio, Fusion
from flap_fast.data.batch import DecodedBatch, MediaInput, PackedMels, to_device
from flap_fast.data.preprocess.clap_mel import clap_log_mel
from flap_fast.data.preprocess.fusion import four_channels
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import LogMel, pad_frames
from flap_fast.data.preprocess.yamnet_mel import yamnet_log_mel

FRONT_ENDS = {"kaldi": kaldi_log_mel, "clap": clap_log_mel, "yamnet": yamnet_log_mel}


def log_mel(audio: Audio, device: torch.device | str = "cpu") -> LogMel:
    """The front end that audio.mel names: (B, samples) -> (B, T, F), not normalised."""
    return FRONT_ENDS[audio.mel](audio, device)


class MelFrontEnd:
    """Computes log-mels of decoded clips on a device."""

    def __init__(self, audio: Audio, fusion: Fusion, device: torch.device):
        self.audio, self.fusion, self.device = audio, fusion, device
        self._mel = log_mel(audio, device)

    def __call__(self, clips: DecodedBatch) -> MediaInput:
        """Log-mels, not normalised yet."""
        if self.audio.variable:
            return MediaInput(self.packed(self.mels(clips)), None)
        are_mels = clips.media.ndim == 2
        frames = clips.lengths if are_mels else self.audio.frames_of(clips.lengths)
        if self.fusion.on:
            return self._fused(clips, frames)
        media = to_device(clips.stacked, self.device)
        mel = pad_frames(media.float(), self.audio.frames) if are_mels else self._mel(media)
        return MediaInput(mel[:, None], None)

    def mels(self, clips: DecodedBatch) -> list[Tensor]:
        """The log-mel (frames, F) of each clip, as long as it is."""
        every = to_device(clips.media, self.device).split(clips.lengths.tolist())
        if clips.media.ndim == 2:
            return [mel.float() for mel in every]
        frames = self.audio.frames_of(clips.lengths).tolist()
        return list(self._mel.packed(every).split(frames))

    def are_whole(self, clips: DecodedBatch) -> list[bool]:
        """Which clips were not cropped; one exactly as long as a crop counts as cropped."""
        most = self.audio.samples
        most = self.audio.frames_of(most) if clips.media.ndim == 2 else most
        return (clips.lengths < most).tolist()

    def packed(self, mels: list[Tensor]) -> PackedMels:
        """Log-mels end to end, each with the rows of silence that complete its last patch."""
        order = sorted(range(len(mels)), key=lambda row: len(mels[row]))
        padded = tuple(self.audio.padded_frames(len(mels[row])) for row in order)
        shape = max(padded), self.audio.mel_bins
        silence = torch.full(shape, self._mel.silence, device=self.device)
        rows = []
        for row, total in zip(order, padded, strict=True):
            rows += [mels[row], silence[: total - len(mels[row])]]
        return PackedMels(torch.cat(rows), padded, tuple(order))

    def _fused(self, clips: DecodedBatch, frames: Tensor) -> MediaInput:
        """The four channels of each clip."""
        chunk = self.audio.frames_of(self.audio.samples)
        groups, order = [], []
        for rows in _groups_by_length(frames, chunk):
            positions = to_device(clips.positions[rows, 1:], self.device)
            mel = self._whole(clips, rows)
            lengths = to_device(frames[rows], self.device)
            channels = four_channels(mel, lengths, chunk, positions)
            groups.append(pad_frames(channels, self.audio.frames))
            order.append(rows)
        inverse = to_device(torch.cat(order).argsort(), self.device)
        return MediaInput(torch.cat(groups)[inverse], frames > chunk)

    def _whole(self, clips: DecodedBatch, rows: Tensor) -> Tensor:
        """(b, M, F) log-mels of some clips, each valid up to its own frames."""
        every = clips.media.split(clips.lengths.tolist())
        some = pad_sequence([every[row] for row in rows.tolist()], batch_first=True)
        some = to_device(some, self.device).float()
        if some.ndim == 3:
            return some
        return self._mel.whole(some, to_device(clips.lengths[rows], self.device))


def _groups_by_length(frames: Tensor, chunk: int) -> Iterator[Tensor]:
    """Groups of rows by decreasing length, each no larger in total than the batch of single crops.

    One long clip then costs its own length, not that of all others padded to it.
    """
    order = frames.argsort(descending=True, stable=True)
    while len(order):
        most = max(1, len(frames) * chunk // int(frames[order[0]]))
        yield order[:most]
        order = order[most:]
