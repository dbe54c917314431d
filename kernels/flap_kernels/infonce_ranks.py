"""infonce_ranks: InfoNCE where each rank holds a share of the clips and captions.

    loss = infonce(audio of all ranks, text of all ranks, scale), the same number on every rank

    W ranks   B clips of them all   b of this rank   D width

Gradients are for engines that average over ranks (DDP, DeepSpeed): each rank's is W times its part,
so that the average is the gradient of the global mean, for the embeddings and for the scale.

Two schemes give the same numbers:

- *replicated* gathers audio and text; each rank sums its own rows of the logits and its own
  columns, and all gather those sums. 12 b B D, nothing to communicate in the backward.
- *sharded* gathers text only; the columns' sums are added up over ranks, and the text's gradients
  return by a reduce-scatter. 8 b B D, and one tower's traffic less.

Source: the gradient's closed form (`infonce_chunks`); LAION-CLAP and CyCLIP gather with autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import check_choice
from flap_kernels.infonce import (
    Direction,
    Precision,
    check_arguments,
    infonce,
    launch_options,
    operands,
    path,
)
from flap_kernels.infonce_chunks import Side, losses_and_side

Scheme = Literal["auto", "replicated", "sharded"]

# Above this many clips a rank, a third less arithmetic outweighs the exchange in the backward.
REPLICATED_ROWS = 1500


def infonce_ranks(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    group: Any = None,
    direction: Direction = "symmetric",
    scheme: Scheme = "auto",
    ids: Tensor | None = None,
    equal_shares: bool = False,
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Tensor:
    """The mean InfoNCE loss over the clips of all ranks of `group`, the same on every rank, ().

    `audio` and `text` are this rank's share (b, D), larger or smaller than another's, or empty;
    the rest is as in `infonce`, and gradients are W times this rank's part. `equal_shares` promises
    that all ranks hold as many rows, and saves asking them, a wait for the device. `auto` is
    *replicated* up to 1500 clips a rank, else *sharded*. All ranks must call this with the same
    settings, and run its backward or not together. Alone, this is `infonce`.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    scale = check_arguments(audio, text, scale, direction, ids, precision, workspace_mib)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        options: dict[str, Any] = {"precision": precision, "workspace_mib": workspace_mib}
        return infonce(audio, text, scale, direction=direction, ids=ids, **options)
    shares = Shares.of(audio, text, group, equal_shares)
    if shares.total == 0:
        raise ValueError("audio must hold at least one row on some rank, got 0 on all")
    if scheme == "auto":
        few = max(shares.audio) <= REPLICATED_ROWS and shares.audio == shares.text
        scheme = "replicated" if few else "sharded"
    if scheme == "replicated" and shares.audio != shares.text:
        raise ValueError("scheme must be sharded where text has more rows than audio")
    run = {"replicated": _Replicated, "sharded": _Sharded}[scheme]
    audio, text, products = operands(audio, text, precision)  # rounded before they are sent
    return run.apply(audio, text, scale, ids, shares, direction, products, workspace_mib)


