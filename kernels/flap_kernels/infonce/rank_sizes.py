"""How many rows each rank holds, and the collectives between ranks that need to know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Scheme = Literal["auto", "replicated", "sharded"]

# Above this many clips a rank, a third less arithmetic outweighs the exchange in the backward.
_REPLICATED_ROWS = 1500


def scheme_in_force(scheme: Scheme, clips: int) -> Scheme:
    """The scheme that `auto` selects where no rank has more than this many clips."""
    if scheme != "auto":
        return scheme
    return "replicated" if clips <= _REPLICATED_ROWS else "sharded"


@dataclass(frozen=True)
class RankSizes:
    """Number of rows on each rank, and the collectives between ranks."""

    pairs: tuple[int, ...]
    extra: tuple[int, ...]
    """Of captions without a clip."""
    rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, audio: Tensor, text: Tensor, group: dist.ProcessGroup | None, equal: bool
    ) -> RankSizes | None:
        """Gather the sizes of all ranks, or assume that they equal this rank's.

        None on one rank, on a rank outside of the group and without torch.distributed.
        """
        # PyTorch gives a rank outside of the group a world size of -1.
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) <= 1:
            return None
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        pairs, extra = len(audio), len(text) - len(audio)
        if equal:
            return cls((pairs,) * world, (extra,) * world, rank, group)
        own = torch.tensor([pairs, extra], device=audio.device)
        counts = torch.empty(2 * world, dtype=own.dtype, device=own.device)
        _all_gather(counts, own, group)
        by_rank = counts.view(world, 2).tolist()
        return cls(tuple(p for p, _ in by_rank), tuple(e for _, e in by_rank), rank, group)

    @property
    def equal(self) -> bool:
        """Whether all ranks hold as many rows."""
        return len({*self.pairs}) == 1 == len({*self.extra})

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.pairs)

    @property
    def total(self) -> int:
        """Number of clips of all ranks."""
        return sum(self.pairs)

    @property
    def own(self) -> slice:
        """Range of this rank's pairs among those of all ranks."""
        first = sum(self.pairs[: self.rank])
        return slice(first, first + self.pairs[self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks' pairs, rank by rank."""
        return self._gather(x, self.pairs)

    def gather_extra(self, x: Tensor) -> Tensor:
        """The rows of all ranks' extra captions, rank by rank."""
        return self._gather(x, self.extra)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's rows (n, D) of the sum over ranks of x, rows of all pairs and then extra."""
        pairs, extra = x.split([self.total, sum(self.extra)])
        return torch.cat([self._scatter(pairs, self.pairs), self._scatter(extra, self.extra)])

    def logsumexp2(self, lse: Tensor) -> Tensor:
        """log2 of the sum over ranks of 2^lse, where every rank holds one for each element."""
        top = self.reduce(lse.clone(), dist.ReduceOp.MAX)
        base = top.clamp(min=torch.finfo(top.dtype).min)
        return self.reduce(torch.exp2(lse - base), dist.ReduceOp.SUM).log2() + base

    def _gather(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        most = max(sizes)
        if most == 0:
            return x
        padded = x.contiguous()
        if len(x) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x
        rows = x.new_empty(self.world * most, *x.shape[1:])
        _all_gather(rows, padded, self.group)
        if len(set(sizes)) == 1:
            return rows
        by_rank = rows.view(self.world, most, *x.shape[1:]).unbind()
        return torch.cat([rows[:n] for rows, n in zip(by_rank, sizes, strict=True)])

    def _scatter(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        most = max(sizes)
        if most == 0:
            return x
        if len(set(sizes)) > 1:
            padded = x.new_zeros(self.world, most, *x.shape[1:])
            for of_rank, rows in zip(padded, x.split(sizes), strict=True):
                of_rank[: len(rows)] = rows
            x = padded.flatten(0, 1)
        out = x.new_empty(most, *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), self.group)
        return out[: sizes[self.rank]]

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Sum or maximum over all ranks, in place."""
        dist.all_reduce(x, op=op, group=self.group)
        return x


def _collective(new: str, old: str) -> Callable[..., Any]:
    """A collective by its name in PyTorch 2.14 or 2.11; 2.14 warns of the older name."""
    return getattr(dist, new if hasattr(dist, new) else old)


def _all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("all_gather_single", "all_gather_into_tensor")(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(out, x, group=group)
