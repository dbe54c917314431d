"""distributed_infonce: InfoNCE where each rank holds a slice of the clips and captions.

    loss = infonce(audio of all ranks, text of all ranks, scale), the same number on every rank

    W ranks   B clips of them all   b of this rank   D width

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import check_choice
from flap_kernels.infonce.backend import (
    Backend,
    Direction,
    DirectionSums,
    Precision,
    Targets,
    losses_and_sums,
)
from flap_kernels.infonce.op import check_arguments, choose_backend, infonce, operands

Scheme = Literal["auto", "replicated", "sharded"]

# Above this many clips a rank, a third less arithmetic outweighs the exchange in the backward.
REPLICATED_ROWS = 1500


def distributed_infonce(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    direction: Direction = "symmetric",
    scheme: Scheme = "auto",
    ids: Tensor | None = None,
    equal_sizes: bool = False,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean InfoNCE loss over the clips of all ranks of `group`, the same on every rank, ().

    `audio` and `text` are this rank's rows (b, D), more or fewer than another's, or none; the rest
    is as in `infonce`, and gradients are W times those of this rank's rows. `equal_sizes` promises
    that all ranks hold as many rows, and saves asking them, a wait for the device. `auto` is
    *replicated* up to 1500 clips a rank, else *sharded*. Collective: all ranks must call this with
    the same settings, and run its backward or not together. On one rank, this is `infonce`.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    scale = check_arguments(audio, text, scale, direction, ids, precision, workspace_mib)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return infonce(
            audio,
            text,
            scale,
            direction=direction,
            ids=ids,
            precision=precision,
            workspace_mib=workspace_mib,
        )
    sizes = RankSizes.of(audio, text, group, equal_sizes)
    if sizes.total == 0:
        raise ValueError("audio must hold at least one row on some rank, got 0 on all")
    if scheme == "auto":
        few = max(sizes.audio) <= REPLICATED_ROWS and sizes.audio == sizes.text
        scheme = "replicated" if few else "sharded"
    if scheme == "replicated" and sizes.audio != sizes.text:
        raise ValueError("scheme must be sharded where text has more rows than audio")
    run = {"replicated": _Replicated, "sharded": _Sharded}[scheme]
    audio, text, products = operands(audio, text, precision)  # rounded before they are sent
    backend = choose_backend(audio, products, workspace_mib)
    loss: Tensor = run.apply(audio, text, scale, ids, sizes, direction, backend)
    return loss


@dataclass(frozen=True)
class RankSizes:
    """Number of rows on each rank, and the collectives between ranks."""

    audio: tuple[int, ...]
    text: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, audio: Tensor, text: Tensor, group: dist.ProcessGroup | None, equal: bool
    ) -> RankSizes:
        """Gather the sizes of all ranks, or assume that they equal this rank's."""
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if equal:
            return cls((len(audio),) * world, (len(text),) * world, rank, group)
        own = torch.tensor([len(audio), len(text)], device=audio.device)
        counts = torch.empty(2 * world, dtype=own.dtype, device=own.device)
        _all_gather(counts, own, group)
        pairs = counts.view(world, 2).tolist()
        return cls(tuple(a for a, _ in pairs), tuple(t for _, t in pairs), rank, group)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.audio)

    @property
    def total(self) -> int:
        """Number of clips of all ranks."""
        return sum(self.audio)

    @property
    def offset(self) -> int:
        """Index of this rank's first caption among those of all ranks."""
        return sum(self.text[: self.rank])

    @property
    def own(self) -> slice:
        """Range of this rank's pairs among the captions of all ranks."""
        return slice(self.offset, self.offset + self.audio[self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks' text (or of as many), rank by rank."""
        most = max(self.text)
        padded = x.contiguous()
        if len(x) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x
        rows = x.new_empty(self.world * most, *x.shape[1:])
        _all_gather(rows, padded, self.group)
        if len(set(self.text)) == 1:
            return rows
        by_rank = rows.view(self.world, most, *x.shape[1:]).unbind()
        return torch.cat([rows[:n] for rows, n in zip(by_rank, self.text, strict=True)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks of x (rows of all ranks' text, D)."""
        most = max(self.text)
        if len(set(self.text)) > 1:
            padded = x.new_zeros(self.world, most, *x.shape[1:])
            for of_rank, rows in zip(padded, x.split(self.text), strict=True):
                of_rank[: len(rows)] = rows
            x = padded.flatten(0, 1)
        out = x.new_empty(most, *x.shape[1:])
        _reduce_scatter(out, x, self.group)
        return out[: self.text[self.rank]]

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Sum or maximum over all ranks, in place."""
        dist.all_reduce(x, op=op, group=self.group)
        return x


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, sizes: RankSizes, direction, backend: Backend):
        both = sizes.gather(torch.cat([audio, text], dim=1))
        all_audio, all_text = both.chunk(2, dim=1)
        targets = Targets(sizes.offset, ids, None if ids is None else sizes.gather(ids))
        # Each direction as sums over rows: captions are the rows of t2a.
        blocks = [
            backend.sums(x, y, scale, targets, columns=False)
            for other, x, y in (("t2a", audio, all_text), ("a2t", text, all_audio))
            if other != direction
        ]
        found = [block.row_lse_negatives for block in blocks]
        packed = torch.stack([*(x for x in found if x is not None), blocks[0].positive_logits], 1)
        *every_lse, positive_logits = sizes.gather(packed).unbind(1)
        terms = [losses_and_sums(lse, positive_logits) for lse in every_lse]
        row = None if direction == "t2a" else terms[0][1]
        column = None if direction == "a2t" else terms[-1][1]
        ctx.save_for_backward(audio, text, scale, both, *_unpack(row), *_unpack(column))
        ctx.factor = 1.0 / (sizes.total * len(terms))
        ctx.sizes, ctx.targets, ctx.backend = sizes, targets, backend
        return torch.stack([losses for losses, _ in terms]).sum() * ctx.factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        audio, text, scale, both, *saved = ctx.saved_tensors
        row, column = _pack(*saved[:2]), _pack(*saved[2:])
        sizes: RankSizes = ctx.sizes
        backend: Backend = ctx.backend
        all_audio, all_text = both.chunk(2, dim=1)
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times each rank's gradient is their sum.
        factor = grad * (ctx.factor * sizes.world)
        a_grad = t_grad = scale_grad = None
        if audio_wanted or scale_wanted:
            own = None if row is None else row[sizes.own]
            a_grad, _, scale_grad = backend.gradients(
                audio, all_text, scale, own, column, factor, ctx.targets, y_wanted=False
            )
        if text_wanted:
            own = None if column is None else column[sizes.own]
            t_grad, _, _ = backend.gradients(
                text, all_audio, scale, own, row, factor, ctx.targets, y_wanted=False
            )
        return (
            a_grad if audio_wanted else None,
            t_grad,
            None if scale_grad is None else scale_grad.to(scale.dtype),
            *(None,) * 4,
        )


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, sizes: RankSizes, direction, backend: Backend):
        all_text = sizes.gather(text)
        targets = Targets(sizes.offset, ids, None if ids is None else sizes.gather(ids))
        by_row, by_column = direction != "t2a", direction != "a2t"
        sums = backend.sums(audio, all_text, scale, targets, rows=by_row, columns=by_column)
        positive_logits = sums.positive_logits
        losses = positive_logits.new_zeros(1)
        row = column = None
        if sums.row_lse_negatives is not None:
            terms, row = losses_and_sums(sums.row_lse_negatives, positive_logits)
            losses = terms.sum()[None]
        own_lse = sums.column_lse_negatives
        if own_lse is not None:
            own_positives = torch.full_like(own_lse, -torch.inf)
            own_positives[sizes.own] = positive_logits
            packed = sizes.reduce(torch.cat([own_lse, own_positives]), dist.ReduceOp.MAX)
            top, every_positive = packed.chunk(2)
            base = top.clamp(min=torch.finfo(top.dtype).min)
            # lse over ranks = base + log2 sum 2^(lse of a rank - base)
            packed = torch.cat([torch.exp2(own_lse - base), losses])
            packed = sizes.reduce(packed, dist.ReduceOp.SUM)
            terms, column = losses_and_sums(packed[:-1].log2() + base, every_positive)
            losses = packed[-1:] + terms.sum()
        else:
            losses = sizes.reduce(losses, dist.ReduceOp.SUM)
        ctx.save_for_backward(audio, text, scale, all_text, *_unpack(row), *_unpack(column))
        ctx.factor = 1.0 / (sizes.total * (by_row + by_column))
        ctx.sizes, ctx.targets, ctx.backend = sizes, targets, backend
        return losses[0] * ctx.factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        audio, text, scale, all_text, *saved = ctx.saved_tensors
        sizes: RankSizes = ctx.sizes
        backend: Backend = ctx.backend
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times each rank's gradient is their sum.
        factor = grad * (ctx.factor * sizes.world)
        a_grad, t_grad, scale_grad = backend.gradients(
            audio,
            all_text,
            scale,
            _pack(*saved[:2]),
            _pack(*saved[2:]),
            factor,
            ctx.targets,
            x_wanted=audio_wanted,
            y_wanted=text_wanted,
        )
        return (
            a_grad,
            None if t_grad is None else sizes.scatter_sum(t_grad).to(text.dtype),
            scale_grad.to(scale.dtype) if scale_wanted else None,
            *(None,) * 4,
        )


def _unpack(sums: DirectionSums | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sums is None else (sums.lse_negatives, sums.one_minus_p)


def _pack(lse_negatives: Tensor | None, one_minus_p: Tensor | None) -> DirectionSums | None:
    if lse_negatives is None or one_minus_p is None:
        return None
    return DirectionSums(lse_negatives, one_minus_p)


def _collective(new: str, old: str) -> Callable[..., Any]:
    """A collective by its name in PyTorch 2.14 or 2.11; 2.14 warns of the older name."""
    return getattr(dist, new if hasattr(dist, new) else old)


def _all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("all_gather_single", "all_gather_into_tensor")(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)
