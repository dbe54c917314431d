"""Programs that `masked_mse` launches: the whole forward, a chunk of rows backward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from bench.programs.program import (
    FIXED,
    ODD,
    ODD_RAGGED,
    OTHER_PATCHES,
    OTHER_VARIANTS,
    RAGGED,
    VARIANTS,
    Arch,
    Batch,
    PaperSizes,
    Program,
    pointer,
    shaped,
)
from flap_kernels.launch import ceil_div
from flap_kernels.masked_mse_layer import CHUNK_ROWS, EPS
from flap_kernels.masked_mse_tiles import masked_mse_kernel, tiles
from flap_kernels.patches import strides


def _programs(batch: Batch, arch: Arch, variants: Iterable[str] = VARIANTS) -> tuple[Program, ...]:
    found = (
        _program(batch, name, variant, backward, arch)
        for name, backward in (("masked_mse", False), ("masked_mse_errors", True))
        for variant in variants
    )
    return tuple(program for program in found if program)


def _program(batch: Batch, name: str, variant: str, backward: bool, arch: Arch) -> Program | None:
    """None where plain PyTorch is used."""
    B, M, H, P = batch.B, batch.M, batch.H, batch.P
    argument, product, precision = VARIANTS[variant]
    tile = tiles(P * P, H, product, precision, arch)
    if tile is None:
        return None
    trips = ceil_div(H, tile["BLOCK_H"])
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
            **strides("m", "btf", shaped(B, batch.T, batch.bins)),
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
        blocks=ceil_div(rows, tile["BLOCK_ROWS"]),
        tile_flops=2 * tile["BLOCK_ROWS"] * tile["PIXELS"] * trips * tile["BLOCK_H"],
        trips=(trips,),
    )


def _others(batches: tuple[Batch, ...], arch: Arch) -> tuple[Program, ...]:
    return tuple(program for batch in batches for program in _programs(batch, arch, OTHER_VARIANTS))


def _paper(batch: Batch, *others: Batch) -> PaperSizes:
    rows = batch.B * batch.M
    return PaperSizes(
        partial(_programs, batch),
        partial(_others, others),
        bytes_moved=4 * rows * (3 * 512 + 2 * 256),
        flops=8 * rows * 512 * 256,
    )


PAPER, RAGGED_PAPER = _paper(FIXED, ODD, *OTHER_PATCHES), _paper(RAGGED, ODD_RAGGED)
