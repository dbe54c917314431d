"""InfoNCE's backend in plain PyTorch, tile by tile; used without a GPU.

A tile of logits and one tile of scratch memory serve all tiles, so that they stay in cache. The
formulas are those of `backend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flap_kernels.infonce.backend import (
    LOG2E,
    BlockGradients,
    BlockSums,
    DirectionSums,
    Targets,
)
from flap_kernels.infonce.positives import share_an_id
from flap_kernels.precision import accumulator_dtype, add_product

# Two tiles (the logits and their factors) fit in the cache of a few cores.
_TILE_ROWS = 512
_TILE_COLUMNS = 1024
# Between 2^-100 and 2^100 a million terms can be summed in float32 as they are.
_BOUNDED = 100.0
# A sum below this may have lost significant terms: it is recomputed from its own maximum.
_FAINT = 2.0**-90
# Sums this far apart are divided by in one go: what is lost then is below 2^-66 of its sum.
_SPREAD = 120.0


class TorchTiled:
    """The `Backend` in plain PyTorch, for every device and type."""

    def sums(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        targets: Targets,
        *,
        rows: bool = True,
        columns: bool = True,
    ) -> BlockSums:
        """See `Backend.sums`."""
        block = _Block.of(x, y, scale, targets)
        bounded = block.bounded()
        start = 0.0 if bounded else -torch.inf
        row_sums, column_sums = (v.new_full((len(v),), start, dtype=block.y.dtype) for v in (x, y))
        positive_logits = torch.empty_like(row_sums)
        for tile_m, x_tile in block.row_tiles():
            for tile_n in block.column_tiles():
                logits = block.logits(x_tile, tile_n)
                first, diagonal = block.positives(logits, tile_m, tile_n)
                positive_logits[tile_m][first : first + len(diagonal)] = diagonal
                block.mask_same_ids(logits, tile_m, tile_n, -torch.inf)
                diagonal.fill_(-torch.inf)
                totals = (
                    row_sums[tile_m] if rows else None,
                    column_sums[tile_n] if columns else None,
                )
                if bounded:
                    _add_sums(logits, totals)
                else:
                    _add_logarithms(logits, totals, block.scratch(logits))
        if bounded:
            row_sums.log2_()
            column_sums.log2_()
        return BlockSums(
            row_sums if rows else None, column_sums if columns else None, positive_logits
        )

    def gradients(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_sums: DirectionSums | None,
        column_sums: DirectionSums | None,
        factor: Tensor,
        targets: Targets,
        *,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """See `Backend.gradients`."""
        block = _Block.of(x, y, scale, targets)
        bounded = block.bounded()
        x_grad = torch.empty_like(x) if x_wanted else None
        y_grad = torch.zeros_like(block.y) if y_wanted else None
        scale_grad = block.y.new_zeros(())
        step = factor * scale
        for tile_m, x_tile in block.row_tiles():
            x_rows = x[tile_m].to(block.y.dtype)
            row = None if row_sums is None else row_sums[tile_m]
            # dlogits y, a tile of columns at a time
            x_product = torch.zeros_like(x_rows)
            for tile_n in block.column_tiles():
                column = None if column_sums is None else column_sums[tile_n]
                logits = block.logits(x_tile, tile_n)
                dlogits = _dlogits(logits, row, column, block.scratch(logits), bounded)
                block.mask_same_ids(dlogits, tile_m, tile_n, 0.0)
                # dlogits at the positive = -(1 - p), of both directions
                first, diagonal = block.positives(dlogits, tile_m, tile_n)
                diagonal.zero_()
                if row is not None:
                    diagonal -= row.one_minus_p[first:][: len(diagonal)]
                if column is not None:
                    ahead = block.ahead(tile_m, tile_n)
                    diagonal -= column.one_minus_p[first + ahead :][: len(diagonal)]
                add_product(x_product, dlogits, block.y[tile_n])
                if y_grad is not None:
                    # dlogits^T x
                    add_product(y_grad[tile_n], dlogits.T, x_rows)
            # sum(dlogits * (x y^T)) without another pass: each row's x . (dlogits y)
            scale_grad += (x_product * x_rows).sum()
            if x_grad is not None:
                x_grad[tile_m] = x_product.mul_(step)
        return BlockGradients(
            x_grad, None if y_grad is None else y_grad.mul_(step), scale_grad * factor
        )


@dataclass(frozen=True)
class _Block:
    """A block of logits in the dtype of the computation, and the memory that its tiles reuse."""

    x: Tensor
    y: Tensor
    factor: Tensor
    """Factor from a cosine to a logit to base 2, ()."""
    targets: Targets
    memory: Tensor
    sharing: tuple[Tensor, Tensor] | None
    """The rows (M,) and the columns (N,) that share an id with another pair's column or row."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, scale: Tensor, targets: Targets) -> _Block:
        dtype = accumulator_dtype(x.dtype)
        tile = min(len(x), _TILE_ROWS) * min(len(y), _TILE_COLUMNS)
        memory = torch.empty(2, tile, dtype=dtype, device=x.device)
        return cls(x, y.to(dtype), scale.to(dtype) * LOG2E, targets, memory, _sharing(targets))

    def bounded(self) -> bool:
        """Whether all logits are small enough to be exponentiated without a reference point."""
        if not (len(self.x) and len(self.y)):
            return True
        longest = self.y.norm(dim=1).max() * self.x.norm(dim=1, dtype=self.y.dtype).max()
        return bool(self.factor.abs() * longest < _BOUNDED)

    def row_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.x), _TILE_ROWS):
            tile_m = slice(start, min(start + _TILE_ROWS, len(self.x)))
            yield tile_m, self.x[tile_m].to(self.y.dtype) * self.factor

    def column_tiles(self) -> Iterator[slice]:
        for start in range(0, len(self.y), _TILE_COLUMNS):
            yield slice(start, min(start + _TILE_COLUMNS, len(self.y)))

    def logits(self, x_tile: Tensor, tile_n: slice) -> Tensor:
        y_tile = self.y[tile_n]
        shape = (len(x_tile), len(y_tile))
        return torch.mm(x_tile, y_tile.T, out=self.memory[0, : shape[0] * shape[1]].view(shape))

    def scratch(self, like: Tensor) -> Tensor:
        return self.memory[1, : like.numel()].view_as(like)

    def ahead(self, tile_m: slice, tile_n: slice) -> int:
        """Column in this tile of its first row's positive; may be outside the tile."""
        return tile_m.start + self.targets.offset - tile_n.start

    def positives(self, tile: Tensor, tile_m: slice, tile_n: slice) -> tuple[int, Tensor]:
        """The first row of the tile that holds its positive, and a view of the positives."""
        ahead = self.ahead(tile_m, tile_n)
        if not -tile.shape[0] < ahead < tile.shape[1]:
            return 0, tile[:0, 0]
        return max(0, -ahead), tile.diagonal(ahead)

    def mask_same_ids(self, tile: Tensor, tile_m: slice, tile_n: slice, value: float) -> None:
        """Fill in the logits of rows and columns that share an id; few rows do, as a rule."""
        x_ids, y_ids = self.targets.x_ids, self.targets.y_ids
        if self.sharing is None or x_ids is None or y_ids is None:
            return
        rows, columns = (
            of_all[part].nonzero()[:, 0]
            for of_all, part in zip(self.sharing, (tile_m, tile_n), strict=True)
        )
        if len(rows) and len(columns):
            same = share_an_id(x_ids[tile_m][rows], y_ids[tile_n][columns])
            i, j = same.nonzero().unbind(1)
            tile[rows[i], columns[j]] = value


