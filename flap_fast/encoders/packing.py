"""Packed sequences: tokens of captions, or of clips, end to end, without padding.

    segments(lengths, rows) -> Segments          mask (B, L) -> Pack, the Segments of captions

Shorter sequences stand first, so that those of one length are neighbours: a plain view of them is
a batch without padding, which is all that attention on a CPU needs.

B sequences   L tokens of the longest   N tokens in all   D width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.data.batch import to_device
from flap_kernels import gather_tokens


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a batch lie in a pack, shorter ones first."""

    index: Tensor
    """(B,) int64: the segment of each row of the batch."""
    starts: Tensor
    """(B + 1,) int32: where the segments start, and N."""
    groups: tuple[tuple[int, int], ...]
    """On the host: (segments, tokens of each) by length, shorter ones first."""
    window: int | None = field(default=None, kw_only=True)
    """How many tokens on either side a token attends to; None: all of its segment."""

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return self.groups[-1][1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [tokens for segments, tokens in self.groups for _ in range(segments)]

    @property
    def tokens(self) -> int:
        """N."""
        return sum(segments * tokens for segments, tokens in self.groups)

    def of_tokens(self, x: Tensor | None = None) -> Tensor:
        """(N, ...): of each token the row of `x` (B, ...) that its segment has, or the segment."""
        lengths = self.starts.diff()
        if x is None:
            x = torch.arange(len(lengths), device=lengths.device)
        return x.repeat_interleave(lengths, 0, output_size=self.tokens)

    def behind(self, first: Tensor, others: Tensor) -> Tensor:
        """(N, D): the first token of each segment from `first` (B, D), the rest from `others`."""
        clip = self.of_tokens()
        token = torch.arange(len(clip), device=clip.device)
        rows = torch.where(token == self.starts[clip], clip, len(first) + token - clip - 1)
        return gather_tokens(torch.cat([first, others])[None], rows[None])[0]

    def by_length(self, x: Tensor) -> Iterator[Tensor]:
        """(N, ...) -> views (segments, tokens of each, ...)."""
        sizes = [segments * tokens for segments, tokens in self.groups]
        for part, group in zip(x.split(sizes), self.groups, strict=True):
            yield part.unflatten(0, group)

    def first(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, D), the first token of each row of the batch."""
        return x.index_select(0, self.starts.index_select(0, self.index))

    def mean(self, x: Tensor, skip: int = 0) -> Tensor:
        """(N, D) -> (B, D), over each row's tokens behind the first `skip`."""
        parts = [part[:, skip:].mean(1, dtype=torch.float32) for part in self.by_length(x)]
        return torch.cat(parts).index_select(0, self.index)


@dataclass(frozen=True)
class Pack(Segments):
    """The segments of a batch of captions."""

    flat_index: Tensor
    """(N,) int64: the index of each token in the flat padded (B * L,)."""

    def packed(self, padded: Tensor) -> Tensor:
        """(B, L) -> (N,)."""
        return padded.flatten().index_select(0, self.flat_index)


def segments(
    lengths: Sequence[int],
    rows: Sequence[int],
    device: torch.device,
    *,
    window: int | None = None,
) -> Segments:
    """The segments of sequences of ascending lengths, on `device`.

    Args:
        rows: the row of the batch that each sequence is.
        window: of attention, in tokens on either side; None: all.
    """
    groups = [(len(list(same)), tokens) for tokens, same in groupby(lengths)]
    return Segments(
        index=to_device(torch.tensor(rows).argsort(), device),
        starts=to_device(functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), device),
        groups=tuple(groups),
        window=window,
    )


def pack(attention_mask: Tensor, device: torch.device) -> Pack:
    """The pack of a batch of padded captions, 1 on tokens, on `device`.

    How many tokens there are decides shapes, so the host has to know: a mask on the CPU costs
    nothing, one on a GPU waits for all that the GPU was asked before.

    Raises:
        ValueError: a caption without a token.
    """
    mask = attention_mask.cpu() != 0
    lengths = mask.sum(1)
    if not lengths.all():
        empty = int(lengths.argmin())
        raise ValueError(f"each caption must have a token, got none in row {empty} of the mask")
    by_length = lengths.argsort(stable=True)
    row, column = mask[by_length].nonzero(as_tuple=True)
    tokens, captions = lengths[by_length].unique_consecutive(return_counts=True)
    return Pack(
        flat_index=to_device(by_length[row] * mask.shape[1] + column, device),
        index=to_device(by_length.argsort(), device),
        starts=to_device(functional.pad(lengths[by_length].cumsum(0), (1, 0)).int(), device),
        groups=tuple(zip(captions.tolist(), tokens.tolist(), strict=True)),
    )
