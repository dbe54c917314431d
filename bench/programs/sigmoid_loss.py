"""Programs that `sigmoid_loss` launches on each chip: the paper's global batch, and other sizes."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.programs.infonce import (
    OTHER_BLOCKS,
    PAPER_BLOCK,
    VARIANTS,
    Block,
    arguments,
    flags,
)
from bench.programs.program import Arch, PaperSizes, Program, pointer
from flap_kernels.infonce.triton_sigmoid import sigmoid_kernel
from flap_kernels.infonce.triton_tiles import dlogits_parts, dlogits_stride, tile_shape
from flap_kernels.launch import ceil_div


def _programs(block: Block, arch: Arch) -> tuple[Program, ...]:
    """Loss and gradients in one pass, one program per variant."""
    return tuple(_sigmoid(block, arch, variant) for variant in VARIANTS)


def _sigmoid(block: Block, arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    shape = tile_shape(arch, dtype, precision, "sigmoid")
    M, N = (parts[0].stop for parts in dlogits_parts(block.M, block.N, dtype, shape, None))
    tile, D = asdict(shape), block.D
    BLOCK_M, BLOCK_N, BLOCK_D = (tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    trips = ceil_div(D, BLOCK_D)
    partials = ("loss_partial_ptr", "scale_partial_ptr", "bias_partial_ptr")
    return Program(
        name=f"{block.name}sigmoid_loss{variant}",
        kernel=sigmoid_kernel,
        signature={
            **arguments(block, M, N, dtype, ids),
            **dict.fromkeys(("bias_ptr", *partials), "*fp32"),
            "dlogits_ptr": pointer(dtype),
            "stride_gm": dlogits_stride(N),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"GRADIENTS": True, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=((M + N) * D + M * N) * dtype.itemsize,
        flops=2 * M * N * D,
        blocks=ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N),
        tile_flops=2 * BLOCK_M * BLOCK_N * trips * BLOCK_D,
        trips=(trips,),
    )


def _paper(arch: Arch) -> tuple[Program, ...]:
    return _programs(PAPER_BLOCK, arch)


def _others(arch: Arch) -> tuple[Program, ...]:
    return tuple(program for block in OTHER_BLOCKS for program in _programs(block, arch))


PAPER = PaperSizes(_paper, _others)
