"""A block of logits in plain PyTorch, tile by tile.

A tile of logits and one tile of scratch memory serve all tiles, so that they stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flap_kernels.infonce.backend import DirectionSums, Targets
from flap_kernels.infonce.positives import share_an_id
from flap_kernels.launch import ceil_div
from flap_kernels.precision import accumulator_dtype

# Two tiles (the logits and their factors) fit in the cache of a few cores.
_TILE_ROWS = 512
_TILE_COLUMNS = 1024
# Between 2^-100 and 2^100 a million terms can be summed in float32 as they are.
BOUNDED = 100.0


@dataclass(frozen=True)
class Block:
    """A block of logits in the dtype of the computation, and the memory that its tiles reuse."""

    x: Tensor
    y: Tensor
    factor: Tensor
    """Factor from a cosine to a logit, ()."""
    targets: Targets
    memory: Tensor
    sharing: tuple[Tensor, Tensor] | None
    """The rows (M,) and the columns (N,) that share an id with another pair's column or row."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, scale: Tensor, targets: Targets, unit: float = 1.0) -> Block:
        """The block of logits `scale * unit * x y^T`."""
        dtype = accumulator_dtype(x.dtype)
        tile = min(len(x), _TILE_ROWS) * min(len(y), _TILE_COLUMNS)
        memory = torch.empty(2, tile, dtype=dtype, device=x.device)
        return cls(x, y.to(dtype), scale.to(dtype) * unit, targets, memory, _sharing(targets))

    def bounded(self) -> bool:
        """Whether all logits are small enough to be exponentiated without a reference point."""
        if not (len(self.x) and len(self.y)):
            return True
        longest = self.y.norm(dim=1).max() * self.x.norm(dim=1, dtype=self.y.dtype).max()
        return bool(self.factor.abs() * longest < BOUNDED)

    @property
    def tile_count(self) -> int:
        """Number of tiles."""
        return ceil_div(len(self.x), _TILE_ROWS) * ceil_div(len(self.y), _TILE_COLUMNS)

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
        if len(rows) * len(columns) > tile.numel() // 4:
            tile.masked_fill_(share_an_id(x_ids[tile_m], y_ids[tile_n]), value)
        elif len(rows) and len(columns):
            same = share_an_id(x_ids[tile_m][rows], y_ids[tile_n][columns])
            i, j = same.nonzero().unbind(1)
            tile[rows[i], columns[j]] = value

    def take_positives(
        self,
        dlogits: Tensor,
        row: DirectionSums | None,
        column: DirectionSums | None,
        tile_m: slice,
        tile_n: slice,
    ) -> None:
        """Set a tile's dlogits to -(1 - p) of both directions at the positive, to 0 at same ids."""
        self.mask_same_ids(dlogits, tile_m, tile_n, 0.0)
        first, diagonal = self.positives(dlogits, tile_m, tile_n)
        diagonal.zero_()
        if row is not None:
            diagonal -= row.one_minus_p[first:][: len(diagonal)]
        if column is not None:
            ahead = self.ahead(tile_m, tile_n)
            diagonal -= column.one_minus_p[first + ahead :][: len(diagonal)]


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
