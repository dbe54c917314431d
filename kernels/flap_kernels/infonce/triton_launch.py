"""InfoNCE's backend on a GPU: tiles, workspaces and launches of `triton_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels.infonce.backend import BlockGradients, BlockSums, DirectionSums, Targets
from flap_kernels.infonce.triton_kernels import (
    add_partial_lse_kernel,
    dlogits_kernel,
    lse_negatives_kernel,
)
from flap_kernels.launch import capability, ceil_div, interpreted, run_kernel
from flap_kernels.precision import Float32Precision, add_product, float32_products

# Forward: partial sums. Backward: the dlogits of at least this many rows.
_SUMS_MIB = 256
_DLOGITS_MIB, _DLOGITS_ROWS = 64, 2048

PARTIAL_BLOCKS = {"BLOCK_P": 16, "BLOCK": 128}
"""Tile of the kernel that adds up partial sums: partial sums at a time, sums per program."""


@dataclass(frozen=True)
class TileShape:
    """The size of a tile of logits, and the launch parameters."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    SLABS: int
    """Number of slabs of a tile's columns after the product, 1 or 4, to fit in registers."""
    GROUP_M: int
    num_warps: int
    num_stages: int


def tile_shape(arch: int, dtype: torch.dtype, precision: Float32Precision) -> TileShape:
    """The tile for a compute capability (90 for 9.0) and a dtype.

    Operands reach shared memory from the L2 cache: the larger the tile, the fewer bytes of them.
    """
    if arch == 0:  # the interpreter: many small tiles, so that small tests have several
        return TileShape(32, 64, 32, 1, 2, 4, 1)
    if dtype == torch.float32 and precision == "ieee":
        return TileShape(64, 64, 32, 1, 8, 4, 3)
    if dtype == torch.float32:
        return TileShape(128, 128, 32, 4, 8, 8, 3)
    if arch in (90, 100, 103):
        return TileShape(128, 256, 64, 4, 8, 8, 3)
    if arch == 80:
        return TileShape(128, 128, 64, 1, 8, 8, 3)
    return TileShape(128, 128, 32, 1, 8, 8, 3)  # 48 KiB of shared memory


@dataclass(frozen=True)
class TritonTiled:
    """The `Backend` of Triton kernels, for float32 and narrower dtypes, on a GPU or interpreted."""

    precision: Float32Precision = "ieee"
    """Precision of float32 operands in products."""
    workspace_mib: float | None = None
    """Bounds the memory for partial results; None takes 256 forward, and backward 64 or the
    dlogits of 2048 rows, whichever is more. A row of tiles is always allowed."""

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
        x, y = (_operand(v, self.precision) for v in (x, y))
        targets = _contiguous(targets)
        (M, D), N = x.shape, len(y)
        tile = tile_shape(capability(x), x.dtype, self.precision)
        tiles_n = ceil_div(N, tile.BLOCK_N)
        row_bytes = 4 * (tiles_n * rows + ceil_div(N, tile.BLOCK_M) * columns)
        most = int((self.workspace_mib or _SUMS_MIB) * 2**20 / row_bytes)
        float32 = {"dtype": torch.float32, "device": x.device}
        row_sums = torch.empty(M if rows else 0, **float32)
        column_sums = torch.empty(N if columns else 0, **float32)
        positive_logits = torch.empty(M, **float32)
        chunks = list(_chunks(M, most, tile.BLOCK_M))
        largest = len(range(M)[chunks[0]])
        row_partials = torch.empty(tiles_n * largest if rows else 0, **float32)
        tiles_m = ceil_div(largest, tile.BLOCK_M)
        column_partials = torch.empty(tiles_m * N if columns else 0, **float32)
        for chunk in chunks:
            x_rows = x[chunk]
            size = len(x_rows)
            tiles_m = ceil_div(size, tile.BLOCK_M)
            run_kernel(
                lse_negatives_kernel,
                (tiles_m * tiles_n,),
                x_rows,
                y,
                scale,
                # Absent ids get the embeddings as a dummy; the kernel never reads it.
                targets.x_ids[chunk] if targets.x_ids is not None else x,
                targets.y_ids if targets.y_ids is not None else y,
                row_partials,
                column_partials,
                positive_logits[chunk],
                size,
                N,
                D,
                targets.offset + chunk.start,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                ROWS=rows,
                COLUMNS=columns,
                IDS=targets.x_ids is not None,
                PRECISION=self.precision,
                UPCAST=interpreted(),
                **asdict(tile),
            )
            if rows:
                _add_partials(row_partials, row_sums[chunk], tiles_n, onto=False)
            if columns:
                _add_partials(column_partials, column_sums, tiles_m, onto=chunk.start > 0)
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
        width = x.shape[1]
        x, y = (_operand(v, self.precision) for v in (x, y))
        targets = _contiguous(targets)
        row, column = (sums and sums.contiguous() for sums in (row_sums, column_sums))
        (M, D), N = x.shape, len(y)
        tile = tile_shape(capability(x), x.dtype, self.precision)
        tiles_n = ceil_div(N, tile.BLOCK_N)
        stride_gm = dlogits_stride(N)
        chunks = dlogits_chunks(M, N, x.dtype, tile.BLOCK_M, self.workspace_mib)
        largest = len(range(M)[chunks[0]])
        float32 = {"dtype": torch.float32, "device": x.device}
        workspace = torch.empty(largest, stride_gm, dtype=x.dtype, device=x.device)
        scale_partials = torch.empty(
            len(chunks), ceil_div(largest, tile.BLOCK_M) * tiles_n, **float32
        )
        x_grad = torch.empty(M, width, dtype=x.dtype, device=x.device) if x_wanted else None
        y_grad = torch.empty(N, D, **float32) if y_wanted else None
        x_product = torch.empty(largest if x_wanted else 0, D, **float32)
        step = factor * scale
        scale_grad = torch.zeros((), **float32)
        for chunk, partials in zip(chunks, scale_partials, strict=True):
            x_rows = x[chunk]
            size = len(x_rows)
            tiles = ceil_div(size, tile.BLOCK_M) * tiles_n
            run_kernel(
                dlogits_kernel,
                (tiles,),
                x_rows,
                y,
                scale,
                # Absent pointers get x as a dummy; the kernel never reads it.
                targets.x_ids[chunk] if targets.x_ids is not None else x,
                targets.y_ids if targets.y_ids is not None else y,
                row.lse_negatives[chunk] if row is not None else x,
                row.one_minus_p[chunk] if row is not None else x,
                column.lse_negatives if column is not None else x,
                column.one_minus_p if column is not None else x,
                workspace,
                partials,
                size,
                N,
                D,
                targets.offset + chunk.start,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                stride_gm,
                ROWS=row is not None,
                COLUMNS=column is not None,
                IDS=targets.x_ids is not None,
                PRECISION=self.precision,
                UPCAST=interpreted(),
                **asdict(tile),
            )
            scale_grad += partials[:tiles].sum()
            dlogits = workspace[:size, :N]
            with float32_products(self.precision):
                if x_grad is not None:
                    # dx = factor * scale * dlogits y
                    add_product(x_product[:size], dlogits, y, beta=0)
                    torch.mul(x_product[:size, :width], step, out=x_grad[chunk])
                if y_grad is not None:
                    # dy = factor * scale * dlogits^T x, added up over the chunks
                    add_product(y_grad, dlogits.T, x_rows, beta=int(chunk.start > 0))
        if y_grad is not None:
            y_grad = (y_grad.mul_(step))[:, :width].contiguous()
        return BlockGradients(x_grad, y_grad, scale_grad * factor)


