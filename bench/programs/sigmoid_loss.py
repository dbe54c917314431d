"""Programs that `sigmoid_loss` launches on each chip at the paper's global batch."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.programs.infonce import VARIANTS, B, D, block, flags
from bench.programs.program import Arch, PaperSizes, Program, pointer
from flap_kernels.infonce.triton_sigmoid import sigmoid_kernel
from flap_kernels.infonce.triton_tiles import dlogits_chunks, tile_shape


def _programs(arch: Arch) -> tuple[Program, ...]:
    """Loss and gradients in one pass, one program per variant."""
    return tuple(_sigmoid(arch, variant) for variant in VARIANTS)


def _sigmoid(arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    tile = asdict(tile_shape(arch, dtype, precision))
    M = dlogits_chunks(B, B, dtype, tile["BLOCK_M"], None)[0].stop
    partials = ("loss_partial_ptr", "scale_partial_ptr", "bias_partial_ptr")
    return Program(
        name=f"sigmoid_loss{variant}",
        kernel=sigmoid_kernel,
        signature={
            **block(M, dtype, ids),
            **dict.fromkeys(("bias_ptr", *partials), "*fp32"),
            "dlogits_ptr": pointer(dtype),
            "stride_gm": B,
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"GRADIENTS": True, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=((M + B) * D + M * B) * dtype.itemsize,
        flops=2 * M * B * D,
    )


PAPER = PaperSizes(_programs)
