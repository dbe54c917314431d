"""Pairs that share an id as positives of each other: the term that InfoNCE lacks for it.

    P_i = {j: pair j shares an id with pair i}, i among them
    loss_i = logsumexp_j S[i, j] - mean over j in P_i of S[i, j]
           = (logsumexp_j S[i, j] - S[i, i]) + (S[i, i] - mean over j in P_i of S[i, j])

The first bracket is InfoNCE's. The second is linear in the logits, so that it needs no tile of
them, but sums of embeddings over the members of an id: B D work. Over both directions,

    sum_i a_i . c_i
    c_i = (u + v) t_i - u sum_{j in P_i} t_j / |P_i| - v sum_{j in P_i} t_j / |P_j|

with u = 1 if clips are compared with captions (a2t), v = 1 if captions are with clips (t2a). With
u and v exchanged, the same formula of the clips is the captions' gradient.

    B clips of all ranks and their captions   b of this rank   K ids of each   D width

Source: the loss with the mean outside the logarithm of Supervised Contrastive Learning, arXiv
2004.11362, Eq. 2, of all rows but with the row's own pair among its positives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from flap_kernels.checks import differentiable_once
from flap_kernels.infonce.backend import Direction
from flap_kernels.infonce.rank_sizes import RankSizes
from flap_kernels.precision import accumulator_dtype

# Columns of embeddings that are summed at a time: what a sum takes beside them stays small.
_WIDTH = 128


def share_an_id(x_ids: Tensor, y_ids: Tensor) -> Tensor:
    """Whether each row of x (M, K) has an id in common with each of y (N, K), (M, N) bool."""
    same = x_ids[:, None, 0] == y_ids[None, :, 0]
    for k in range(1, x_ids.shape[1]):
        same |= x_ids[:, None, k] == y_ids[None, :, k]
    return same


@dataclass(frozen=True)
class Positives:
    """The rows that share an id with another row, and sums over those that they share it with.

    Sharing one of several ids is not transitive: clip 1 may share its caption with clip 2, and
    clip 2 its sound with clip 3. Sums over P_i are sums over its members by each id, less what
    stands in two of them.
    """

    rows: Tensor
    """(R,) int64, the rows that share an id, ascending; on a GPU all B, for it cannot be asked."""
    groups: tuple[tuple[int, Tensor], ...]
    """A sign, and for each of the rows (R,) the number below R of those equal in some ids."""
    count: Tensor
    """(R,) int64, |P_i|."""

    @classmethod
    def of(cls, ids: Tensor) -> Positives:
        """The positives of pairs with these ids (B, K)."""
        found = cls._of_rows(ids, torch.arange(len(ids), device=ids.device))
        if ids.device.type != "cpu":
            return found
        rows = (found.count > 1).nonzero()[:, 0]
        return cls._of_rows(ids[rows], rows)

    @classmethod
    def _of_rows(cls, ids: Tensor, rows: Tensor) -> Positives:
        groups = tuple(_groups(ids))
        count = torch.zeros_like(rows)
        for sign, number in groups:
            members = torch.zeros_like(rows).index_add_(0, number, torch.ones_like(rows))
            count += sign * members[number]
        return cls(rows, groups, count)

    def within(self, part: slice) -> slice:
        """The rows that lie in a range of the B."""
        if self.rows.device.type != "cpu":
            return part
        ends = torch.searchsorted(self.rows, torch.tensor([part.start, part.stop]))
        return slice(*ends.tolist())

    def differences(
        self, values: Tensor, part: slice, u: float, v: float, *, mean: bool = True
    ) -> Tensor:
        """c_i of `values` (B, D) for those of the rows that lie in `part`, in the values' dtype.

        Without `mean`, |P| is left out of c_i.
        """
        found = torch.empty_like(values[self.rows[part]])
        count = self.count if mean else torch.ones_like(self.count)
        share = 1.0 / count.to(values.dtype)[:, None]
        for start in range(0, values.shape[1], _WIDTH):
            width = slice(start, start + _WIDTH)
            of_rows = values[self.rows, width]
            c = (u + v) * of_rows[part]
            if u:
                c -= u * share[part] * self._sums(of_rows, part)
            if v:
                c -= v * self._sums(of_rows * share, part)
            found[:, width] = c
        return found

    def _sums(self, of_rows: Tensor, part: slice) -> Tensor:
        """Sum over P_i, of what belongs to each of the rows."""
        total = torch.zeros_like(of_rows[part])
        for sign, number in self.groups:
            # Accumulates in the order of the rows, on a GPU too: the same bits on every run.
            by_group = torch.zeros_like(of_rows).index_put_((number,), of_rows, accumulate=True)
            total += sign * by_group[number[part]]
        return total


def positive_term(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    direction: Direction,
    sizes: RankSizes | None = None,
) -> Tensor:
    """What makes InfoNCE's loss that of several positives, () in the accumulator's dtype.

    With `sizes` over the pairs of all ranks; gradients are then W times those of this rank's rows.
    """
    u, v = float(direction != "t2a"), float(direction != "a2t")
    term: Tensor = _PositiveTerm.apply(audio, text, scale, None, ids, (u, v), True, sizes)
    return term


def sigmoid_positive_term(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor,
    sizes: RankSizes | None = None,
) -> Tensor:
    """What makes the sigmoid loss that of several positives, of -l each, as `positive_term`."""
    term: Tensor = _PositiveTerm.apply(audio, text, scale, bias, ids, (1.0, 0.0), False, sizes)
    return term


class _PositiveTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, audio, text, scale, bias, ids, weights, mean, sizes: RankSizes | None):
        dtype = accumulator_dtype(audio.dtype)
        audio_all, text_all, own = audio, text, slice(0, len(audio))
        if sizes is not None:
            audio_all, text_all = sizes.gather(torch.cat([audio, text], dim=1)).chunk(2, dim=1)
            ids, own = sizes.gather(ids), sizes.own
        positives = Positives.of(ids)
        part = positives.within(own)
        rows = positives.rows[part] - own.start
        u, v = weights
        audio_wanted, text_wanted = ctx.needs_input_grad[:2]
        c = positives.differences(text_all.to(dtype), part, u, v, mean=mean)
        value = (audio[rows].to(dtype) * c).sum()
        of_text = None
        if text_wanted:
            of_text = positives.differences(audio_all.to(dtype), part, v, u, mean=mean)
        further = (1 - positives.count).sum().to(dtype)
        ctx.save_for_backward(scale, rows, c if audio_wanted else None, of_text, value, further)
        ctx.factor = 1.0 / (len(ids) * (u + v))
        ctx.world = 1 if sizes is None else sizes.world
        ctx.shape, ctx.dtype = audio.shape, audio.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        total = value.clone() if sizes is None else sizes.reduce(value.clone(), dist.ReduceOp.SUM)
        term = total * scale if bias is None else total * scale + further * bias
        return (term * ctx.factor).to(dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        scale, rows, c, of_text, value, further = ctx.saved_tensors
        factor = grad * (ctx.factor * ctx.world)

        def gradient(of_rows: Tensor | None) -> Tensor | None:
            if of_rows is None:
                return None
            whole = of_rows.new_zeros(ctx.shape, dtype=ctx.dtype)
            whole[rows] = (of_rows * (factor * scale)).to(ctx.dtype)
            return whole

        scale_wanted, bias_wanted = ctx.needs_input_grad[2:4]
        return (
            gradient(c),
            gradient(of_text),
            (factor * value).to(scale.dtype) if scale_wanted else None,
            # All ranks know the number of all pairs: their average is its gradient.
            (grad * ctx.factor * further).to(ctx.bias_dtype) if bias_wanted else None,
            *(None,) * 4,
        )


def _groups(ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each set of the ids: its sign in a sum over P_i, and the rows' numbers by those ids."""
    by_id = [_numbers(column) for column in ids.unbind(1)]
    for size in range(1, len(by_id) + 1):
        for some in combinations(by_id, size):
            number = some[0]
            for other in some[1:]:
                number = _numbers(number * len(ids) + other)
            yield (1 if size % 2 else -1), number


def _numbers(ids: Tensor) -> Tensor:
    """For each row the number of its id among all, from 0; no wait for a GPU."""
    order = ids.argsort(stable=True)
    in_order = ids[order]
    number = torch.zeros_like(order)
    number[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
    return torch.empty_like(order).index_put_((order,), number)
