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


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "sdpa") -> Tensor:
    """(B, L, H, d) three times -> (B, L, H, d): each token attends to all of its row."""
    if backend == "xformers":
        return xformers_ops("audio.attention").memory_efficient_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    dropout: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """(N, H, d) three times -> (N, H, d): each token attends only to its own sequence.

    Args:
        dropout: of the attention probabilities.
        backend: `sdpa` is PyTorch's variable-length flash attention where it serves, else its
            attention over the sequences of each length; `xformers` the latter's on a GPU.
    """
    if backend == "xformers" and q.is_cuda:
        return packed_xformers_attention(q, k, v, segments.lengths, dropout)
    if not varlen_serves(q.device, q.dtype, q.shape[2]):
        return _attention_by_length(q, k, v, segments, dropout)
    # Imported here: it brings torch._dynamo, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    bounds = (segments.starts, segments.starts, segments.longest, segments.longest)
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


def _attention_by_length(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float
) -> Tensor:
    parts = []
    for some in zip(
        segments.by_length(q), segments.by_length(k), segments.by_length(v), strict=True
    ):
        heads_first = (x.transpose(1, 2) for x in some)
        y = functional.scaled_dot_product_attention(*heads_first, dropout_p=dropout)
        parts.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def packed_xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropout: float
) -> Tensor:
    """(N, H, d) three times -> (N, H, d), within segments of these lengths."""
    ops = xformers_ops("text.attention")
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
