"""cyclic: the cyclic consistency losses of CyCLIP.

    cross_modal = sum_jk (a_j . t_k - a_k . t_j)^2 / B      (C-cyclic, L_C)
    in_modal    = sum_jk (a_j . a_k - t_j . t_k)^2 / B      (I-cyclic, L_I)

    B clips of all ranks   b of this rank   D width   W ranks

Plain PyTorch, in two forms that give the same numbers; no B x B matrix in either.

- *tiled*: the sums as they stand, tile by tile. b B D; gathers audio and text.
- *gram*: with U = A + T, V = A - T and the (D, D) matrices P = U^T U, Q = V^T V, K = U^T V summed
  over ranks, in_modal = (<P, Q> + tr K^2) / 2B and cross_modal = (<P, Q> - tr K^2) / 2B. b D D, and
  three (D, D) matrices are all that ranks exchange. The expansion in A^T A, T^T T and A^T T would
  cancel: in float32, nothing is left of it once T is near A.

Gradients over ranks are as in `distributed_infonce`: W times those of this rank's rows.
Source: CyCLIP, arXiv 2205.14459, section 3; On the Language Encoder of Contrastive Cross-modal
Models, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import (
    check_choice,
    check_floats,
    check_shape,
    check_together,
    differentiable_once,
)
from flap_kernels.infonce.rank_sizes import RankSizes
from flap_kernels.precision import (
    accumulator_dtype,
    add_product,
    float32_products,
    without_autocast,
)

Form = Literal["auto", "tiled", "gram"]

_TILE = 1024


def cyclic_reference(audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The two cyclic losses, from whole matrices."""
    dtype = accumulator_dtype(audio.dtype)
    cross = (audio @ text.T).to(dtype)
    cross = cross - cross.T
    inner = (audio @ audio.T).to(dtype) - (text @ text.T).to(dtype)
    cross_modal, in_modal = (x.square().sum() / len(audio) for x in (cross, inner))
    return cross_modal, in_modal


def form_in_force(form: Form, B: int, D: int) -> Form:
    """The form that `auto` selects: the one with fewer products (24 b B D or 14 b D D)."""
    return ("gram" if 24 * B > 14 * D else "tiled") if form == "auto" else form


