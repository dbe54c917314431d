"""The stages of a batch on its way to the model.

EncodedBatch  ->  DecodedBatch  ->  MediaInput  ->  Batch
files' bytes      decode, crop      front end       captions as tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class EncodedBatch(NamedTuple):
    """The bytes of B clips, and their crop positions."""

    clips: list[bytes]
    positions: np.ndarray
    """(B,) or (B, P) in [0, 1): the crop position, then those of fusion's pieces."""
    numbers: Sequence[int] = ()
    """Which clips of the shards these are, where they come again in other batches."""


class DecodedBatch(NamedTuple):
    """B decoded clips, the output of all decoders, laid end to end."""

    media: Tensor
    """(samples,) of all waveforms, or (frames, F) of all log-mels (float16 from a cache); images:
    (B R, R, 3) uint8."""
    lengths: Tensor
    """(B,) int64 on the CPU: samples, frames or rows of each clip."""
    positions: Tensor
    """(B, P) float64 on the CPU: the positions that came with each clip, in [0, 1)."""

    @property
    def stacked(self) -> Tensor:
        """(B, length, ...) of clips of one length."""
        return self.media.unflatten(0, (len(self.lengths), -1))


class PackedMels(NamedTuple):
    """Log-mels of B clips of different lengths, end to end, shorter ones first.

    T_b is a multiple of a patch's side, so that all of them are one log-mel of T frames, too: patch
    n of a clip is patch `n + (patches of the clips before it)` of that.
    """

    mel: Tensor
    """(T, F) float32, T the sum of all T_b."""
    frames: tuple[int, ...]
    """T_b of each clip, ascending; a tuple, since the host decides by it."""
    order: tuple[int, ...]
    """The row of the batch that each clip is."""

    @property
    def device(self) -> torch.device:
        """The device of the log-mels."""
        return self.mel.device

    @property
    def nbytes(self) -> int:
        """Bytes of the log-mels."""
        return self.mel.nbytes

    def rows(self, rows: Sequence[int]) -> PackedMels:
        """Some clips of the batch, as the batch of `rows`."""
        order = {row: n for n, row in enumerate(rows)}
        chosen = [n for n, row in enumerate(self.order) if row in order]
        mels = self.mel.split(self.frames)
        frames = tuple(self.frames[n] for n in chosen)
        some = torch.cat([mels[n] for n in chosen])
        return PackedMels(some, frames, tuple(order[self.order[n]] for n in chosen))

    def in_order(self, x: Tensor) -> Tensor:
        """(B, ...) of the batch's rows -> (B, ...) of the clips in their packed order."""
        return x.index_select(0, to_device(torch.tensor(self.order), x.device))


Media = Tensor | PackedMels
"""The encoder's input of B clips, float32: (B, 1, T, F) log-mels, (B, 4, T, F) with fusion, images
(B, 3, R, R); packed with audio.length = variable."""


class MediaInput(NamedTuple):
    """The encoder's input of B clips; normalised once the preprocessor is done."""

    media: Media
    longer: Tensor | None
    """With fusion, (B,) bool on the CPU: clips longer than a channel shows."""

    @property
    def stacked(self) -> Tensor:
        """The media of clips of one length."""
        assert isinstance(self.media, Tensor)
        return self.media


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch of a training step: B clips, each with one of its captions."""

    media: Media
    """Normalised, SpecAug yet to come."""
    ids: Tensor
    """(S B, L) int64 tokens: of the B captions, then of the other S - 1 of `Loss.sentences`; with
    text.freeze on the CPU, where what is known of them is looked up."""
    attention_mask: Tensor
    """(S B, L) int64, 1 on tokens and 0 on padding; on the CPU, since the host decides by it."""
    sample_index: Tensor
    """(B,) int64: `step * global_batch + row`, the key of masks' and SpecAug's random numbers."""
    clips: np.ndarray
    """(B,) int64: which clips of the shards these are."""
    epoch: int
    """Epochs completed before this step."""
    micro_batches: int
    """Micro-batches of this step, the same on every rank."""
    longer: Tensor | None = None
    """With fusion, (B,) bool on the CPU: clips whose pieces are fused with the whole of them."""
    pair_ids: Tensor | None = None
    """(B, 2 + n) int64, each pair's clip, caption and n negatives, see `pair_ids`; set if a loss
    asks for it."""

    @property
    def stacked(self) -> Tensor:
        """The media of clips of one length."""
        assert isinstance(self.media, Tensor)
        return self.media


@dataclass(frozen=True)
class BadClip:
    """A clip that could not be used in training, and the clip that replaced it."""

    step: int
    clip: str
    reason: str
    replaced_by: str


def lay_end_to_end(clips: list[np.ndarray], positions: np.ndarray) -> DecodedBatch:
    """A batch of decoded clips.

    Args:
        positions: (B,) or (B, P), see `EncodedBatch`.
    """
    lengths = torch.tensor([len(clip) for clip in clips])
    crops = torch.from_numpy(np.asarray(positions, np.float64).reshape(len(clips), -1))
    return DecodedBatch(torch.from_numpy(np.concatenate(clips)), lengths, crops)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy on the device; to a GPU through pinned memory."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
