"""Programs that `infonce` launches on each chip at the paper's global batch."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.programs.program import Arch, PaperSizes, Program, pointer
from flap_kernels.infonce.triton_kernels import (
    add_partial_lse_kernel,
    dlogits_kernel,
    lse_negatives_kernel,
)
from flap_kernels.infonce.triton_tiles import PARTIAL_BLOCKS, dlogits_chunks, tile_shape
from flap_kernels.launch import ceil_div
from flap_kernels.precision import Float32Precision

B, D = 4608, 512

# What the trainer compares of two pairs: the clip and the caption.
_IDS = 2

# Rows that share an id; and float32, as the trainer's embeddings are, in each precision.
VARIANTS: dict[str, tuple[torch.dtype, Float32Precision, bool]] = {
    "": (torch.bfloat16, "ieee", False),
    "_ids": (torch.bfloat16, "ieee", True),
    "_tf32": (torch.float32, "tf32", False),
    "_float32": (torch.float32, "ieee", False),
}


def _programs(arch: Arch) -> tuple[Program, ...]:
    """Both directions of the loss, forward and backward, one program per variant."""
    found = [_add_partial_lse(arch)]
    for variant in VARIANTS:
        found += [_lse_negatives(arch, variant), _dlogits(arch, variant)]
    return tuple(found)


def _lse_negatives(arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    tile = asdict(tile_shape(arch, dtype, precision))
    partials = ceil_div(B, tile["BLOCK_M"]) + ceil_div(B, tile["BLOCK_N"])
    return Program(
        name=f"infonce_lse_negatives{variant}",
        kernel=lse_negatives_kernel,
        signature={
            **block(B, dtype, ids),
            **dict.fromkeys(
                ("row_partial_ptr", "column_partial_ptr", "positive_logit_ptr"), "*fp32"
            ),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"ROWS": True, "COLUMNS": True, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=2 * B * D * dtype.itemsize + 4 * B * (partials + 1),
        flops=2 * B * B * D,
    )


def _dlogits(arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    tile = asdict(tile_shape(arch, dtype, precision))
    M = dlogits_chunks(B, B, dtype, tile["BLOCK_M"], None)[0].stop
    sums = ("row_lse_ptr", "row_one_minus_p_ptr", "column_lse_ptr", "column_one_minus_p_ptr")
    return Program(
        name=f"infonce_dlogits{variant}",
        kernel=dlogits_kernel,
        signature={
            **block(M, dtype, ids),
            **dict.fromkeys((*sums, "scale_partial_ptr"), "*fp32"),
            "dlogits_ptr": pointer(dtype),
            "stride_gm": B,
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"ROWS": True, "COLUMNS": True, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=((M + B) * D + M * B) * dtype.itemsize + 4 * 2 * (M + B),
        flops=2 * M * B * D,
    )


def _add_partial_lse(arch: Arch) -> Program:
    tile = tile_shape(arch, torch.bfloat16, "ieee")
    partials = ceil_div(B, tile.BLOCK_N)
    return Program(
        name="infonce_add_partial_lse",
        kernel=add_partial_lse_kernel,
        signature={"partial_ptr": "*fp32", "total_ptr": "*fp32", "partials": partials, "size": B},
        constants={"ONTO": False, **PARTIAL_BLOCKS},
        bytes_moved=4 * B * (partials + 1),
    )


def block(M: int, dtype: torch.dtype, ids: bool) -> dict[str, str | int]:
    """Rows and columns of a block of logits, and the vectors that belong to them."""
    rows = pointer(dtype)
    return {
        "x_ptr": rows,
        "y_ptr": rows,
        "scale_ptr": "*fp32",
        # Absent ids get the embeddings as a dummy; the kernel never reads it.
        **dict.fromkeys(("x_ids_ptr", "y_ids_ptr"), "*i64" if ids else rows),
        "M": M,
        "N": B,
        "D": D,
        "offset": 0,
        **dict.fromkeys(("stride_xm", "stride_yn"), D),
        **dict.fromkeys(("stride_xd", "stride_yd"), 1),
    }


def flags(precision: str, ids: bool) -> dict[str, bool | int | str]:
    return {"IDS": _IDS * ids, "PRECISION": precision, "UPCAST": False}


PAPER = PaperSizes(_programs)
