"""InfoNCE's sums and gradients in plain PyTorch, block by block: the path without a GPU.

    S[i, j] = scale * x[i] . y[j]            positive of row i: column i + offset

    x rows (M, D)   y columns (N, D)   sums and products in float32 (float64 for float64 inputs)

`negatives` gives, per row and per column, the log-sum-exp of the logits *without* the positive.
That is all that loss and gradient need, and it keeps both exact where the positive wins: with
p = 0.9999999 the loss is log1p(e^(negatives - positive)) and the positive's gradient is minus the
negatives' share, neither a difference of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A tile of logits and its exponentials stay in a core's cache.
_TILE_ROWS = 512
_TILE_COLUMNS = 2048
# exp(75) * 1e5 columns is still a finite float32, exp(-75) still a normal one.
_SAFE_LOGIT = 75.0


@dataclass(frozen=True)
class Negatives:
    """What one pass over a block of logits gives, in natural logarithms."""

    rows: Tensor | None
    """Log-sum-exp of each row over the columns that are not its positive, (M,)."""
    columns: Tensor | None
    """The same of each column over the rows, (N,)."""
    positives: Tensor
    """The logit of each row's positive, (M,)."""


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

    Columns are taken to have their positive in this block if they have one at all.
    """
    M, N = len(x), len(y)
    wide = accumulator(x.dtype)
    scale = scale.to(wide)
    y = y.to(wide)
    row_sums = x.new_full((M,), -torch.inf, dtype=wide)
    column_sums = x.new_full((N,), -torch.inf, dtype=wide)
    positives = x.new_empty((M,), dtype=wide)
    buffer = x.new_empty(min(M, _TILE_ROWS) * min(N, _TILE_COLUMNS), dtype=wide)
    for across in _spans(M, _TILE_ROWS):
        x_tile = x[across].to(wide) * scale
        for down in _spans(N, _TILE_COLUMNS):
            logits = _logits(x_tile, y[down], buffer)
            diagonal = _diagonal(logits, across.start + offset - down.start)
            if diagonal is not None:
                first, entries = diagonal
                positives[across.start + first :][: len(entries)] = entries
                entries.fill_(-torch.inf)
            if x_ids is not None and y_ids is not None:
                same = x_ids[across, None] == y_ids[None, down]
                logits.masked_fill_(same, -torch.inf)
            if rows:
                _add_log(row_sums[across], logits.logsumexp(1))
            if columns:
                _add_log(column_sums[down], logits.logsumexp(0))
    return Negatives(row_sums if rows else None, column_sums if columns else None, positives)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    misses: Tensor,
    *,
    offset: int,
    rows: bool = True,
    columns: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of the block's sum of -log(share of the positive), not yet times a weight.

    G[i, j] = e^(S - row_lse[i]) + e^(S - column_lse[j]), and -misses[i] at the positive; a
    log-sum-exp that is None leaves its term out. Gives scale * G y (M, D), scale * G^T x (N, D) and
    sum(G * S) / scale (), in float32; `rows` and `columns` say which of the first two are wanted.
    """
    wide = accumulator(x.dtype)
    scale = scale.to(wide)
    y = y.to(wide)
    x_grad = x.new_zeros(x.shape, dtype=wide) if rows else None
    y_grad = y.new_zeros(y.shape) if columns else None
    scale_grad = scale.new_zeros(())
    M, N = len(x), len(y)
    buffer = x.new_empty(min(M, _TILE_ROWS) * min(N, _TILE_COLUMNS), dtype=wide)
    for across in _spans(M, _TILE_ROWS):
        x_tile = x[across].to(wide) * scale
        for down in _spans(N, _TILE_COLUMNS):
            logits = _logits(x_tile, y[down], buffer)
            terms = []
            if row_lse is not None:
                terms.append(torch.exp(logits - row_lse[across, None]))
            if column_lse is not None:
                terms.append(torch.exp(logits - column_lse[None, down]))
            weights = terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
            if x_ids is not None and y_ids is not None:
                weights.masked_fill_(x_ids[across, None] == y_ids[None, down], 0.0)
            diagonal = _diagonal(weights, across.start + offset - down.start)
            if diagonal is not None:
                first, entries = diagonal
                entries.copy_(-misses[across.start + first :][: len(entries)])
            scale_grad += torch.dot(weights.flatten(), logits.flatten())
            if x_grad is not None:
                x_grad[across].addmm_(weights, y[down])
            if y_grad is not None:
                y_grad[down].addmm_(weights.T, x_tile)
    return (
        None if x_grad is None else x_grad.mul_(scale),
        y_grad,
        scale_grad / scale,
    )


def _spans(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _logits(x_tile: Tensor, y_tile: Tensor, buffer: Tensor) -> Tensor:
    shape = (len(x_tile), len(y_tile))
    return torch.mm(x_tile, y_tile.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _diagonal(tile: Tensor, offset: int) -> tuple[int, Tensor] | None:
    """The first row of the tile that holds its positive, and a view of the positives; or None."""
    if not -tile.shape[0] < offset < tile.shape[1]:
        return None
    return max(0, -offset), tile.diagonal(offset)


def _add_log(total: Tensor, term: Tensor) -> None:
    """Add in place what the logarithms stand for."""
    torch.logaddexp(total, term, out=total)
