"""InfoNCE's sums and gradients in plain PyTorch, tile by tile: the path without a GPU.

    S[i, j] = scale * log2(e) * x[i] . y[j]            positive of row i: column i + offset

    M rows x   N columns y   D width   logits and logarithms to base 2, in float32 (or float64)

`negatives` gives, per row and per column, the log-sum-exp of the logits *without* the positive.
That is all that loss and gradient need, and it keeps both exact where the positive wins: with
p = 0.9999999 the loss is log(1 + 2^(negatives - positive)) and the positive's gradient is minus the
negatives' share, neither a difference of nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)

# Two tiles (the logits and what they are multiplied by) stay in the cache of a few cores.
_TILE_ROWS = 512
_TILE_COLUMNS = 1024
# Between 2^-100 and 2^100 a million terms can be summed in float32 as they are.
_BOUNDED = 100.0
# A sum below this may have lost terms that matter to it: it is made again from its own maximum.
_FAINT = 2.0**-90
# Sums this far apart are divided by in one go: what is lost then is below 2^-66 of its sum.
_SPREAD = 120.0


@dataclass(frozen=True)
class Negatives:
    """What one pass over a block of logits gives."""

    rows: Tensor | None
    """Log-sum-exp of each row over the columns that are not its positive, (M,)."""
    columns: Tensor | None
    """The same of each column over the rows, (N,)."""
    positives: Tensor
    """The logit of each row's positive, (M,)."""


@dataclass(frozen=True)
class Terms:
    """Loss and shares of some rows (or columns), from their negatives and positives."""

    losses: Tensor
    """-log(share of the positive), in natural units, (M,)."""
    lse: Tensor
    """Log-sum-exp of negatives and positive, to base 2, (M,)."""
    misses: Tensor
    """The negatives' share, (M,)."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are kept for inputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def terms(side: Tensor, positives: Tensor) -> Terms:
    """Loss and shares, precise for every share of the positive between 0 and 1."""
    ahead = (side - positives) / LOG2E
    return Terms(F.softplus(ahead), torch.logaddexp2(side, positives), torch.sigmoid(ahead))


def negatives(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    offset: int,
    rows: bool = True,
    columns: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> Negatives:
    """The sums of the forward pass; `rows` and `columns` say which of them are wanted.

    A row and a column of one id are no negatives of each other.
    """
    work = _Work.of(x, y, scale)
    bounded = work.bounded()
    start = 0.0 if bounded else -torch.inf
    row_sums, column_sums = (v.new_full((len(v),), start, dtype=work.y.dtype) for v in (x, y))
    positives = torch.empty_like(row_sums)
    for across, x_tile in work.row_tiles():
        for down in work.column_tiles():
            logits = work.logits(x_tile, down)
            first, diagonal = _diagonal(logits, across.start + offset - down.start)
            positives[across][first : first + len(diagonal)] = diagonal
            if x_ids is not None and y_ids is not None:
                logits.masked_fill_(x_ids[across, None] == y_ids[None, down], -torch.inf)
            diagonal.fill_(-torch.inf)
            totals = row_sums[across] if rows else None, column_sums[down] if columns else None
            if bounded:
                _add_sums(logits, totals)
            else:
                _add_logarithms(logits, totals, work.spare(logits))
    if bounded:
        row_sums.log2_()
        column_sums.log2_()
    return Negatives(row_sums if rows else None, column_sums if columns else None, positives)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    misses: Tensor,
    factor: Tensor,
    *,
    offset: int,
    rows: bool = True,
    columns: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of `factor` times the block's sum of -log(share of the positive).

    With G[i, j] = 2^(S - row_lse[i]) + 2^(S - column_lse[j]), and -misses[i] at the positive (a
    log-sum-exp that is None leaves its term out): factor * scale * G y (M, D) in x's type,
    factor * scale * G^T x (N, D) in the accumulator's, factor * sum(G * (x y^T)) (). `rows` and
    `columns` say which of the first two are wanted.
    """
    work = _Work.of(x, y, scale)
    bounded = work.bounded()
    wide = work.y.dtype
    x_grad = torch.empty_like(x) if rows else None
    y_grad = torch.zeros_like(work.y) if columns else None
    scale_grad = work.y.new_zeros(())
    step = factor * scale
    for across, x_tile in work.row_tiles():
        x_rows = x[across].to(wide)
        gathered = torch.zeros_like(x_rows)
        for down in work.column_tiles():
            logits = work.logits(x_tile, down)
            weights = _weigh(
                logits,
                None if row_lse is None else row_lse[across, None],
                None if column_lse is None else column_lse[None, down],
                work.spare(logits),
                bounded,
            )
            if x_ids is not None and y_ids is not None:
                weights.masked_fill_(x_ids[across, None] == y_ids[None, down], 0.0)
            first, diagonal = _diagonal(weights, across.start + offset - down.start)
            torch.neg(misses[across][first : first + len(diagonal)], out=diagonal)
            gathered.addmm_(weights, work.y[down])
            if y_grad is not None:
                y_grad[down].addmm_(weights.T, x_rows)
        # sum(G * (x y^T)) without another pass over G: each row's x . (G y).
        scale_grad += torch.dot(gathered.flatten(), x_rows.flatten())
        if x_grad is not None:
            x_grad[across] = gathered.mul_(step)
    return x_grad, None if y_grad is None else y_grad.mul_(step), scale_grad * factor


