"""Programs that `masked_mse` launches: the whole forward, a chunk of rows backward."""

from __future__ import annotations

import torch

from bench.programs.program import VARIANTS, Arch, PaperSizes, Program, pointer, shaped
from flap_kernels.masked_mse import CHUNK_ROWS, EPS
from flap_kernels.masked_mse_tiles import masked_mse_kernel, tiles
from flap_kernels.patches import strides


def _programs(arch: Arch) -> tuple[Program, ...]:
    return tuple(
        _program(arch, name, variant, backward)
        for name, backward in (("masked_mse", False), ("masked_mse_errors", True))
        for variant in VARIANTS
    )


def _program(arch: Arch, name: str, variant: str, backward: bool) -> Program:
    B, M, H, N, P = 288, 206, 512, 512, 16
    argument, product, precision = VARIANTS[variant]
    tile = tiles(P * P, product, precision)
    rows = CHUNK_ROWS["cuda"] if backward else B * M
    bytes_of_row = argument.itemsize * (H + P * P) + backward * product.itemsize * P * P
    return Program(
        name=f"{name}{variant}",
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
            "N": N,
            "patches_per_row": 8,
            "scale": "fp32",
            **strides("h", "rh", shaped(B * M, H)),
            **strides("w", "ph", shaped(P * P, H)),
            **strides("b", "p", shaped(P * P)),
            **strides("m", "btf", shaped(B, 1024, 128)),
            **strides("d", "bm", shaped(B, M)),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={
            "P": P,
            "NORM_PIX": True,
            "EPS": EPS,
            "BACKWARD": backward,
            "UPCAST": False,
            **tile,
        },
        matrix_product=product == torch.bfloat16 or precision == "tf32",
        bytes_moved=rows * bytes_of_row,
        flops=2 * rows * H * P * P,
    )


PAPER = PaperSizes(
    _programs,
    bytes_moved=2 * 288 * 206 * (3 * 512 + 2 * 256),
    flops=8 * 288 * 206 * 512 * 256,
)
