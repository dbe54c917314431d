"""Attention of packed sequences as one operator without values, as a GPU has it.

On a CPU it runs over the sequences of each length in turn, so that the number of operators would
depend on how many lengths there are, and their outputs would be kept twice.

    N tokens in all   H heads   d width of a head
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flap_fast.encoders import attention
from flap_fast.encoders.packing import Segments


@contextmanager
def packed_attention_in_one() -> Iterator[None]:
    """A context in which attention of packed fake tensors is one operator, without dropout."""
    real = attention._attention_by_length

    def in_one(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _dropout: float) -> Tensor:
        return torch.ops.flap_fast.packed_attention(q, k, v, segments.lengths)[0]

    attention._attention_by_length = in_one
    try:
        yield
    finally:
        attention._attention_by_length = real


@torch.library.custom_op("flap_fast::packed_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(N, H, d) three times -> (N, H, d) and the logarithms of sums, (H, N) float32."""
    raise NotImplementedError("counts shapes, computes nothing")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flap_fast::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, (N, H, d) each."""
    raise NotImplementedError("counts shapes, computes nothing")


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    operator = torch.ops.flap_fast.packed_attention_backward
    return *operator(grad, *ctx.saved_tensors, ctx.lengths), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def formulas() -> dict[Any, Any]:
    """FLOP of both operators: two products and four; recomputed scores do not count."""

    def product(shape: tuple[int, ...], lengths: list[int]) -> int:
        _, heads, width = shape
        return 2 * heads * width * sum(n * n for n in lengths)

    ops = torch.ops.flap_fast
    return {
        ops.packed_attention: lambda q, _k, _v, lengths, **_: 2 * product(q, lengths),
        ops.packed_attention_backward: lambda _, q, *rest, **__: 4 * product(q, rest[-1]),
    }