def _sharing(targets: Targets) -> tuple[Tensor, Tensor] | None:
    """The rows (M,) and columns (N,) that share an id with a column or row other than their own."""
    x_ids, y_ids = targets.x_ids, targets.y_ids
    if x_ids is None or y_ids is None:
        return None
    return _shared(x_ids, y_ids, targets.offset), _shared(y_ids, x_ids, -targets.offset)


def _shared(ids: Tensor, others: Tensor, offset: int) -> Tensor:
    own = torch.arange(len(ids), device=ids.device) + offset
    has_own = (own >= 0) & (own < len(others))
    shared = torch.zeros_like(has_own)
    for column, other in zip(ids.unbind(1), others.unbind(1), strict=True):
        found, in_order = column.contiguous(), other.sort().values
        first, last = (torch.searchsorted(in_order, found, right=right) for right in (False, True))
        shared |= last - first > has_own
    return shared


def _add_sums(logits: Tensor, totals: tuple[Tensor | None, Tensor | None]) -> None:
    """Add the powers of two to the sums; none can overflow or underflow."""
    powers = logits.exp2_()
    for dim, total in zip((1, 0), totals, strict=True):
        if total is not None:
            total += powers.sum(dim)


def _add_logarithms(
    logits: Tensor, totals: tuple[Tensor | None, Tensor | None], scratch: Tensor
) -> None:
    """Add to sums stored as logarithms, with one exponential for both unless sums are tiny."""
    top = logits.max().clamp(min=torch.finfo(logits.dtype).min)
    powers = torch.sub(logits, top, out=scratch).exp2_()
    for dim, total in zip((1, 0), totals, strict=True):
        if total is None:
            continue
        tile_sums = powers.sum(dim)
        if bool(tile_sums.min() < _FAINT):
            tile_sums = (logits / LOG2E).logsumexp(dim).mul_(LOG2E)
        else:
            tile_sums = tile_sums.log2_().add_(top)
        torch.logaddexp2(total, tile_sums, out=total)


