"""distributed_infonce: InfoNCE where each rank holds a slice of the clips and captions.

    loss = infonce(audio of all ranks, text of all ranks, scale), the same number on every rank

    W ranks   B clips of them all   b of this rank   n >= b of its captions   D width

Gradients are for engines that average over ranks (DDP, DeepSpeed): each rank's is W times the
gradient of its rows' terms, so that the average is the gradient of the global mean, for the
embeddings and for the scale.

Two schemes give the same numbers:

- *replicated* gathers audio and text; each rank sums its own rows of the logits and its own
  columns, and all gather those sums. 12 b B D, nothing to communicate in the backward.
- *sharded* gathers text only; the columns' sums are added up over ranks, and the text's gradients
  return by a reduce-scatter. 8 b B D, and one tower's traffic less.

Source: the gradient's closed form (`backend`); LAION-CLAP and CyCLIP gather with autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import check_choice, differentiable_once
from flap_kernels.infonce.arguments import (
    Options,
    check_arguments,
    choose_prefix_backend,
    operands,
)
from flap_kernels.infonce.backend import (
    Backend,
    BlockSums,
    Direction,
    DirectionSums,
    Duplicates,
    Precision,
    losses_and_sums,
)
from flap_kernels.infonce.columns import Columns, without_positives
from flap_kernels.infonce.op import infonce
from flap_kernels.infonce.prefixes import check_prefixes, positive_terms
from flap_kernels.infonce.rank_sizes import RankSizes, Scheme, scheme_in_force


def distributed_infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    direction: Direction = "symmetric",
    scheme: Scheme = "auto",
    ids: Tensor | None = None,
    duplicates: Duplicates = "mask",
    prefixes: Sequence[int] = (),
    prefix_weights: Sequence[float] | None = None,
    equal_sizes: bool = False,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean InfoNCE loss over the clips of all ranks of `group`, the same on every rank, ().

    `audio` (b, D) and `text` (n, D) are this rank's rows, more or fewer than another's, or none;
    the rest is as in `infonce`, and gradients are W times those of this rank's rows. `equal_sizes`
    promises that all ranks hold as many rows, and saves asking them, a wait for the device. `auto`
    is *replicated* up to 1500 clips a rank, else *sharded*. Collective: all ranks must call this
    with the same settings, and run its backward or not together. On one rank, this is `infonce`.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    scale, ids = check_arguments(
        audio, text, scale, direction, ids, duplicates, precision, workspace_mib
    )
    sizes = RankSizes.of(audio, text, group, equal_sizes)
    if sizes is None:
        return infonce(
            audio,
            text,
            scale,
            direction=direction,
            ids=ids,
            duplicates=duplicates,
            prefixes=prefixes,
            prefix_weights=prefix_weights,
            precision=precision,
            workspace_mib=workspace_mib,
        )
    if sizes.total == 0:
        raise ValueError("audio must hold at least one row on some rank, got 0 on all")
    sharded = scheme_in_force(scheme, max(sizes.pairs)) == "sharded"
    run = _Sharded if sharded else _Replicated
    prefixes, weights = check_prefixes(prefixes, prefix_weights, audio.shape[1])
    audio, text, products = operands(audio, text, precision)  # rounded before they are sent
    options = Options(products, workspace_mib, prefixes, weights)
    backend = choose_prefix_backend(audio, options)
    masked = ids if duplicates == "mask" else None
    loss: Tensor = run.apply(audio, text, scale, masked, sizes, direction, backend)
    if ids is not None and duplicates == "positive":
        loss = loss + positive_terms(audio, text, scale, ids, direction, prefixes, weights, sizes)
    return loss


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, sizes: RankSizes, direction, backend: Backend):
        own_text, extra = text[: len(audio)], text[len(audio) :]
        both = sizes.gather(torch.cat([audio, own_text], dim=1))
        captions = both.chunk(2, dim=1)[1], sizes.gather_extra(extra)
        every = _Ids.gathered(ids, sizes)
        # Each direction as sums over rows: captions are the rows of t2a.
        blocks: list[BlockSums] = []
        if direction != "t2a":
            columns = every.captions(*captions, sizes)
            blocks.append(columns.sums(backend, audio, scale, rows=True, columns=False))
        if direction != "a2t":
            columns = every.clips(both.chunk(2, dim=1)[0], sizes)
            blocks.append(columns.sums(backend, own_text, scale, rows=True, columns=False))
        found = [block.row_lse_negatives for block in blocks]
        packed = torch.stack([*(x for x in found if x is not None), blocks[0].positive_logits], 1)
        *every_lse, positive_logits = sizes.gather(packed).unbind(1)
        terms = [losses_and_sums(lse, positive_logits, backend.weights) for lse in every_lse]
        row = None if direction == "t2a" else terms[0][1]
        column = None if direction == "a2t" else terms[-1][1]
        sums = *_unpack(row), *_unpack(column)
        ctx.save_for_backward(audio, text, scale, both, captions[1], *every, *sums)
        ctx.factor = 1.0 / (sizes.total * len(terms))
        ctx.sizes, ctx.backend = sizes, backend
        return torch.stack([losses for losses, _ in terms]).sum() * ctx.factor

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        audio, text, scale, both, all_extra, *saved = ctx.saved_tensors
        every, row, column = _Ids(*saved[:4]), _pack(*saved[4:6]), _pack(*saved[6:])
        sizes: RankSizes = ctx.sizes
        backend: Backend = ctx.backend
        all_audio, all_text = both.chunk(2, dim=1)
        own_text, extra = text[: len(audio)], text[len(audio) :]
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times each rank's gradient is their sum.
        factor = grad * (ctx.factor * sizes.world)
        a_grad = t_grad = scale_grad = None
        if audio_wanted or scale_wanted:
            own = None if row is None else row[sizes.own]
            a_grad, _, scale_grad = every.captions(all_text, all_extra, sizes).gradients(
                backend, audio, scale, own, column, factor, y_wanted=False
            )
        if text_wanted:
            own = None if column is None else column[sizes.own]
            t_grad, _, _ = every.clips(all_audio, sizes).gradients(
                backend, own_text, scale, own, row, factor, y_wanted=False
            )
            if t_grad is not None and len(extra):
                targets = without_positives(sizes.total, every.own_extra, every.pairs)
                more, _, _ = backend.gradients(
                    extra, all_audio, scale, None, row, factor, targets, y_wanted=False
                )
                t_grad = t_grad if more is None else torch.cat([t_grad, more])
        return (
            a_grad if audio_wanted else None,
            t_grad,
            None if scale_grad is None else scale_grad.to(scale.dtype),
            *(None,) * 4,
        )


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, sizes: RankSizes, direction, backend: Backend):
        all_text = sizes.gather(text[: len(audio)])
        all_extra = sizes.gather_extra(text[len(audio) :])
        every = _Ids.gathered(ids, sizes)
        columns = every.captions(all_text, all_extra, sizes)
        by_row, by_column = direction != "t2a", direction != "a2t"
        sums = columns.sums(backend, audio, scale, rows=by_row, columns=by_column)
        positive_logits = sums.positive_logits
        losses = positive_logits.new_zeros(1)
        row = column = None
        if sums.row_lse_negatives is not None:
            terms, row = losses_and_sums(sums.row_lse_negatives, positive_logits, backend.weights)
            losses = terms.sum()[None]
        own_lse = sums.column_lse_negatives
        if own_lse is not None:
            own_positives = torch.full_like(own_lse, -torch.inf)
            own_positives[sizes.own] = positive_logits
            packed = sizes.reduce(torch.cat([own_lse, own_positives]), dist.ReduceOp.MAX)
            top, every_positive = packed.chunk(2)
            base = top.clamp(min=torch.finfo(top.dtype).min)
            # lse over ranks = base + log2 sum 2^(lse of a rank - base)
            packed = torch.cat([torch.exp2(own_lse - base).flatten(), losses])
            packed = sizes.reduce(packed, dist.ReduceOp.SUM)
            lse = packed[:-1].view_as(base).log2() + base
            terms, column = losses_and_sums(lse, every_positive, backend.weights)
            losses = packed[-1:] + terms.sum()
        else:
            losses = sizes.reduce(losses, dist.ReduceOp.SUM)
        gathered = all_text, all_extra, *every
        ctx.save_for_backward(audio, text, scale, *gathered, *_unpack(row), *_unpack(column))
        ctx.factor = 1.0 / (sizes.total * (by_row + by_column))
        ctx.sizes, ctx.backend = sizes, backend
        return losses[0] * ctx.factor

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        audio, text, scale, all_text, all_extra, *saved = ctx.saved_tensors
        every, row, column = _Ids(*saved[:4]), _pack(*saved[4:6]), _pack(*saved[6:])
        sizes: RankSizes = ctx.sizes
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times each rank's gradient is their sum.
        factor = grad * (ctx.factor * sizes.world)
        a_grad, t_grad, scale_grad = every.captions(all_text, all_extra, sizes).gradients(
            ctx.backend,
            audio,
            scale,
            row,
            column,
            factor,
            x_wanted=audio_wanted,
            y_wanted=text_wanted,
        )
        return (
            a_grad,
            None if t_grad is None else sizes.scatter_sum(t_grad).to(text.dtype),
            scale_grad.to(scale.dtype) if scale_wanted else None,
            *(None,) * 4,
        )


class _Ids(NamedTuple):
    """Ids of this rank's captions and of all ranks'; None without."""

    own: Tensor | None
    """(b, K), of this rank's pairs."""
    own_extra: Tensor | None
    """(n - b, K)."""
    pairs: Tensor | None
    """(B, K), of all ranks' pairs."""
    extra: Tensor | None

    @classmethod
    def gathered(cls, ids: Tensor | None, sizes: RankSizes) -> _Ids:
        if ids is None:
            return cls(None, None, None, None)
        own, extra = ids.tensor_split([sizes.pairs[sizes.rank]])
        return cls(own, extra, sizes.gather(own), sizes.gather_extra(extra))

    def captions(self, pairs: Tensor, extra: Tensor, sizes: RankSizes) -> Columns:
        """All ranks' captions as columns of this rank's clips."""
        return Columns.of(pairs, extra, sizes.own.start, self.own, self.pairs, self.extra)

    def clips(self, audio: Tensor, sizes: RankSizes) -> Columns:
        """All ranks' clips as columns of this rank's captions."""
        return Columns.of(audio, audio[:0], sizes.own.start, self.own, self.pairs)


def _unpack(sums: DirectionSums | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sums is None else (sums.lse_negatives, sums.one_minus_p)


def _pack(lse_negatives: Tensor | None, one_minus_p: Tensor | None) -> DirectionSums | None:
    if lse_negatives is None or one_minus_p is None:
        return None
    return DirectionSums(lse_negatives, one_minus_p)
