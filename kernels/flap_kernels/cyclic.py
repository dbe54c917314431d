"""cyclic: how far similarities are from being the same both ways round, of CyCLIP.

    cross_modal = sum_jk (a_j . t_k - a_k . t_j)^2 / B      (C-cyclic, L_C)
    in_modal    = sum_jk (a_j . a_k - t_j . t_k)^2 / B      (I-cyclic, L_I)

    B clips of all ranks   b of this rank   D width   W ranks

Plain PyTorch, in two forms that give the same numbers; no B x B matrix in either.

- *tiled*: the sums as they stand, tile by tile. b B D; gathers audio and text.
- *gram*: with U = A + T, V = A - T and the (D, D) matrices P = U^T U, Q = V^T V, K = U^T V summed
  over ranks, in_modal = (<P, Q> + tr K^2) / 2B and cross_modal = (<P, Q> - tr K^2) / 2B. b D D, and
  three (D, D) matrices are all that ranks exchange. The expansion in A^T A, T^T T and A^T T would
  cancel: in float32, nothing is left of it once T is near A.

Gradients over ranks are as in `infonce_ranks`: W times this rank's part.
Source: CyCLIP, arXiv 2205.14459, section 3; On the Language Encoder of Contrastive Cross-modal
Models, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import check_choice, check_floats, check_shape, check_together
from flap_kernels.infonce_chunks import accumulator
from flap_kernels.infonce_launch import products_in
from flap_kernels.infonce_ranks import Shares

Form = Literal["auto", "tiled", "gram"]

_TILE = 1024


def cyclic_reference(audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Say what `cyclic` means, with whole matrices."""
    wide = accumulator(audio.dtype)
    across = (audio @ text.T).to(wide)
    within = (audio @ audio.T).to(wide) - (text @ text.T).to(wide)
    cross_modal, in_modal = (x.square().sum() / len(audio) for x in (across - across.T, within))
    return cross_modal, in_modal


def form_in_force(form: Form, B: int, D: int) -> Form:
    """What `auto` takes: the form that multiplies less, there and back (24 b B D or 14 b D D)."""
    return ("gram" if 24 * B > 14 * D else "tiled") if form == "auto" else form


def cyclic(
    audio: Tensor,
    text: Tensor,
    *,
    group: Any = None,
    form: Form = "auto",
    equal_shares: bool = False,
) -> tuple[Tensor, Tensor]:
    """The cross-modal and the in-modal cyclic loss over the clips of all ranks, () float32 each.

    `audio` and `text` are this rank's unit rows (b, D); computed in float32, under autocast too.
    Without torch.distributed, or alone, B = b. `equal_shares` promises that all ranks hold as many;
    without it, they are asked. A loss that does not enter the total costs nothing in the backward.
    Raises ValueError and TypeError on shapes, devices and types that do not fit.
    """
    check_choice("form", form, get_args(Form))
    check_shape("audio", audio, (None, None), "(B, D)")
    check_shape("text", text, audio.shape, "(B, D) like audio")
    check_floats(audio=audio, text=text)
    check_together(audio=audio, text=text)
    shares = None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        shares = Shares.of(audio, text, group, equal_shares)
    B, D = len(audio) if shares is None else shares.total, audio.shape[1]
    if B == 0:
        raise ValueError("audio must hold at least one row, got 0")
    run = {"tiled": _Tiled, "gram": _Gram}[form_in_force(form, B, D)]
    with _float32(audio):
        return run.apply(audio, text, shares, B)


@contextmanager
def _float32(x: Tensor) -> Iterator[None]:
    """Products as they are written, whatever autocast and TF32 are outside."""
    with torch.autocast(x.device.type, enabled=False), products_in("ieee"):
        yield


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, shares, B):
        wide = accumulator(audio.dtype)
        both = torch.cat([audio, text], dim=1)
        every = both if shares is None else shares.gather(both)
        ctx.save_for_backward(both, every)
        ctx.set_materialize_grads(False)
        ctx.shares, ctx.B, ctx.wide = shares, B, wide
        sums = torch.zeros(2, dtype=wide, device=audio.device)
        for a, t, _ in _tiles(both, wide):
            for a_all, t_all, _ in _tiles(every, wide):
                sums[0] += (a @ t_all.T).addmm_(t, a_all.T, alpha=-1).square_().sum()
                sums[1] += (a @ a_all.T).addmm_(t, t_all.T, alpha=-1).square_().sum()
        if shares is not None:
            shares.reduce(sums, dist.ReduceOp.SUM)
        return tuple((sums / B).unbind())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, across_grad, within_grad):
        both, every = ctx.saved_tensors
        # The factor 4: each pair stands in the sum twice, and is squared. W: engines average.
        factor = 4.0 / ctx.B * _world(ctx.shares)
        grad = torch.zeros_like(both, dtype=ctx.wide)
        with _float32(both):
            for a, t, rows in _tiles(both, ctx.wide):
                a_grad, t_grad = grad[rows].chunk(2, dim=1)
                for a_all, t_all, _ in _tiles(every, ctx.wide):
                    if across_grad is not None:
                        tile = (a @ t_all.T).addmm_(t, a_all.T, alpha=-1)
                        tile *= across_grad * factor
                        a_grad.addmm_(tile, t_all)
                        t_grad.addmm_(tile, a_all, alpha=-1)
                    if within_grad is not None:
                        tile = (a @ a_all.T).addmm_(t, t_all.T, alpha=-1)
                        tile *= within_grad * factor
                        a_grad.addmm_(tile, a_all)
                        t_grad.addmm_(tile, t_all, alpha=-1)
        return *grad.to(both.dtype).chunk(2, dim=1), None, None


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, shares, B):
        wide = accumulator(audio.dtype)
        u, v = _sum_and_difference(audio, text, wide)
        grams = torch.stack([u.T @ u, v.T @ v, u.T @ v])
        if shares is not None:
            shares.reduce(grams, dist.ReduceOp.SUM)
        ctx.save_for_backward(audio, text, grams)
        ctx.set_materialize_grads(False)
        ctx.shares, ctx.B, ctx.wide = shares, B, wide
        p, q, k = grams.double()
        product, trace = (p * q).sum(), (k * k.T).sum()
        return tuple(((product + way * trace) / (2 * B)).to(wide) for way in (-1, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, across_grad, within_grad):
        audio, text, (p, q, k) = ctx.saved_tensors
        u, v = _sum_and_difference(audio, text, ctx.wide)
        nil = p.new_zeros(())
        across = nil if across_grad is None else across_grad
        within = nil if within_grad is None else within_grad
        same, other = within + across, within - across
        factor = _world(ctx.shares) / ctx.B
        with _float32(audio):
            u_grad = (u @ (q * (same * factor))).addmm_(v, k * (other * factor))
            v_grad = (v @ (p * (same * factor))).addmm_(u, k.T * (other * factor))
        return (u_grad + v_grad).to(audio.dtype), (u_grad - v_grad).to(text.dtype), None, None


def _tiles(both: Tensor, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Audio and text of some rows at a time, and which rows."""
    for start in range(0, len(both), _TILE):
        rows = slice(start, min(start + _TILE, len(both)))
        audio, text = both[rows].to(wide).chunk(2, dim=1)
        yield audio, text, rows


def _sum_and_difference(audio: Tensor, text: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    audio, text = audio.to(wide), text.to(wide)
    return audio + text, audio - text


def _world(shares: Shares | None) -> int:
    return 1 if shares is None else len(shares.audio)