@dataclass(frozen=True)
class _Work:
    """The block, in the type it is computed in, and two tiles of memory that serve all tiles."""

    x: Tensor
    y: Tensor
    factor: Tensor
    """What makes a cosine a logit to base 2, ()."""
    memory: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, scale: Tensor) -> _Work:
        wide = accumulator(x.dtype)
        tile = min(len(x), _TILE_ROWS) * min(len(y), _TILE_COLUMNS)
        memory = torch.empty(2, tile, dtype=wide, device=x.device)
        return cls(x, y.to(wide), scale.to(wide) * LOG2E, memory)

    def bounded(self) -> bool:
        """Whether no logit can be so large or small that it needs a reference point."""
        if not (len(self.x) and len(self.y)):
            return True
        longest = self.y.norm(dim=1).max() * self.x.norm(dim=1, dtype=self.y.dtype).max()
        return bool(self.factor.abs() * longest < _BOUNDED)

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.x), _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, len(self.x)))
            yield rows, self.x[rows].to(self.y.dtype) * self.factor

    def column_tiles(self) -> Iterator[slice]:
        for start in range(0, len(self.y), _TILE_COLUMNS):
            yield slice(start, min(start + _TILE_COLUMNS, len(self.y)))

    def logits(self, x_tile: Tensor, down: slice) -> Tensor:
        y_tile = self.y[down]
        shape = (len(x_tile), len(y_tile))
        return torch.mm(x_tile, y_tile.T, out=self.memory[0, : shape[0] * shape[1]].view(shape))

    def spare(self, like: Tensor) -> Tensor:
        return self.memory[1, : like.numel()].view_as(like)


def _diagonal(tile: Tensor, offset: int) -> tuple[int, Tensor]:
    """The first row of the tile that holds its positive, and a view of the positives."""
    if not -tile.shape[0] < offset < tile.shape[1]:
        return 0, tile[:0, 0]
    return max(0, -offset), tile.diagonal(offset)


def _add_sums(logits: Tensor, totals: tuple[Tensor | None, Tensor | None]) -> None:
    """Add the powers of two to the sums, where none can be too large or too small."""
    powers = logits.exp2_()
    for dim, total in zip((1, 0), totals, strict=True):
        if total is not None:
            total += powers.sum(dim)


def _add_logarithms(
    logits: Tensor, totals: tuple[Tensor | None, Tensor | None], spare: Tensor
) -> None:
    """Add to sums that are kept as logarithms; one exponential for both, unless sums are faint."""
    top = logits.max().clamp(min=torch.finfo(logits.dtype).min)
    powers = torch.sub(logits, top, out=spare).exp2_()
    for dim, total in zip((1, 0), totals, strict=True):
        if total is None:
            continue
        part = powers.sum(dim)
        if bool(part.min() < _FAINT):
            part = (logits / LOG2E).logsumexp(dim).mul_(LOG2E)
        else:
            part = part.log2_().add_(top)
        torch.logaddexp2(total, part, out=total)


def _weigh(
    logits: Tensor,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    spare: Tensor,
    bounded: bool,
) -> Tensor:
    """The weights of a tile before the positive's, in the logits' memory or the spare one."""
    if row_lse is None or column_lse is None:
        lse = column_lse if row_lse is None else row_lse
        assert lse is not None
        return logits.sub_(lse).exp2_()
    low = torch.minimum(row_lse.min(), column_lse.min())
    high = torch.maximum(row_lse.max(), column_lse.max())
    if bounded:
        middle = torch.zeros_like(low)
    elif bool(high - low < _SPREAD):
        middle = (low + high) / 2
        logits.sub_(middle)
    else:
        by_row = torch.sub(logits, row_lse, out=spare).exp2_()
        return by_row.add_(logits.sub_(column_lse).exp2_())
    # 2^(S - R) + 2^(S - C) = 2^(S - m) (2^(m - R) + 2^(m - C)): one exponential for both.
    shares = torch.add((middle - row_lse).exp2_(), (middle - column_lse).exp2_(), out=spare)
    return logits.exp2_().mul_(shares)
