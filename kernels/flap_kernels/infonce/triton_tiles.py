"""Tiles and workspaces of InfoNCE's kernels, and the library products of what they store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flap_kernels.launch import ceil_div
from flap_kernels.precision import Float32Precision, add_product, float32_products

# The dlogits of at least this many rows.
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


def operand(x: Tensor, precision: Float32Precision) -> Tensor:
    """Round to the nearest tf32: tensor cores truncate, which would make cosines smaller."""
    if precision == "ieee" or x.dtype != torch.float32:
        return x
    nearest = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)  # a NaN's bits would carry into the sign


class Products:
    """The products of a block's dlogits with its rows and columns, some rows at a time.

        x: step * dlogits y_values          y: step * dlogits^T x_values

    A kernel stores the dlogits of `chunk` in `dlogits`, `add` then multiplies them.
    """

    def __init__(
        self,
        x_values: Tensor,
        y_values: Tensor,
        BLOCK_M: int,
        precision: Float32Precision,
        workspace_mib: float | None,
        *,
        x_dtype: torch.dtype | None = None,
        x_wanted: bool,
        y_wanted: bool,
    ) -> None:
        self._x_values, self._y_values, self._precision = x_values, y_values, precision
        M, N, dtype, device = len(x_values), len(y_values), x_values.dtype, x_values.device
        self.chunks = dlogits_chunks(M, N, dtype, BLOCK_M, workspace_mib)
        largest = len(range(M)[self.chunks[0]])
        self.dlogits = torch.empty(largest, _dlogits_stride(N), dtype=dtype, device=device)
        float32 = {"dtype": torch.float32, "device": device}
        D_x, D_y = y_values.shape[1], x_values.shape[1]
        self.x = None
        if x_wanted:
            self.x = torch.empty(M, D_x, dtype=x_dtype or dtype, device=device)
        self.y = torch.empty(N, D_y, **float32) if y_wanted else None
        self._x_product = torch.empty(largest if x_wanted else 0, D_x, **float32)

    @property
    def largest(self) -> int:
        """Most rows of a chunk."""
        return len(self.dlogits)

    def add(self, chunk: slice, step: Tensor) -> None:
        """Multiply the dlogits of these rows."""
        x_values = self._x_values[chunk]
        size = len(x_values)
        dlogits = self.dlogits[:size, : len(self._y_values)]
        with float32_products(self._precision):
            if self.x is not None:
                # dx = step * dlogits y
                add_product(self._x_product[:size], dlogits, self._y_values, beta=0)
                torch.mul(self._x_product[:size], step, out=self.x[chunk])
            if self.y is not None:
                # dy = step * dlogits^T x, added up over the chunks
                add_product(self.y, dlogits.T, x_values, beta=int(chunk.start > 0))
                if chunk.stop >= len(self._x_values):
                    self.y *= step


def dlogits_chunks(
    M: int, N: int, dtype: torch.dtype, BLOCK_M: int, workspace_mib: float | None
) -> list[slice]:
    """Chunks of rows whose dlogits fit in the workspace at a time, the longest first."""
    row_bytes = dtype.itemsize * _dlogits_stride(N)
    if workspace_mib is None:
        most = max(_DLOGITS_ROWS, _DLOGITS_MIB * 2**20 // row_bytes)
    else:
        most = int(workspace_mib * 2**20 / row_bytes)
    return list(chunks_of(M, most, BLOCK_M))


def _dlogits_stride(N: int) -> int:
    """Stride of the workspace's rows: a multiple of 128 bytes, for fast library products."""
    return ceil_div(N, 64) * 64


def chunks_of(size: int, most: int, multiple: int) -> Iterator[slice]:
    """Slices of about equal length, the longest first, of at most `most` rows (or one tile)."""
    count = ceil_div(size, max(most // multiple, 1) * multiple)
    length = ceil_div(ceil_div(size, count), multiple) * multiple
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))
