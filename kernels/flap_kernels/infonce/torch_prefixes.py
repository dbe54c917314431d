"""InfoNCE of prefixes in plain PyTorch: all of them in one pass over the width.

The product of a prefix is that of the one before it and of the columns that it adds. With r, c the
reciprocals of the norms and w_k = r c dlogits_k, the gradients of those columns are products with
the sum of w over all prefixes that hold them:

    x[:, seg]: scale * (sum_{k >= seg} w_k) y[:, seg]
               - sum_{k >= seg} r_k^2 (sum_j dlogits_k S_k) x[:, seg]

`prefixes` has the formula of S_k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flap_kernels.infonce.backend import (
    LOG2E,
    BlockGradients,
    BlockSums,
    DirectionSums,
    Targets,
)
from flap_kernels.infonce.prefixes import Unit, of_prefix
from flap_kernels.infonce.torch_block import BOUNDED, Block
from flap_kernels.infonce.torch_tiled import add_to_sums, tile_dlogits
from flap_kernels.precision import add_product


@dataclass(frozen=True)
class TorchPrefixes:
    """A backend of prefixes in plain PyTorch, all of them in one pass over the width."""

    prefixes: tuple[int, ...]
    weights: Tensor | None

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
        block = _PrefixBlock.of_prefixes(x, y, scale, targets, self.prefixes)
        bounded, K = block.bounded(), len(self.prefixes)
        start = 0.0 if bounded else -torch.inf
        row_sums, column_sums = (
            v.new_full((K, len(v)), start, dtype=block.y.dtype) for v in (x, y)
        )
        positive_logits = torch.empty_like(row_sums)
        for tile_m, x_tile in block.row_tiles():
            for tile_n in block.column_tiles():
                for k, _, logits in block.tile_of_each(x_tile, tile_m, tile_n):
                    first, diagonal = block.positives(logits, tile_m, tile_n)
                    positive_logits[k, tile_m][first : first + len(diagonal)] = diagonal
                    block.mask_same_ids(logits, tile_m, tile_n, -torch.inf)
                    diagonal.fill_(-torch.inf)
                    totals = (
                        row_sums[k, tile_m] if rows else None,
                        column_sums[k, tile_n] if columns else None,
                    )
                    add_to_sums(logits, totals, block.scratch(logits), bounded)
        if bounded:
            row_sums.log2_()
            column_sums.log2_()
        return BlockSums(
            row_sums.T.contiguous() if rows else None,
            column_sums.T.contiguous() if columns else None,
            positive_logits.T.contiguous(),
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
        block = _PrefixBlock.of_prefixes(x, y, scale, targets, self.prefixes)
        bounded, K, dtype = block.bounded(), len(self.prefixes), block.y.dtype
        by_row, by_column = (
            [of_prefix(sums, k) for k in range(K)] for sums in (row_sums, column_sums)
        )
        x_grad = x.new_empty(x.shape) if x_wanted else None
        y_grad = block.y.new_zeros(y.shape) if y_wanted else None
        x_dots, y_dots = (v.new_zeros(K, len(v), dtype=dtype) for v in (x, y))
        scale_grad = block.y.new_zeros(())
        step = factor * scale
        for tile_m, x_tile in block.row_tiles():
            x_rows = x[tile_m].to(dtype)
            x_product = torch.zeros_like(x_rows)
            for tile_n in block.column_tiles():
                weights: list[Tensor] = []
                for k, product, logits in block.tile_of_each(x_tile, tile_m, tile_n):
                    row, column = by_row[k], by_column[k]
                    row = None if row is None else row[tile_m]
                    column = None if column is None else column[tile_n]
                    scratch = block.scratch(logits)
                    dlogits = tile_dlogits(logits, row, column, scratch, bounded)
                    block.take_positives(dlogits, row, column, tile_m, tile_n)
                    if dlogits is scratch:
                        dlogits = logits.copy_(scratch)
                    if block.is_whole(k):
                        weights.append(dlogits)
                        continue
                    # w = r c dlogits, and by row and by column the sums of dlogits * S
                    dlogits *= block.x_norms[k, tile_m, None]
                    dlogits *= block.y_norms[k, None, tile_n]
                    weights.append(dlogits)
                    dots = torch.mul(dlogits, product, out=scratch)
                    x_dots[k, tile_m] += dots.sum(1)
                    y_dots[k, tile_n] += dots.sum(0)
                for k in reversed(range(K - 1)):
                    weights[k] += weights[k + 1]
                for seg, weight in zip(block.segments, weights, strict=True):
                    add_product(x_product[:, seg], weight, block.y[tile_n, seg])
                    if y_grad is not None:
                        add_product(y_grad[tile_n, seg], weight.T, x_rows[:, seg])
            scale_grad += (x_product * x_rows).sum()
            if x_grad is not None:
                of_norms = block.of_norms(x_rows, x_dots[:, tile_m], block.x_norms[:, tile_m])
                x_grad[tile_m] = x_product.mul_(step).sub_(of_norms.mul_(factor))
        for tile_n in block.column_tiles():
            if y_grad is None:
                break
            of_norms = block.of_norms(block.y[tile_n], y_dots[:, tile_n], block.y_norms[:, tile_n])
            y_grad[tile_n] *= step
            y_grad[tile_n] -= of_norms.mul_(factor)
        return BlockGradients(x_grad, y_grad, scale_grad * factor)


@dataclass(frozen=True)
class _PrefixBlock(Block):
    segments: tuple[slice, ...] = ()
    """The columns that each prefix adds."""
    x_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    """(K, M) reciprocals of the prefixes' norms, 1 of the whole width."""
    y_norms: Tensor = field(default_factory=lambda: torch.empty(0))
    """(K, N)."""
    tiles: Tensor = field(default_factory=lambda: torch.empty(0))
    """(K, elements of a tile), memory for the logits of each prefix."""

    @classmethod
    def of_prefixes(
        cls, x: Tensor, y: Tensor, scale: Tensor, targets: Targets, prefixes: tuple[int, ...]
    ) -> _PrefixBlock:
        block = Block.of(x, y, scale, targets, LOG2E)
        starts = (0, *prefixes[:-1])
        segments = tuple(slice(*ends) for ends in zip(starts, prefixes, strict=True))
        norms = (torch.stack([Unit.of(v, d).norms[:, 0] for d in prefixes]) for v in (x, block.y))
        tiles = block.memory.new_empty(len(prefixes), block.memory.shape[1])
        return cls(
            **vars(block), segments=segments, x_norms=next(norms), y_norms=next(norms), tiles=tiles
        )

    def bounded(self) -> bool:
        """Whether all logits are small enough to be exponentiated without a reference point."""
        return super().bounded() and bool(self.factor.abs() * 1.001 < BOUNDED)

    def is_whole(self, k: int) -> bool:
        """Whether this prefix is the whole width."""
        return self.segments[k].stop == self.x.shape[1]

    def tile_of_each(
        self, x_tile: Tensor, tile_m: slice, tile_n: slice
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each prefix its number, its product before the norms and its logits, (m, n) each.

        The product's memory is overwritten by the next; the whole width's logits are its product.
        """
        y_tile = self.y[tile_n]
        shape = (len(x_tile), len(y_tile))
        size = shape[0] * shape[1]
        product = self.memory[0, :size].view(shape)
        for k, seg in enumerate(self.segments):
            torch.addmm(product, x_tile[:, seg], y_tile[:, seg].T, beta=int(k > 0), out=product)
            if self.is_whole(k):
                yield k, product, product
                continue
            logits = self.tiles[k, :size].view(shape)
            torch.mul(product, self.x_norms[k, tile_m, None], out=logits)
            yield k, product, logits.mul_(self.y_norms[k, None, tile_n])

    def of_norms(self, rows: Tensor, dots: Tensor, norms: Tensor) -> Tensor:
        """sum_{k >= seg} r_k^2 (dlogits_k . S_k) x[:, seg], S in natural units."""
        found = torch.zeros_like(rows)
        total = rows.new_zeros(len(rows))
        for k in reversed(range(len(self.segments))):
            seg = self.segments[k]
            if not self.is_whole(k):
                total = total + norms[k].square() * dots[k] / LOG2E
            found[:, seg] = total[:, None] * rows[:, seg]
        return found
