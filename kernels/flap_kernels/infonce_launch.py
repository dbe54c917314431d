"""InfoNCE's sums and gradients on a GPU: blocks, workspaces and launches.

The two functions are those of `infonce_chunks`, which says what they give, with the same names and
arguments; `precision` and `workspace_mib` come on top. Neither stores the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from flap_kernels.infonce_chunks import Negatives, Side
from flap_kernels.infonce_tiles import add_parts_kernel, negatives_kernel, weights_kernel
from flap_kernels.launch import capability, ceil_div, interpreted

Precision = Literal["ieee", "tf32"]

# Forward: partial sums. Backward: the weights of at least this many rows.
_WORKSPACE_MIB = 256
_WEIGHT_MIB, _WEIGHT_ROWS = 64, 2048

PART_BLOCKS = {"BLOCK_P": 16, "BLOCK": 128}
"""Parts at a time, and sums of a program, where partial sums are added up."""


@dataclass(frozen=True)
class Blocks:
    """A tile of logits, and the threads that compute it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    PARTS: int
    """Into how many parts its columns are cut after the product, 1 or 4: what fits in registers."""
    GROUP_M: int
    num_warps: int
    num_stages: int


def blocks(arch: int, dtype: torch.dtype, precision: Precision) -> Blocks:
    """The tile for a compute capability (90 for 9.0) and a type.

    Operands reach shared memory from the L2 cache: the larger the tile, the fewer bytes of them.
    """
    if arch == 0:  # the interpreter: many small tiles, so that small tests have several
        return Blocks(32, 64, 32, 1, 2, 4, 1)
    if dtype == torch.float32 and precision == "ieee":
        return Blocks(64, 64, 32, 1, 8, 4, 3)
    if dtype == torch.float32:
        return Blocks(128, 128, 32, 4, 8, 8, 3)
    if arch in (90, 100, 103):
        return Blocks(128, 256, 64, 4, 8, 8, 3)
    if arch == 80:
        return Blocks(128, 128, 64, 1, 8, 8, 3)
    return Blocks(128, 128, 32, 1, 8, 8, 3)  # 48 KiB of shared memory


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
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> Negatives:
    """Log-sum-exp of the negatives per row and per column, and the positives."""
    x, y = (_operand(v, precision) for v in (x, y))
    x_ids, y_ids = _dense(x_ids), _dense(y_ids)
    (M, D), N = x.shape, len(y)
    tile = blocks(capability(x), x.dtype, precision)
    tiles_n = ceil_div(N, tile.BLOCK_N)
    row_bytes = 4 * (tiles_n * rows + ceil_div(N, tile.BLOCK_M) * columns)
    most = int((workspace_mib or _WORKSPACE_MIB) * 2**20 / row_bytes)
    float32 = {"dtype": torch.float32, "device": x.device}
    row_sums = torch.empty(M if rows else 0, **float32)
    column_sums = torch.empty(N if columns else 0, **float32)
    positives = torch.empty(M, **float32)
    chunks = list(_chunks(M, most, tile.BLOCK_M))
    largest = len(range(M)[chunks[0]])
    row_parts = torch.empty(tiles_n * largest if rows else 0, **float32)
    tiles_m = ceil_div(largest, tile.BLOCK_M)
    column_parts = torch.empty(tiles_m * N if columns else 0, **float32)
    for chunk in chunks:
        x_rows = x[chunk]
        size = len(x_rows)
        tiles_m = ceil_div(size, tile.BLOCK_M)
        negatives_kernel[(tiles_m * tiles_n,)](
            x_rows,
            y,
            scale,
            x_ids[chunk] if x_ids is not None else x,
            y_ids if y_ids is not None else y,
            row_parts,
            column_parts,
            positives[chunk],
            size,
            N,
            D,
            offset + chunk.start,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            ROWS=rows,
            COLUMNS=columns,
            IDS=x_ids is not None,
            PRECISION=precision,
            WIDEN=interpreted(),
            **asdict(tile),
        )
        if rows:
            _add_parts(row_parts, row_sums[chunk], tiles_n, onto=False)
        if columns:
            _add_parts(column_parts, column_sums, tiles_m, onto=chunk.start > 0)
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
    precision: Precision = "ieee",
    workspace_mib: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients by x, by y and by the scale, times `factor`; x's in its type, the rest float32."""
    x, y = (_operand(v, precision) for v in (x, y))
    x_ids, y_ids = _dense(x_ids), _dense(y_ids)
    row, column = (side and side.contiguous() for side in (row, column))
    (M, D), N = x.shape, len(y)
    tile = blocks(capability(x), x.dtype, precision)
    tiles_n = ceil_div(N, tile.BLOCK_N)
    stride_wm = _weight_stride(N)
    chunks = weight_chunks(M, N, x.dtype, tile.BLOCK_M, workspace_mib)
    largest = len(range(M)[chunks[0]])
    float32 = {"dtype": torch.float32, "device": x.device}
    workspace = torch.empty(largest, stride_wm, dtype=x.dtype, device=x.device)
    scale_parts = torch.empty(len(chunks), ceil_div(largest, tile.BLOCK_M) * tiles_n, **float32)
    x_grad = torch.empty(M, D, dtype=x.dtype, device=x.device) if rows else None
    y_grad = torch.empty(N, D, **float32) if columns else None
    product = torch.empty(largest if rows else 0, D, **float32)
    step = factor * scale
    scale_grad = torch.zeros((), **float32)
    for chunk, parts in zip(chunks, scale_parts, strict=True):
        x_rows = x[chunk]
        size = len(x_rows)
        tiles = ceil_div(size, tile.BLOCK_M) * tiles_n
        weights_kernel[(tiles,)](
            x_rows,
            y,
            scale,
            x_ids[chunk] if x_ids is not None else x,
            y_ids if y_ids is not None else y,
            row.negatives[chunk] if row is not None else x,
            row.misses[chunk] if row is not None else x,
            column.negatives if column is not None else x,
            column.misses if column is not None else x,
            workspace,
            parts,
            size,
            N,
            D,
            offset + chunk.start,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            stride_wm,
            ROWS=row is not None,
            COLUMNS=column is not None,
            IDS=x_ids is not None,
            PRECISION=precision,
            WIDEN=interpreted(),
            **asdict(tile),
        )
        scale_grad += parts[:tiles].sum()
        weights = workspace[:size, :N]
        with products_in(precision):
            if x_grad is not None:
                _add_product(product[:size], weights, y, onto=False)
                torch.mul(product[:size], step, out=x_grad[chunk])
            if y_grad is not None:
                _add_product(y_grad, weights.T, x_rows, onto=chunk.start > 0)
    if y_grad is not None:
        y_grad *= step
    return x_grad, y_grad, scale_grad * factor


