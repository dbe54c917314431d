"""Programs that `masked_mse` launches: the whole forward, a chunk of rows backward."""

from __future__ import annotations

from functools import partial

import torch

from bench.programs.program import (
    FIXED,
    RAGGED,
    VARIANTS,
    Arch,
    Batch,
    PaperSizes,
    Program,
    pointer,
    shaped,
)
from flap_kernels.masked_mse_layer import CHUNK_ROWS, EPS
from flap_kernels.masked_mse_tiles import masked_mse_kernel, tiles
from flap_kernels.patches import strides


def _programs(batch: Batch, arch: Arch) -> tuple[Program, ...]:
    return tuple(
        _program(batch, name, variant, backward)
        for name, backward in (("masked_mse", False), ("masked_mse_errors", True))
        for variant in VARIANTS
    )


def _program(batch: Batch, name: str, variant: str, backward: bool) -> Program:
    B, M, H, P = batch.B, batch.M, 512, 16
    argument, product, precision = VARIANTS[variant]
    tile = tiles(P * P, product, precision)
    rows = CHUNK_ROWS["cuda"] if backward else B * M
    bytes_of_row = argument.itemsize * (H + P * P) + backward * product.itemsize * P * P
    return Program(
        name=f"{batch.name}{name}{variant}",
        kernel=masked_mse_kernel,
        signature={
            **dict.fromkeys(("hidden_ptr", "bias_ptr", "mel_ptr"), pointer(argument)),
            "weight_ptr": pointer(product),
            "ids_drop_ptr": "*i64",
            **dict.fromkeys(("upstream_ptr", "sums_ptr"), "*fp32"),
            "error_ptr": pointer(product) if backward else "*fp32",
            "first": 0,
            "rows": rows,
            "M": M,
            "H": H,
            "N": batch.N,
            "patches_per_row": 8,
            "scale": "fp32",
            **strides("h", "rh", shaped(B * M, H)),
            **strides("w", "ph", shaped(P * P, H)),
            **strides("b", "p", shaped(P * P)),
            **strides("m", "btf", shaped(B, batch.T, 128)),
            **strides("d", "bm", shaped(B, M)),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={
            "P": P,
            "NORM_PIX": True,
            "EPS": EPS,
            "BY_ROW": batch.ragged,
            "BACKWARD": backward,
            "UPCAST": False,
            **tile,
        },
        matrix_product=product == torch.bfloat16 or precision == "tf32",
        bytes_moved=rows * bytes_of_row,
        flops=2 * rows * H * P * P,
    )


def _paper(batch: Batch) -> PaperSizes:
    rows = batch.B * batch.M
    return PaperSizes(
        partial(_programs, batch),
        bytes_moved=2 * rows * (3 * 512 + 2 * 256),
        flops=8 * rows * 512 * 256,
    )


PAPER, RAGGED_PAPER = _paper(FIXED), _paper(RAGGED)
