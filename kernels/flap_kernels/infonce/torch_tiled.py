"""InfoNCE's backend in plain PyTorch, tile by tile; used without a GPU.

The formulas are those of `backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flap_kernels.infonce.backend import (
    LOG2E,
    BlockGradients,
    BlockSums,
    DirectionSums,
    SigmoidSums,
    Targets,
)
from flap_kernels.infonce.torch_block import Block
from flap_kernels.precision import add_product

# A sum below this may have lost significant terms: it is recomputed from its own maximum.
_FAINT = 2.0**-90
# Sums this far apart are divided by in one go: what is lost then is below 2^-66 of its sum.
_SPREAD = 120.0


class TorchTiled:
    """The `TileBackend` in plain PyTorch, for every device and type."""

    weights = None

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
        block = Block.of(x, y, scale, targets, LOG2E)
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
                add_to_sums(logits, totals, block.scratch(logits), bounded)
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
        values: tuple[Tensor, Tensor] | None = None,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """See `Backend.gradients`."""
        block = Block.of(x, y, scale, targets, LOG2E)
        bounded = block.bounded()
        x_values, y_values = (x, block.y) if values is None else values
        y_values = y_values.to(block.y.dtype)
        x_dtype = x.dtype if values is None else block.y.dtype
        x_grad = None
        if x_wanted:
            x_grad = x.new_empty(len(x), y_values.shape[1], dtype=x_dtype)
        y_grad = block.y.new_zeros(len(y), x_values.shape[1]) if y_wanted else None
        scale_grad = block.y.new_zeros(())
        step = factor * scale if values is None else factor
        for tile_m, x_tile in block.row_tiles():
            x_rows = x_values[tile_m].to(block.y.dtype)
            row = None if row_sums is None else row_sums[tile_m]
            # dlogits y, a tile of columns at a time
            x_product = x_rows.new_zeros(len(x_rows), y_values.shape[1])
            for tile_n in block.column_tiles():
                column = None if column_sums is None else column_sums[tile_n]
                logits = block.logits(x_tile, tile_n)
                dlogits = tile_dlogits(logits, row, column, block.scratch(logits), bounded)
                block.take_positives(dlogits, row, column, tile_m, tile_n)
                add_product(x_product, dlogits, y_values[tile_n])
                if y_grad is not None:
                    # dlogits^T x
                    add_product(y_grad[tile_n], dlogits.T, x_rows)
            if values is None:
                # sum(dlogits * (x y^T)) without another pass: each row's x . (dlogits y)
                scale_grad += (x_product * x_rows).sum()
            if x_grad is not None:
                x_grad[tile_m] = x_product.mul_(step)
        return BlockGradients(
            x_grad, None if y_grad is None else y_grad.mul_(step), scale_grad * factor
        )

    def sigmoid(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        factor: Tensor,
        targets: Targets,
        *,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> SigmoidSums:
        """See `Backend.sigmoid`."""
        block = Block.of(x, y, scale, targets)
        x_grad = block.y.new_empty(x.shape) if x_wanted else None
        y_grad = block.y.new_zeros(y.shape) if y_wanted else None
        # Set down in one piece: small tensors between a tile's large ones would keep their memory.
        losses, biases = block.y.new_zeros(2, block.tile_count)
        tile = iter(range(block.tile_count))
        spare = torch.empty_like(block.memory[0])
        scale_grad = block.y.new_zeros(())
        step = factor * scale
        for tile_m, x_tile in block.row_tiles():
            x_rows = x[tile_m].to(block.y.dtype)
            x_product = torch.zeros_like(x_rows)
            for tile_n in block.column_tiles():
                k = next(tile)
                logits = block.logits(x_tile, tile_n).add_(bias)
                # -l at the positive: its loss is softplus(-l)
                _, diagonal = block.positives(logits, tile_m, tile_n)
                positive = -diagonal
                block.mask_same_ids(logits, tile_m, tile_n, -torch.inf)
                diagonal.copy_(positive)
                losses[k] = _softplus_sum(logits, block.scratch(logits), spare[: logits.numel()])
                if not (x_wanted or y_wanted):
                    continue
                # dlogits = sigmoid(l), at the positive -sigmoid(-l)
                dlogits = logits.sigmoid_()
                diagonal.neg_()
                biases[k] = dlogits.sum()
                add_product(x_product, dlogits, block.y[tile_n])
                if y_grad is not None:
                    add_product(y_grad[tile_n], dlogits.T, x_rows)
            scale_grad += (x_product * x_rows).sum()
            if x_grad is not None:
                x_grad[tile_m] = x_product.mul_(step)
        y_grad = None if y_grad is None else y_grad.mul_(step)
        return SigmoidSums(losses.sum(), x_grad, y_grad, scale_grad * factor, biases.sum() * factor)


def _softplus_sum(logits: Tensor, scratch: Tensor, spare: Tensor) -> Tensor:
    """The sum of log(1 + e^l), (); exact where e^l is lost beside 1.

    PyTorch's softplus and log1p take as long as a tile's product on a CPU, its log a twelfth:
    with e = e^-|l| and w = 1 + e as rounded, log(1 + e) = log w + (e - (w - 1)) / w.
    """
    spare = spare.view_as(logits)
    total = torch.clamp(logits, min=0, out=scratch).sum()
    e = torch.abs(logits, out=scratch).mul_(-LOG2E).exp2_()
    # w - 1, which is exact; then what w has lost, and w again.
    above = torch.add(e, 1, out=spare).sub_(1)
    lost = e.sub_(above).div_(above.add_(1))
    return total + lost.sum() + above.log_().sum()


def add_to_sums(
    logits: Tensor, totals: tuple[Tensor | None, Tensor | None], scratch: Tensor, bounded: bool
) -> None:
    """Add a tile's powers of two to the sums by row and by column, or to their logarithms."""
    if bounded:
        _add_sums(logits, totals)
    else:
        _add_logarithms(logits, totals, scratch)


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


def tile_dlogits(
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
