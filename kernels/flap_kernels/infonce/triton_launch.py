"""InfoNCE's backend on a GPU: launches of `triton_kernels`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from flap_kernels.infonce.backend import (
    BlockGradients,
    BlockSums,
    DirectionSums,
    SigmoidSums,
    Targets,
)
from flap_kernels.infonce.triton_kernels import (
    add_partial_lse_kernel,
    dlogits_kernel,
    lse_negatives_kernel,
)
from flap_kernels.infonce.triton_sigmoid import sigmoid_kernel
from flap_kernels.infonce.triton_tiles import (
    PARTIAL_BLOCKS,
    Products,
    chunks_of,
    operand,
    tile_shape,
)
from flap_kernels.launch import capability, ceil_div, interpreted, run_kernel
from flap_kernels.precision import Float32Precision

# For partial sums.
_SUMS_MIB = 256


@dataclass(frozen=True)
class TritonTiled:
    """The `TileBackend` of Triton kernels, for float32 and narrower, on a GPU or interpreted."""

    precision: Float32Precision = "ieee"
    """Precision of float32 operands in products."""
    workspace_mib: float | None = None
    """Bounds the memory for partial results; None takes 256 forward and backward each. Forward a
    row of tiles is always allowed, backward a tile."""
    weights: None = None

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
        x, y = (operand(v, self.precision) for v in (x, y))
        targets = _contiguous(targets)
        (M, D), N = x.shape, len(y)
        tile = tile_shape(capability(x), x.dtype, self.precision, "sums")
        tiles_n = ceil_div(N, tile.BLOCK_N)
        row_bytes = 4 * (tiles_n * rows + ceil_div(N, tile.BLOCK_M) * columns)
        most = int((self.workspace_mib or _SUMS_MIB) * 2**20 / row_bytes)
        float32 = {"dtype": torch.float32, "device": x.device}
        row_sums = torch.empty(M if rows else 0, **float32)
        column_sums = torch.empty(N if columns else 0, **float32)
        positive_logits = torch.empty(M, **float32)
        chunks = list(chunks_of(M, most, tile.BLOCK_M))
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
                IDS=0 if targets.x_ids is None else targets.x_ids.shape[1],
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
        values: tuple[Tensor, Tensor] | None = None,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """See `Backend.gradients`."""
        width = (values or (x,))[0].shape[1]
        x, y = (operand(v, self.precision) for v in (x, y))
        targets = _contiguous(targets)
        row, column = (sums and sums.contiguous() for sums in (row_sums, column_sums))
        tile = tile_shape(capability(x), x.dtype, self.precision, "dlogits")
        x_values, y_values = x, y
        if values is not None:
            x_values, y_values = (operand(v, self.precision) for v in values)
        products = Products(
            x_values,
            y_values,
            width,
            tile,
            self.precision,
            self.workspace_mib,
            x_dtype=x.dtype if values is None else torch.float32,
            x_wanted=x_wanted,
            y_wanted=y_wanted,
        )
        step = factor * scale if values is None else factor
        float32 = {"dtype": torch.float32, "device": x.device}
        scale_partials = torch.empty(len(products.parts), products.most_tiles, **float32)
        scale_grad = torch.zeros((), **float32)
        for (rows, columns), partials in zip(products.parts, scale_partials, strict=True):
            x_part, y_part = x[rows], y[columns]
            sizes = len(x_part), len(y_part)
            tiles = ceil_div(sizes[0], tile.BLOCK_M) * ceil_div(sizes[1], tile.BLOCK_N)
            run_kernel(
                dlogits_kernel,
                (tiles,),
                x_part,
                y_part,
                scale,
                # Absent pointers get x as a dummy; the kernel never reads it.
                targets.x_ids[rows] if targets.x_ids is not None else x,
                targets.y_ids[columns] if targets.y_ids is not None else y,
                row.lse_negatives[rows] if row is not None else x,
                row.one_minus_p[rows] if row is not None else x,
                column.lse_negatives[columns] if column is not None else x,
                column.one_minus_p[columns] if column is not None else x,
                products.dlogits,
                partials,
                *sizes,
                x.shape[1],
                targets.offset + rows.start - columns.start,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                products.dlogits.stride(0),
                ROWS=row is not None,
                COLUMNS=column is not None,
                IDS=0 if targets.x_ids is None else targets.x_ids.shape[1],
                PRECISION=self.precision,
                UPCAST=interpreted(),
                **asdict(tile),
            )
            scale_grad += partials[:tiles].sum()
            products.add(rows, columns, step)
        return BlockGradients(products.x, products.y, scale_grad * factor)

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
        width = x.shape[1]
        x, y = (operand(v, self.precision) for v in (x, y))
        targets = _contiguous(targets)
        tile = tile_shape(capability(x), x.dtype, self.precision, "sigmoid")
        gradients, products = x_wanted or y_wanted, None
        parts, dlogits = [(slice(0, len(x)), slice(0, len(y)))], x
        if gradients:
            products = Products(
                x,
                y,
                width,
                tile,
                self.precision,
                self.workspace_mib,
                x_dtype=torch.float32,
                x_wanted=x_wanted,
                y_wanted=y_wanted,
            )
            parts, dlogits = products.parts, products.dlogits
        tiles = [
            ceil_div(rows.stop - rows.start, tile.BLOCK_M)
            * ceil_div(columns.stop - columns.start, tile.BLOCK_N)
            for rows, columns in parts
        ]
        # Of the loss, the scale and the bias; each launch fills the tiles of its part.
        partials = torch.zeros(3, sum(tiles), dtype=torch.float32, device=x.device)
        for (rows, columns), of_part in zip(parts, partials.split(tiles, dim=1), strict=True):
            x_part, y_part = x[rows], y[columns]
            run_kernel(
                sigmoid_kernel,
                (of_part.shape[1],),
                x_part,
                y_part,
                scale,
                bias,
                # Absent pointers get x as a dummy; the kernel never reads it.
                targets.x_ids[rows] if targets.x_ids is not None else x,
                targets.y_ids[columns] if targets.y_ids is not None else y,
                dlogits,
                *of_part,
                len(x_part),
                len(y_part),
                x.shape[1],
                targets.offset + rows.start - columns.start,
                x.stride(0),
                x.stride(1),
                y.stride(0),
                y.stride(1),
                dlogits.stride(0),
                GRADIENTS=gradients,
                IDS=0 if targets.x_ids is None else targets.x_ids.shape[1],
                PRECISION=self.precision,
                UPCAST=interpreted(),
                **asdict(tile),
            )
            if products is not None:
                products.add(rows, columns, factor * scale)
        loss, scale_grad, bias_grad = partials.sum(1)
        x_grad, y_grad = (None, None) if products is None else (products.x, products.y)
        return SigmoidSums(loss, x_grad, y_grad, scale_grad * factor, bias_grad * factor)


def _contiguous(targets: Targets) -> Targets:
    """The targets with contiguous ids, which the kernels require."""
    if targets.x_ids is None or targets.y_ids is None:
        return targets
    x_ids, y_ids = targets.x_ids.contiguous(), targets.y_ids.contiguous()
    return replace(targets, x_ids=x_ids, y_ids=y_ids)


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