def _dlogits(
    logits: Tensor,
    row: DirectionSums | None,
    column: DirectionSums | None,
    scratch: Tensor,
    bounded: bool,
) -> Tensor:
    """dlogits of a tile before those of the positives, in the logits' memory or the scratch."""
    if row is None or column is None:
        return _dlogits_of_one(logits, row, column, out=logits)
    low = torch.minimum(row.lse_negatives.min(), column.lse_negatives.min())
    high = torch.maximum(row.lse_negatives.max(), column.lse_negatives.max())
    if not bounded and bool(high - low < _SPREAD):
        middle = (low + high) / 2
        logits.sub_(middle)
    elif bounded:
        middle = torch.zeros_like(low)
    else:
        by_row = _dlogits_of_one(logits, row, None, out=scratch)
        return by_row.add_(_dlogits_of_one(logits, None, column, out=logits))
    # With R, C the lse of row and column, q_r, q_c their 1 - p, and any M, one exponential does:
    # q_r 2^(S - R) + q_c 2^(S - C) = 2^(S - M) (q_r 2^(M - R) + q_c 2^(M - C))
    by_row = row.one_minus_p * (middle - row.lse_negatives).exp2_()
    by_column = column.one_minus_p * (middle - column.lse_negatives).exp2_()
    return logits.exp2_().mul_(torch.add(by_row[:, None], by_column[None, :], out=scratch))


def _dlogits_of_one(
    logits: Tensor, row: DirectionSums | None, column: DirectionSums | None, *, out: Tensor
) -> Tensor:
    """(1 - p) 2^(S - lse_negatives), by row or by column."""
    if row is not None:
        lse, one_minus_p = row.lse_negatives[:, None], row.one_minus_p[:, None]
    else:
        assert column is not None
        lse, one_minus_p = column.lse_negatives[None, :], column.one_minus_p[None, :]
    return torch.sub(logits, lse, out=out).exp2_().mul_(one_minus_p)
