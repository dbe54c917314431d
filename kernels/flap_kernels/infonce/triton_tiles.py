"""Tiles and workspaces of InfoNCE's kernels, and the library products of what they store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels.cards import INTERPRETER
from flap_kernels.launch import ceil_div
from flap_kernels.precision import Float32Precision, add_product, float32_products

# For dlogits; and the most rows of them at a time, whose gradients fill the largest GPUs.
_DLOGITS_MIB, _DLOGITS_ROWS = 256, 8192

PARTIAL_BLOCKS = {"BLOCK_P": 16, "BLOCK": 128}
"""Tile of the kernel that adds up partial sums: partial sums at a time, sums per program."""


KernelName = Literal["sums", "dlogits", "sigmoid"]


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


def tile_shape(
    arch: int, dtype: torch.dtype, precision: Float32Precision, kernel: KernelName
) -> TileShape:
    """The tile for a compute capability (90 for 9.0), a dtype and a kernel.

    Operands reach shared memory from the L2 cache: the larger the tile, the fewer bytes of them.
    But what `sums` computes behind the product takes as long as the product: of two smaller blocks
    on a multiprocessor, one computes it while the other multiplies. `sigmoid` needs the most
    registers.
    """
    if arch == INTERPRETER:  # many small tiles, so that small tests have several
        return TileShape(32, 64, 32, 1, 2, 4, 1)
    if dtype == torch.float32 and precision == "ieee":
        return TileShape(64, 64, 32, 1, 8, 8 if kernel == "sigmoid" else 4, 3)
    if dtype == torch.float32:
        return TileShape(128, 128, 32, 4, 8, 8, 3)
    large = arch in (80, 90, 100, 103)
    block_d = 64 if large else 32  # 32: 48 KiB of shared memory
    if kernel == "sums":
        return TileShape(128, 128, block_d, 4, 8, 4, 3)
    if kernel == "sigmoid":
        return TileShape(128, 128, block_d, 4, 8, 8, 3)
    if arch == 90:
        return TileShape(128, 256, block_d, 4, 8, 8, 3)
    if arch in (100, 103):  # the wider tile spills where two ids are compared
        return TileShape(128, 128, block_d, 4, 8, 8, 3)
    return TileShape(128, 128, block_d, 1, 8, 8, 3)


def operand(x: Tensor, precision: Float32Precision) -> Tensor:
    """Embeddings as products take them: rounded for `tf32`, their width a multiple of 16.

    Tensor cores truncate to tf32, which would make cosines smaller: numbers are rounded to the
    nearest first. Other widths get zeros behind: their rows would be loaded number by number.
    """
    if precision == "tf32" and x.dtype == torch.float32:
        nearest = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        x = torch.where(x.isfinite(), nearest, x)  # a NaN's bits would carry into the sign
    missing = -x.shape[1] % 16
    return F.pad(x, (0, missing)) if missing else x


class Products:
    """The products of a block's dlogits with its rows and columns, some of both at a time.

        x: step * dlogits y_values          y: step * dlogits^T x_values

    A kernel stores the dlogits of a part in `dlogits`, `add` then multiplies them. Of the values'
    columns, the first `width` count: `operand` may have added some.
    """

    def __init__(
        self,
        x_values: Tensor,
        y_values: Tensor,
        width: int,
        tile: TileShape,
        precision: Float32Precision,
        workspace_mib: float | None,
        *,
        x_dtype: torch.dtype | None = None,
        x_wanted: bool,
        y_wanted: bool,
    ) -> None:
        self._x_values, self._y_values, self._precision = x_values, y_values, precision
        self._width = width
        M, N, dtype, device = len(x_values), len(y_values), x_values.dtype, x_values.device
        rows, columns = dlogits_parts(M, N, dtype, tile, workspace_mib)
        self.parts = list(product(rows, columns))
        most, widest = (len(range(n)[parts[0]]) for n, parts in ((M, rows), (N, columns)))
        self.most_tiles = ceil_div(most, tile.BLOCK_M) * ceil_div(widest, tile.BLOCK_N)
        self.dlogits = torch.empty(most, dlogits_stride(widest), dtype=dtype, device=device)
        float32 = {"dtype": torch.float32, "device": device}
        D = x_values.shape[1]
        self.x = None
        if x_wanted:
            self.x = torch.empty(M, width, dtype=x_dtype or dtype, device=device)
        self._y = torch.empty(N, D, **float32) if y_wanted else None
        self._x_product = torch.empty(most if x_wanted else 0, D, **float32)

    @property
    def y(self) -> Tensor | None:
        """(N, width), once all parts are added."""
        return None if self._y is None else self._y[:, : self._width].contiguous()

    def add(self, rows: slice, columns: slice, step: Tensor) -> None:
        """Multiply the dlogits of a part."""
        x_values, y_values = self._x_values[rows], self._y_values[columns]
        dlogits = self.dlogits[: len(x_values), : len(y_values)]
        with float32_products(self._precision):
            if self.x is not None:
                # dx = step * dlogits y, added up over the columns
                total = self._x_product[: len(x_values)]
                add_product(total, dlogits, y_values, beta=int(columns.start > 0))
                if columns.stop >= len(self._y_values):
                    torch.mul(total[:, : self._width], step, out=self.x[rows])
            if self._y is not None:
                # dy = step * dlogits^T x, added up over the rows
                total = self._y[columns]
                add_product(total, dlogits.T, x_values, beta=int(rows.start > 0))
                if rows.stop >= len(self._x_values):
                    total *= step


def dlogits_parts(
    M: int, N: int, dtype: torch.dtype, tile: TileShape, workspace_mib: float | None
) -> tuple[list[slice], list[slice]]:
    """Rows and columns whose dlogits fit in the workspace at a time, the longest first.

    About square where the whole does not fit: the gradients of few rows, D wide, are too few
    tiles of a product for all multiprocessors.
    """
    most = int((workspace_mib or _DLOGITS_MIB) * 2**20 / dtype.itemsize)
    square = max(int(most**0.5), 1)
    rows = list(chunks_of(M, min(max(square, most // max(N, 1)), _DLOGITS_ROWS), tile.BLOCK_M))
    return rows, list(chunks_of(N, most // len(range(M)[rows[0]]), tile.BLOCK_N))


def dlogits_stride(N: int) -> int:
    """Stride of the workspace's rows: a multiple of 128 bytes, for fast library products."""
    return ceil_div(N, 64) * 64


def chunks_of(size: int, most: int, multiple: int) -> Iterator[slice]:
    """Slices of about equal length, the longest first, of at most `most` rows (or one tile)."""
    count = ceil_div(size, max(most // multiple, 1) * multiple)
    length = ceil_div(ceil_div(size, count), multiple) * multiple
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))
