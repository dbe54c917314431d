"""infonce_ranks: InfoNCE where each rank holds a share of the clips and captions.

    loss = infonce(audio of all ranks, text of all ranks, scale), the same number on every rank

    W ranks   B clips of them all   b of this rank   D width

Gradients are for engines that average over ranks (DDP, DeepSpeed): each rank's is W times its part,
so that the average is the gradient of the global mean, for the embeddings and for the scale.

Two schemes give the same numbers. *replicated* gathers audio and text, and each rank sums its own
rows of the logits and its own columns: 12 b B D, nothing to communicate backward. *sharded* gathers
text only, adds up the columns' sums over ranks and sends the text's gradients back: 8 b B D.
Source: LAION-CLAP and CyCLIP gather embeddings; the schemes follow from the gradient's closed form.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels import infonce_chunks as chunks
from flap_kernels.checks import check_choice
from flap_kernels.infonce import Direction, check_arguments, infonce

Scheme = Literal["auto", "replicated", "sharded"]


def infonce_ranks(
    audio: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    group: Any = None,
    direction: Direction = "symmetric",
    scheme: Scheme = "auto",
    ids: Tensor | None = None,
) -> Tensor:
    """The mean InfoNCE loss over the clips of all ranks, the same on every rank, ().

    `audio` and `text` are this rank's share (b, D), which may be larger or smaller than another's;
    the rest is as in `infonce`. Without torch.distributed, or alone, this is `infonce`.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    scale = check_arguments(audio, text, scale, direction, ids)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return infonce(audio, text, scale, direction=direction, ids=ids)
    return _Replicated.apply(audio, text, scale, group, direction, ids)


def gather_rows(x: Tensor, shares: list[int], group: Any) -> Tensor:
    """The rows of all ranks, rank by rank."""
    parts = [x.new_empty(share, *x.shape[1:]) for share in shares]
    most = max(shares)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(gathered, padded, group=group)
    parts = [rows[:share] for rows, share in zip(gathered, shares, strict=True)]
    return torch.cat(parts)


def gather_shares(x: Tensor, group: Any) -> list[int]:
    """How many rows each rank holds."""
    mine = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    return torch.cat(counts).tolist()


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, group, direction, ids):
        shares = gather_shares(audio, group)
        B, offset = sum(shares), sum(shares[: dist.get_rank(group)])
        if B == 0:
            raise ValueError("audio must hold at least one row on some rank, got 0 on all")
        both = gather_rows(torch.cat([audio, text], dim=1), shares, group)
        all_audio, all_text = both.chunk(2, dim=1)
        all_ids = None if ids is None else gather_rows(ids, shares, group)
        kept = {"offset": offset, "columns": False, "x_ids": ids, "y_ids": all_ids}
        sums = []
        if direction != "t2a":
            sums.append(chunks.negatives(audio, all_text, scale, **kept))
        if direction != "a2t":
            sums.append(chunks.negatives(text, all_audio, scale, **kept))
        packed = torch.stack([*(side.rows for side in sums), sums[0].positives], dim=1)
        *sums, positives = gather_rows(packed, shares, group).unbind(1)
        ctx.weight = 1.0 / (B * len(sums))
        found = [chunks.terms(side, positives) for side in sums]
        losses = torch.stack([side.losses for side in found])
        rows, columns = ([side.lse for side in found] * 2)[:2]
        mine = slice(offset, offset + len(audio))
        misses = torch.stack([side.misses[mine] for side in found]).sum(0)
        rows = None if direction == "t2a" else rows
        columns = None if direction == "a2t" else columns
        saved = (audio, text, scale, all_audio, all_text, rows, columns, misses, ids, all_ids)
        ctx.save_for_backward(*saved)
        ctx.world, ctx.mine = len(shares), mine
        return losses.sum() * ctx.weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (audio, text, scale, all_audio, all_text, rows, columns, misses, ids, all_ids) = (
            ctx.saved_tensors
        )
        mine = ctx.mine
        # Engines average over ranks: the average of W times the parts is their sum.
        factor = grad * (ctx.weight * ctx.world)
        kept = {"offset": mine.start, "columns": False, "x_ids": ids, "y_ids": all_ids}
        a_grad, _, scale_grad = chunks.gradients(
            audio,
            all_text,
            scale,
            None if rows is None else rows[mine],
            columns,
            misses,
            factor,
            **kept,
        )
        t_grad, _, _ = chunks.gradients(
            text,
            all_audio,
            scale,
            None if columns is None else columns[mine],
            rows,
            misses,
            factor,
            **kept,
        )
        needs = ctx.needs_input_grad
        return (
            a_grad if needs[0] else None,
            t_grad if needs[1] else None,
            scale_grad.to(scale.dtype) if needs[2] else None,
            None,
            None,
            None,
        )
