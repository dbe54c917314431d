"""What a profile notes of the batches that its steps take, to count their FLOP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flap_fast.data.batch import Batch, PackedMels


class Noted(NamedTuple):
    """What is noted of a micro-batch of B clips with S sentences each."""

    mask: Tensor
    """(S B, L), of its sentences."""
    frames: tuple[int, ...]
    """Of its clips, where they differ."""
    micro_batches: int


def noting(batches: Iterator[Batch], noted: list[Noted]) -> Iterator[Batch]:
    """The batches; adds to `noted` what is noted of each."""
    for batch in batches:
        frames = batch.media.frames if isinstance(batch.media, PackedMels) else ()
        noted.append(Noted(batch.attention_mask, frames, batch.micro_batches))
        yield batch


def sentence_lengths(step: Sequence[Noted], sentences: int) -> list[int]:
    """Tokens of a step's sentences: of all micro-batches the captions, then each of the others."""
    tokens = [batch.mask.sum(1).view(sentences, -1) for batch in step]
    return torch.cat(tokens, 1).flatten().tolist()