def _operand(x: Tensor, precision: Precision) -> Tensor:
    """Rounded to the nearest tf32: tensor cores cut bits off, which would make cosines smaller."""
    if precision == "ieee" or x.dtype != torch.float32:
        return x
    nearest = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)  # a NaN's bits would carry into the sign


def _dense(ids: Tensor | None) -> Tensor | None:
    """As the kernels read a vector: without a stride."""
    return None if ids is None else ids.contiguous()


def weight_chunks(
    M: int, N: int, dtype: torch.dtype, BLOCK_M: int, workspace_mib: float | None
) -> list[slice]:
    """The rows whose weights are in the workspace at a time, the longest chunk first."""
    row_bytes = dtype.itemsize * _weight_stride(N)
    if workspace_mib is None:
        most = max(_WEIGHT_ROWS, _WEIGHT_MIB * 2**20 // row_bytes)
    else:
        most = int(workspace_mib * 2**20 / row_bytes)
    return list(_chunks(M, most, BLOCK_M))


def _weight_stride(N: int) -> int:
    """A row of the workspace starts at a multiple of 128 bytes, as library products like it."""
    return ceil_div(N, 64) * 64


def _chunks(size: int, most: int, multiple: int) -> Iterator[slice]:
    """Slices of about equal length, the longest first, of at most `most` rows (or one tile)."""
    count = ceil_div(size, max(most // multiple, 1) * multiple)
    length = ceil_div(ceil_div(size, count), multiple) * multiple
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def _add_parts(parts: Tensor, total: Tensor, count: int, *, onto: bool) -> None:
    grid = (ceil_div(len(total), PART_BLOCKS["BLOCK"]),)
    add_parts_kernel[grid](parts, total, count, len(total), ONTO=onto, **PART_BLOCKS)


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, onto: bool) -> None:
    """out = left @ right, added ONTO what is there or afresh, summed in out's type (float32)."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(onto), out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=int(onto), out=out)
    else:  # PyTorch has no such product on a CPU: the interpreter's path widens
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=int(onto), out=out)


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Library products of float32 in this precision, whatever the program has set."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