@dataclass(frozen=True)
class Shares:
    """How many rows each rank holds, and what it takes to move them."""

    audio: tuple[int, ...]
    text: tuple[int, ...]
    rank: int
    group: Any

    @classmethod
    def of(cls, audio: Tensor, text: Tensor, group: Any, equal: bool) -> Shares:
        """Ask all ranks, or take ours for theirs."""
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if equal:
            return cls((len(audio),) * world, (len(text),) * world, rank, group)
        mine = torch.tensor([len(audio), len(text)], device=audio.device)
        counts = torch.empty(2 * world, dtype=mine.dtype, device=mine.device)
        _all_gather(counts, mine, group)
        pairs = counts.view(world, 2).tolist()
        return cls(tuple(a for a, _ in pairs), tuple(t for _, t in pairs), rank, group)

    @property
    def total(self) -> int:
        """The clips of all ranks."""
        return sum(self.audio)

    @property
    def offset(self) -> int:
        """Where this rank's captions begin among those of all ranks."""
        return sum(self.text[: self.rank])

    @property
    def mine(self) -> slice:
        """This rank's pairs among the captions of all ranks."""
        return slice(self.offset, self.offset + self.audio[self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks' text (or of as many), rank by rank."""
        most, world = max(self.text), len(self.text)
        padded = x.contiguous()
        if len(x) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x
        rows = x.new_empty(world * most, *x.shape[1:])
        _all_gather(rows, padded, self.group)
        if len(set(self.text)) == 1:
            return rows
        parts = rows.view(world, most, *x.shape[1:]).unbind()
        return torch.cat([part[:n] for part, n in zip(parts, self.text, strict=True)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks of x (rows of all ranks' text, D)."""
        most, world = max(self.text), len(self.text)
        if len(set(self.text)) > 1:
            padded = x.new_zeros(world, most, *x.shape[1:])
            for part, rows in zip(padded, x.split(self.text), strict=True):
                part[: len(rows)] = rows
            x = padded.flatten(0, 1)
        out = x.new_empty(most, *x.shape[1:])
        _reduce_scatter(out, x, self.group)
        return out[: self.text[self.rank]]

    def reduce(self, x: Tensor, op: Any) -> Tensor:
        """All ranks' sum or maximum, in place."""
        dist.all_reduce(x, op=op, group=self.group)
        return x


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, shares, direction, precision, workspace_mib):
        both = shares.gather(torch.cat([audio, text], dim=1))
        all_audio, all_text = both.chunk(2, dim=1)
        all_ids = None if ids is None else shares.gather(ids)
        options = {"offset": shares.offset, "columns": False, "x_ids": ids, "y_ids": all_ids}
        options |= launch_options(audio, precision, workspace_mib)
        sides = [
            path(audio).negatives(*operands, scale, **options)
            for way, *operands in (("t2a", audio, all_text), ("a2t", text, all_audio))
            if way != direction
        ]
        packed = torch.stack([*(side.rows for side in sides), sides[0].positives], dim=1)
        *sums, positives = shares.gather(packed).unbind(1)
        losses, found = zip(*(losses_and_side(side, positives) for side in sums), strict=True)
        row = None if direction == "t2a" else found[0]
        column = None if direction == "a2t" else found[-1]
        ctx.save_for_backward(audio, text, scale, both, *_tensors(row), *_tensors(column))
        ctx.weight = 1.0 / (shares.total * len(found))
        ctx.shares, ctx.options = shares, options
        return torch.stack(losses).sum() * ctx.weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        audio, text, scale, both, *sides = ctx.saved_tensors
        row, column = _side(*sides[:2]), _side(*sides[2:])
        all_audio, all_text = both.chunk(2, dim=1)
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times the parts is their sum.
        factor = grad * (ctx.weight * len(ctx.shares.audio))
        mine = ctx.shares.mine
        a_grad = t_grad = scale_grad = None
        if audio_wanted or scale_wanted:
            own = None if row is None else row[mine]
            a_grad, _, scale_grad = path(audio).gradients(
                audio, all_text, scale, own, column, factor, **ctx.options
            )
        if text_wanted:
            own = None if column is None else column[mine]
            t_grad, _, _ = path(text).gradients(
                text, all_audio, scale, own, row, factor, **ctx.options
            )
        return (
            a_grad if audio_wanted else None,
            t_grad,
            None if scale_grad is None else scale_grad.to(scale.dtype),
            *(None,) * 5,
        )


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, ids, shares, direction, precision, workspace_mib):
        all_text = shares.gather(text)
        all_ids = None if ids is None else shares.gather(ids)
        by_row, by_column = direction != "t2a", direction != "a2t"
        options = {"offset": shares.offset, "x_ids": ids, "y_ids": all_ids}
        options |= launch_options(audio, precision, workspace_mib)
        found = path(audio).negatives(
            audio, all_text, scale, rows=by_row, columns=by_column, **options
        )
        positives, mine = found.positives, shares.mine
        losses = positives.new_zeros(1)
        row = column = None
        if by_row:
            terms, row = losses_and_side(found.rows, positives)
            losses = terms.sum()[None]
        if by_column:
            parts = found.columns
            placed = torch.full_like(parts, -torch.inf)
            placed[mine] = positives
            packed = shares.reduce(torch.cat([parts, placed]), dist.ReduceOp.MAX)
            top, all_positives = packed.chunk(2)
            base = top.clamp(min=torch.finfo(top.dtype).min)
            packed = torch.cat([torch.exp2(parts - base), losses])
            packed = shares.reduce(packed, dist.ReduceOp.SUM)
            terms, column = losses_and_side(packed[:-1].log2() + base, all_positives)
            losses = packed[-1:] + terms.sum()
        else:
            losses = shares.reduce(losses, dist.ReduceOp.SUM)
        ctx.save_for_backward(audio, text, scale, all_text, *_tensors(row), *_tensors(column))
        ctx.weight = 1.0 / (shares.total * (by_row + by_column))
        ctx.shares, ctx.options = shares, options
        return losses[0] * ctx.weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        audio, text, scale, all_text, *sides = ctx.saved_tensors
        audio_wanted, text_wanted, scale_wanted = ctx.needs_input_grad[:3]
        # Engines average over ranks: the average of W times the parts is their sum.
        factor = grad * (ctx.weight * len(ctx.shares.audio))
        a_grad, t_grad, scale_grad = path(audio).gradients(
            audio,
            all_text,
            scale,
            _side(*sides[:2]),
            _side(*sides[2:]),
            factor,
            rows=audio_wanted,
            columns=text_wanted,
            **ctx.options,
        )
        if t_grad is not None:
            t_grad = ctx.shares.scatter_sum(t_grad).to(text.dtype)
        return (
            a_grad,
            t_grad,
            scale_grad.to(scale.dtype) if scale_wanted else None,
            *(None,) * 5,
        )


def _tensors(side: Side | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if side is None else (side.negatives, side.misses)


def _side(negatives: Tensor | None, misses: Tensor | None) -> Side | None:
    return None if negatives is None or misses is None else Side(negatives, misses)


def _collective(new: str, old: str) -> Callable[..., Any]:
    """A collective that PyTorch 2.14 renamed, warning of the name that 2.11 knows."""
    return getattr(dist, new if hasattr(dist, new) else old)


def _all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("all_gather_single", "all_gather_into_tensor")(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)
