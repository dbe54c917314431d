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
class Side:
    """One direction's sums: of some rows over the columns, or of some columns over the rows."""

    negatives: Tensor
    """Log-sum-exp of the logits that are not the positive's, to base 2, (M,)."""
    misses: Tensor
    """The negatives' share: 1 - p, (M,)."""

    def __getitem__(self, rows: slice) -> Side:
        """That of some rows."""
        return Side(self.negatives[rows], self.misses[rows])

    def contiguous(self) -> Side:
        """As the kernels read a vector: without a stride."""
        return Side(self.negatives.contiguous(), self.misses.contiguous())


def losses_and_side(negatives: Tensor, positives: Tensor) -> tuple[Tensor, Side]:
    """-log p in natural units (M,), and the side: precise for every p between 0 and 1."""
    ahead = (negatives - positives) / LOG2E
    # PyTorch's threshold of 20 would leave e^-20 out, which float64 sees.
    return F.softplus(ahead, threshold=40), Side(negatives, torch.sigmoid(ahead))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are kept for inputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    row: Side | None,
    column: Side | None,
    factor: Tensor,
    *,
    offset: int,
    rows: bool = True,
    columns: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of `factor` times the block's sum of -log(share of the positive).

    With G[i, j] = row.misses[i] 2^(S - row.negatives[i]) + column.misses[j] 2^(S -
    column.negatives[j]), and minus both misses at the positive (a side that is None leaves its
    terms out): factor * scale * G y (M, D) in x's type, factor * scale * G^T x (N, D) in the
    accumulator's, factor * sum(G * (x y^T)) (). `rows` and `columns` say which of the first two
    are wanted.
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
                None if row is None else row[across],
                None if column is None else column[down],
                work.spare(logits),
                bounded,
            )
            if x_ids is not None and y_ids is not None:
                weights.masked_fill_(x_ids[across, None] == y_ids[None, down], 0.0)
            ahead = across.start + offset - down.start
            first, diagonal = _diagonal(weights, ahead)
            diagonal.zero_()
            if row is not None:
                diagonal -= row.misses[across][first:][: len(diagonal)]
            if column is not None:
                diagonal -= column.misses[down][first + ahead :][: len(diagonal)]
            gathered.addmm_(weights, work.y[down])
            if y_grad is not None:
                y_grad[down].addmm_(weights.T, x_rows)
        # sum(G * (x y^T)) without another pass over G: each row's x . (G y).
        scale_grad += (gathered * x_rows).sum()
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
    logits: Tensor, row: Side | None, column: Side | None, spare: Tensor, bounded: bool
) -> Tensor:
    """The weights of a tile before the positive's, in the logits' memory or the spare one."""
    if row is None or column is None:
        return _quotients(logits, row, column, out=logits)
    low = torch.minimum(row.negatives.min(), column.negatives.min())
    high = torch.maximum(row.negatives.max(), column.negatives.max())
    if not bounded and bool(high - low < _SPREAD):
        middle = (low + high) / 2
        logits.sub_(middle)
    elif bounded:
        middle = torch.zeros_like(low)
    else:
        by_row = _quotients(logits, row, None, out=spare)
        return by_row.add_(_quotients(logits, None, column, out=logits))
    # m_r 2^(S - R) + m_c 2^(S - C) = 2^(S - M) (m_r 2^(M - R) + m_c 2^(M - C)): one exponential.
    by_row = row.misses * (middle - row.negatives).exp2_()
    by_column = column.misses * (middle - column.negatives).exp2_()
    return logits.exp2_().mul_(torch.add(by_row[:, None], by_column[None, :], out=spare))


def _quotients(logits: Tensor, row: Side | None, column: Side | None, *, out: Tensor) -> Tensor:
    """The negatives' shares by row or by column, whichever is given."""
    if row is not None:
        negatives, misses = row.negatives[:, None], row.misses[:, None]
    else:
        assert column is not None
        negatives, misses = column.negatives[None, :], column.misses[None, :]
    return torch.sub(logits, negatives, out=out).exp2_().mul_(misses)
