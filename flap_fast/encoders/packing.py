"""Packed captions: padding is neither embedded nor multiplied nor attended to.

    mask (B, L) -> Pack;   q, k, v (N, H, d), Pack -> (N, H, d)

Shorter captions stand first, so that captions of one length are neighbours: a plain view of them is
a batch without padding, which is all that the fallback needs.

B captions   L tokens of the longest   N tokens in all   H heads   d width of a head
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.encoders.blocks import packed_xformers_attention


@dataclass(frozen=True)
class Pack:
    """The layout of a batch of packed captions."""

    flat_index: Tensor
    """(N,) int64: the index of each token in the flat padded (B * L,)."""
    caption_index: Tensor
    """(B,) int64: the index of each caption of the batch in the pack."""
    starts: Tensor
    """(B + 1,) int32: where the pack's captions start, and N."""
    groups: tuple[tuple[int, int], ...]
    """On the host: (captions, tokens of each) by length, shorter captions first."""

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return self.groups[-1][1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each caption of the pack."""
        return [tokens for captions, tokens in self.groups for _ in range(captions)]

    def packed(self, padded: Tensor) -> Tensor:
        """(B, L) -> (N,)."""
        return padded.flatten().index_select(0, self.flat_index)

    def by_length(self, x: Tensor) -> Iterator[Tensor]:
        """(N, ...) -> views (captions, tokens of each, ...)."""
        sizes = [captions * tokens for captions, tokens in self.groups]
        for part, group in zip(x.split(sizes), self.groups, strict=True):
            yield part.unflatten(0, group)

    def first(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, D), each caption's first token."""
        return x.index_select(0, self.starts.index_select(0, self.caption_index))

    def mean(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, D), over each caption's tokens."""
        means = torch.cat([part.mean(1) for part in self.by_length(x)])
        return means.index_select(0, self.caption_index)


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
        flat_index=_sent(by_length[row] * mask.shape[1] + column, device),
        caption_index=_sent(by_length.argsort(), device),
        starts=_sent(functional.pad(lengths[by_length].cumsum(0), (1, 0)).int(), device),
        groups=tuple(zip(captions.tolist(), tokens.tolist(), strict=True)),
    )


def _sent(x: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory does a copy never wait.
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, dropout: float = 0.0, backend: str = "sdpa"
) -> Tensor:
    """(N, H, d) three times -> (N, H, d): each token attends only to its own caption.

    Args:
        dropout: of the attention probabilities.
        backend: `sdpa` is PyTorch's variable-length flash attention where it serves, else its
            attention over the captions of each length; `xformers` the latter's on a GPU.
    """
    if backend == "xformers" and q.is_cuda:
        return packed_xformers_attention(q, k, v, pack.lengths, dropout)
    if not varlen_serves(q.device, q.dtype, q.shape[2]):
        return _attention_by_length(q, k, v, pack, dropout)
    # Imported here: it brings torch._dynamo, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    bounds = (pack.starts, pack.starts, pack.longest, pack.longest)
    if dropout == 0:
        # Here, not above: it imports torch._dynamo, a quarter of a command's start.
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, *bounds)  # type: ignore[return-value]
    # The same kernel: `varlen_attn` hands it no dropout.
    return torch.ops.aten._flash_attention_forward(q, k, v, *bounds, dropout, False, False)[0]


def varlen_serves(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether PyTorch's variable-length flash attention supports these heads."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width % 8 == 0
        and head_width <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, pack: Pack, dropout: float) -> Tensor:
    parts = []
    for some in zip(pack.by_length(q), pack.by_length(k), pack.by_length(v), strict=True):
        heads_first = (x.transpose(1, 2) for x in some)
        y = functional.scaled_dot_product_attention(*heads_first, dropout_p=dropout)
        parts.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)
