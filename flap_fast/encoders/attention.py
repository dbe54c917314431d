"""Attention: within the rows of a batch, or within the segments of a pack; PyTorch's or xformers'.

    q, k, v (B, L, H, d) -> (B, L, H, d)          q, k, v (N, H, d), Segments -> (N, H, d)

B rows   L tokens of a row   N tokens in all   H heads   d width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.encoders.packing import Segments

# Of windowed attention, in queries: smaller ones cost more in calls than they save in products.
_LEAST_TILE = 64


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "sdpa") -> Tensor:
    """(B, L, H, d) three times -> (B, L, H, d): each token attends to all of its row."""
    if backend == "xformers":
        return xformers_ops("audio.attention").memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v).transpose(1, 2)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    dropout: float = 0.0,
    backend: str = "sdpa",
    setting: str = "audio.attention",
) -> Tensor:
    """(N, H, d) three times -> (N, H, d): each token attends only to its own sequence.

    With `segments.window`, only to so many tokens on either side of it, and never by xformers.

    Args:
        dropout: of the attention probabilities.
        backend: `sdpa` is PyTorch's variable-length flash attention where it serves, else its
            attention over the sequences of each length; `xformers` the latter's on a GPU.
        setting: the setting that chose the backend, for errors.
    """
    if backend == "xformers" and q.is_cuda:
        assert segments.window is None
        return packed_xformers_attention(q, k, v, segments.lengths, dropout, setting)
    if not varlen_serves(q.device, q.dtype, q.shape[2]):
        return _attention_by_length(q, k, v, segments, dropout)
    bounds = (segments.starts, segments.starts, segments.longest, segments.longest)
    window = segments.window
    if dropout == 0:
        # Here, not above: it imports torch._dynamo, a quarter of a command's start.
        from torch.nn.attention.varlen import varlen_attn

        # Older releases of PyTorch know no window.
        sides = {} if window is None else {"window_size": (window, window)}
        return varlen_attn(q, k, v, *bounds, **sides)  # type: ignore[return-value]
    # The same kernel: `varlen_attn` hands it no dropout.
    sides = {} if window is None else {"window_size_left": window, "window_size_right": window}
    flash = torch.ops.aten._flash_attention_forward
    return flash(q, k, v, *bounds, dropout, False, False, **sides)[0]


def varlen_serves(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether PyTorch's variable-length flash attention supports these heads."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width % 8 == 0
        and head_width <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _attention_by_length(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float
) -> Tensor:
    window, parts = segments.window, []
    for some in zip(*(segments.by_length(x) for x in (q, k, v)), strict=True):
        q, k, v = (x.transpose(1, 2) for x in some)
        if window is None or window >= q.shape[2] - 1:
            y = _attend(q, k, v, dropout=dropout)
        else:
            y = _windowed_attention(q, k, v, window, dropout)
        parts.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """(S, H, L, d) three times -> (S, H, L, d): each token to `window` others on either side.

    In tiles of queries with the keys that they can reach: all of L under a mask would cost as much
    as attention without a window.
    """
    L, parts = q.shape[2], []
    tile = max(window, _LEAST_TILE)
    token = torch.arange(L, device=q.device)
    for start in range(0, L, tile):
        queries = slice(start, start + tile)
        keys = slice(max(0, start - window), start + tile + window)
        reached = (token[queries, None] - token[keys]).abs() <= window
        some = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        parts.append(_attend(*some, mask=reached, dropout=dropout))
    return torch.cat(parts, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """(S, H, L, d) three times -> (S, H, L, d) by PyTorch's attention."""
    sdpa, dtype = functional.scaled_dot_product_attention, q.dtype
    if not wants_fp32(q.device, dtype):
        return sdpa(q, k, v, attn_mask=mask, dropout_p=dropout)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.float() for x in (q, k, v))
        return sdpa(q, k, v, attn_mask=mask, dropout_p=dropout).to(dtype)


def wants_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fp32 is faster: on a CPU, where bf16's backward pass takes three times as long."""
    return device.type == "cpu" and dtype == torch.bfloat16


def packed_xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float, setting: str
) -> Tensor:
    """(N, H, d) three times -> (N, H, d), within segments of these lengths."""
    ops = xformers_ops(setting)
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=q.device)
    packed = (x[None] for x in (q, k, v))
    return ops.memory_efficient_attention(*packed, attn_bias=mask, p=dropout)[0]


def xformers_ops(setting: str) -> Any:
    """xformers' operators, for the setting that asks for them.

    Raises:
        ConfigError: xformers is not there, or does not import.
    """
    try:
        from xformers import ops  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{setting} must be 'sdpa' where xformers does not import ({error}); "
            "pip install 'flap_fast[xformers]'"
        ) from None
    return ops