def cyclic(
    audio: Tensor,
    text: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    form: Form = "auto",
    equal_sizes: bool = False,
) -> tuple[Tensor, Tensor]:
    """The cross-modal and in-modal cyclic losses over the clips of all ranks, () float32 each.

    `audio` and `text` are this rank's unit rows (b, D); computed in float32, under autocast too.
    On one rank, or without torch.distributed, B = b. `equal_sizes` promises that all ranks hold as
    many rows; without it, they are asked. A loss that does not enter the total costs nothing in the
    backward.

    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_choice("form", form, get_args(Form))
    check_shape("audio", audio, (None, None), "(B, D)")
    check_shape("text", text, audio.shape, "(B, D) like audio")
    check_floats(audio=audio, text=text)
    check_together(audio=audio, text=text)
    sizes = RankSizes.of(audio, text, group, equal_sizes)
    B, D = len(audio) if sizes is None else sizes.total, audio.shape[1]
    if B == 0:
        raise ValueError("audio must hold at least one row, got 0")
    run = {"tiled": _Tiled, "gram": _Gram}[form_in_force(form, B, D)]
    with _float32(audio):
        losses: tuple[Tensor, Tensor] = run.apply(audio, text, sizes, B)
        return losses


@contextmanager
def _float32(x: Tensor) -> Iterator[None]:
    """A context in which products are computed without autocast and TF32."""
    with without_autocast(x.device), float32_products("ieee"):
        yield


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, sizes, B):
        dtype = accumulator_dtype(audio.dtype)
        both = torch.cat([audio, text], dim=1)
        every = both if sizes is None else sizes.gather(both)
        ctx.save_for_backward(both, every)
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.B, ctx.dtype = sizes, B, dtype
        sums = torch.zeros(2, dtype=dtype, device=audio.device)
        for a, t, _ in _tiles(both, dtype):
            for a_all, t_all, _ in _tiles(every, dtype):
                # (a_j . t_k - t_j . a_k)^2, then (a_j . a_k - t_j . t_k)^2
                sums[0] += add_product(a @ t_all.T, t, a_all.T, alpha=-1).square_().sum()
                sums[1] += add_product(a @ a_all.T, t, t_all.T, alpha=-1).square_().sum()
        if sizes is not None:
            sizes.reduce(sums, dist.ReduceOp.SUM)
        return tuple((sums / B).unbind())

    @staticmethod
    @differentiable_once
    def backward(ctx, cross_grad, in_grad):
        both, every = ctx.saved_tensors
        # The factor 4: each pair stands in the sum twice, and is squared. W: engines average.
        factor = 4.0 / ctx.B * _world(ctx.sizes)
        grad = torch.zeros_like(both, dtype=ctx.dtype)
        with _float32(both):
            for a, t, rows in _tiles(both, ctx.dtype):
                a_grad, t_grad = grad[rows].chunk(2, dim=1)
                for a_all, t_all, _ in _tiles(every, ctx.dtype):
                    if cross_grad is not None:
                        tile = add_product(a @ t_all.T, t, a_all.T, alpha=-1)
                        tile *= cross_grad * factor
                        add_product(a_grad, tile, t_all)
                        add_product(t_grad, tile, a_all, alpha=-1)
                    if in_grad is not None:
                        tile = add_product(a @ a_all.T, t, t_all.T, alpha=-1)
                        tile *= in_grad * factor
                        add_product(a_grad, tile, a_all)
                        add_product(t_grad, tile, t_all, alpha=-1)
        return *grad.to(both.dtype).chunk(2, dim=1), None, None


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, sizes, B):
        dtype = accumulator_dtype(audio.dtype)
        u, v = _sum_and_difference(audio, text, dtype)
        grams = torch.stack([u.T @ u, v.T @ v, u.T @ v])
        if sizes is not None:
            sizes.reduce(grams, dist.ReduceOp.SUM)
        ctx.save_for_backward(audio, text, grams)
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.B, ctx.dtype = sizes, B, dtype
        p, q, k = grams.double()
        # cross_modal = (<P, Q> - tr K^2) / 2B, in_modal = (<P, Q> + tr K^2) / 2B
        product, trace = (p * q).sum(), (k * k.T).sum()
        return tuple(((product + sign * trace) / (2 * B)).to(dtype) for sign in (-1, 1))

    @staticmethod
    @differentiable_once
    def backward(ctx, cross_grad, in_grad):
        audio, text, (p, q, k) = ctx.saved_tensors
        u, v = _sum_and_difference(audio, text, ctx.dtype)
        nil = p.new_zeros(())
        cross = nil if cross_grad is None else cross_grad
        inner = nil if in_grad is None else in_grad
        same, other = inner + cross, inner - cross
        factor = _world(ctx.sizes) / ctx.B
        with _float32(audio):
            # dU = (same U Q + other V K) W / B, dV = (same V P + other U K^T) W / B
            u_grad = add_product(u @ (q * (same * factor)), v, k * (other * factor))
            v_grad = add_product(v @ (p * (same * factor)), u, k.T * (other * factor))
        return (u_grad + v_grad).to(audio.dtype), (u_grad - v_grad).to(text.dtype), None, None


def _tiles(both: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield tiles of audio and text rows, and the range of each tile."""
    for start in range(0, len(both), _TILE):
        rows = slice(start, min(start + _TILE, len(both)))
        audio, text = both[rows].to(dtype).chunk(2, dim=1)
        yield audio, text, rows


def _sum_and_difference(audio: Tensor, text: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    audio, text = audio.to(dtype), text.to(dtype)
    return audio + text, audio - text


def _world(sizes: RankSizes | None) -> int:
    return 1 if sizes is None else sizes.world
