"""What `masked_mse` computes of a layer and its targets, by its kernel or in plain PyTorch.

e[r, :] = weight @ hidden[r] + bias - target(r)          for r in a chunk of the B * M rows

M masked patches of a clip   H decoder's width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels.launch import capability, ceil_div, interpreted, run_kernel, runs_triton
from flap_kernels.masked_mse_tiles import masked_mse_kernel, tiles
from flap_kernels.patches import MOST_PIXELS, patch_rows, strides
from flap_kernels.precision import accumulator_dtype, add_product, float32_precision

EPS = 1e-6

# A chunk's errors stay in cache until the products that read them: a GPU's L2, a core's L2.
CHUNK_ROWS = {"cuda": 16_384}
_CHUNK_ROWS_ELSEWHERE = 4_096


@dataclass(frozen=True)
class Layer:
    """Inputs of forward and backward: rows of hidden (B * M, H), their targets and weights."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    mel: Tensor
    ids_drop: Tensor
    row_weight: Tensor | None
    """(B * M,) in `total_dtype`, or None: 1 / (B * M) each."""
    patch: int
    norm_pix: bool

    @property
    def pixels(self) -> int:
        return self.patch * self.patch

    @property
    def total_dtype(self) -> torch.dtype:
        return accumulator_dtype(self.weight.dtype)

    @property
    def tile(self) -> dict[str, Any] | None:
        """The kernel's tile; None where plain PyTorch is used."""
        if self.pixels > MOST_PIXELS or not runs_triton(self.hidden, self.weight, self.mel):
            return None
        H, dtype, precision = self.hidden.shape[1], self.weight.dtype, float32_precision()
        return tiles(self.pixels, H, dtype, precision, capability(self.mel))

    def chunks(self) -> Iterator[slice]:
        step = CHUNK_ROWS.get(self.hidden.device.type, _CHUNK_ROWS_ELSEWHERE)
        for first in range(0, len(self.hidden), step):
            yield slice(first, min(first + step, len(self.hidden)))

    @property
    def divisor(self) -> int:
        """The loss is the sum of squares, of weighted rows if there are weights, by this."""
        return self.pixels * (len(self.hidden) if self.row_weight is None else 1)

    def sum_of_squares(self) -> Tensor:
        if tile := self.tile:
            sums = self._launch(tile, slice(0, len(self.hidden)), None, None)
            return sums.sum() if self.row_weight is None else (sums * self.row_weight).sum()
        return torch.stack([self._sum_of_squares(chunk) for chunk in self.chunks()]).sum()

    def _sum_of_squares(self, chunk: slice) -> Tensor:
        squares = self._errors(chunk).square_()
        if self.row_weight is None:
            return squares.sum()
        return (squares.sum(1) * self.row_weight[chunk]).sum()

    def prediction_gradient(self, chunk: slice, upstream: Tensor) -> tuple[Tensor, Tensor]:
        """dprediction of some rows, in the product's dtype, and its column sums before rounding."""
        product = self.weight.dtype
        scale = 2.0 / self.divisor
        if self.row_weight is not None:
            upstream, scale = scale * upstream * self.row_weight[chunk], 1.0
        tile = self.tile
        if tile is None:
            e = self._errors(chunk).mul_(upstream[..., None] * scale)
            return e.to(product), e.sum(0)
        # The interpreter truncates float32 to bfloat16 where a GPU rounds, so PyTorch rounds there.
        stored = torch.float32 if interpreted() else product
        e = self.mel.new_empty((chunk.stop - chunk.start, self.pixels), dtype=stored)
        sums = self._launch(tile, chunk, upstream, e)
        return e.to(product), sums.sum(0)

    def _errors(self, chunk: slice) -> Tensor:
        """e of some rows, in PyTorch: the negative target, then the product added to it."""
        row = torch.arange(chunk.start, chunk.stop, device=self.ids_drop.device)
        n = self.ids_drop.flatten()[chunk].long()
        x = patch_rows(self.mel, row // self.ids_drop.shape[1], n, self.patch).to(self.total_dtype)
        bias = self.bias.to(self.total_dtype)
        if self.norm_pix:
            # layer_norm's variance is the biased one: unbiased * ratio.
            ratio = (self.pixels - 1) / self.pixels
            minus = torch.full_like(bias, -(ratio**0.5))
            e = F.layer_norm(x, (self.pixels,), minus, bias, EPS * ratio)
        else:
            e = bias - x
        return add_product(e, self.hidden[chunk].to(self.weight.dtype), self.weight.T)

    def _launch(
        self, tile: dict[str, Any], chunk: slice, upstream: Tensor | None, error: Tensor | None
    ) -> Tensor:
        """Launch; returns sums of squares, or with `error` each program's column sums.

        With weights, squares are summed by row, and `upstream` is scaled and by row; without, by
        program, and ().
        """
        rows = chunk.stop - chunk.start
        programs = ceil_div(rows, tile["BLOCK_ROWS"])
        by_row = self.row_weight is not None
        shape = (rows if by_row else programs,) if error is None else (programs, self.pixels)
        sums = self.mel.new_empty(shape, dtype=torch.float32)
        run_kernel(
            masked_mse_kernel,
            (programs,),
            self.hidden,
            self.weight,
            self.bias,
            self.mel,
            self.ids_drop,
            sums if upstream is None else upstream,
            sums,
            sums if error is None else error,
            chunk.start,
            rows,
            self.ids_drop.shape[1],
            self.hidden.shape[1],
            self.mel[0].numel() // self.pixels,
            self.mel.shape[2] // self.patch,
            2.0 / self.divisor,
            **strides("h", "rh", self.hidden),
            **strides("w", "ph", self.weight),
            **strides("b", "p", self.bias),
            **strides("m", "btf", self.mel),
            **strides("d", "bm", self.ids_drop),
            P=self.patch,
            NORM_PIX=self.norm_pix,
            EPS=EPS,
            BY_ROW=by_row,
            BACKWARD=error is not None,
            UPCAST=interpreted(),
            **tile,
        )
        return sums