def _operand(x: Tensor, precision: Float32Precision) -> Tensor:
    """Embeddings as products take them: rounded for `tf32`, their width a multiple of 16.

    Tensor cores truncate to tf32, which would make cosines smaller: numbers are rounded to the
    nearest first. Other widths get zeros behind: their rows would be loaded number by number.
    """
    if precision == "tf32" and x.dtype == torch.float32:
        nearest = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        x = torch.where(x.isfinite(), nearest, x)  # a NaN's bits would carry into the sign
    missing = -x.shape[1] % 16
    return F.pad(x, (0, missing)) if missing else x


def _contiguous(targets: Targets) -> Targets:
    """The targets with contiguous ids, which the kernels require."""
    if targets.x_ids is None or targets.y_ids is None:
        return targets
    x_ids, y_ids = targets.x_ids.contiguous(), targets.y_ids.contiguous()
    return replace(targets, x_ids=x_ids, y_ids=y_ids)


def dlogits_chunks(
    M: int, N: int, dtype: torch.dtype, BLOCK_M: int, workspace_mib: float | None
) -> list[slice]:
    """Chunks of rows whose dlogits fit in the workspace at a time, the longest first."""
    row_bytes = dtype.itemsize * dlogits_stride(N)
    if workspace_mib is None:
        most = max(_DLOGITS_ROWS, _DLOGITS_MIB * 2**20 // row_bytes)
    else:
        most = int(workspace_mib * 2**20 / row_bytes)
    return list(_chunks(M, most, BLOCK_M))


def dlogits_stride(N: int) -> int:
    """Stride of the workspace's rows: a multiple of 128 bytes, for fast library products."""
    return ceil_div(N, 64) * 64


def _chunks(size: int, most: int, multiple: int) -> Iterator[slice]:
    """Slices of about equal length, the longest first, of at most `most` rows (or one tile)."""
    count = ceil_div(size, max(most // multiple, 1) * multiple)
    length = ceil_div(ceil_div(size, count), multiple) * multiple
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def _add_partials(partials: Tensor, total: Tensor, count: int, *, onto: bool) -> None:
    grid = (ceil_div(len(total), PARTIAL_BLOCKS["BLOCK"]),)
    run_kernel(
        add_partial_lse_kernel,
        grid,
        partials,
        total,
        count,
        len(total),
        ONTO=onto,
        **PARTIAL_BLOCKS,
    )
