"""What `infonce` launches on each chip at the paper's global batch, for the compile report."""

from __future__ import annotations

from dataclasses import asdict

import torch

from flap_kernels.infonce_launch import PART_BLOCKS, blocks, weight_chunks
from flap_kernels.infonce_tiles import add_parts_kernel, negatives_kernel, weights_kernel
from flap_kernels.launch import ceil_div
from flap_kernels.spec import Arch, Program, pointer

B, D = 4608, 512

# Rows that share an id; and float32, as the trainer's embeddings are, in each precision.
_VARIANTS = {
    "": (torch.bfloat16, "ieee", False),
    "_ids": (torch.bfloat16, "ieee", True),
    "_tf32": (torch.float32, "tf32", False),
    "_float32": (torch.float32, "ieee", False),
}


def programs(arch: Arch) -> tuple[Program, ...]:
    """Both directions of the loss, forward and backward, a variant each."""
    found = [_add_parts(arch)]
    for variant in _VARIANTS:
        found += [_negatives(arch, variant), _weights(arch, variant)]
    return tuple(found)


def _negatives(arch: Arch, variant: str) -> Program:
    dtype, precision, ids = _VARIANTS[variant]
    tile = asdict(blocks(arch, dtype, precision))
    parts = ceil_div(B, tile["BLOCK_M"]) + ceil_div(B, tile["BLOCK_N"])
    return Program(
        name=f"infonce_negatives{variant}",
        kernel=negatives_kernel,
        signature={
            **_block(B, dtype, ids),
            **dict.fromkeys(("row_part_ptr", "column_part_ptr", "positive_ptr"), "*fp32"),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={**_flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=2 * B * D * dtype.itemsize + 4 * B * (parts + 1),
        flops=2 * B * B * D,
    )


def _weights(arch: Arch, variant: str) -> Program:
    dtype, precision, ids = _VARIANTS[variant]
    tile = asdict(blocks(arch, dtype, precision))
    M = weight_chunks(B, B, dtype, tile["BLOCK_M"], None)[0].stop
    sides = ("row_negative_ptr", "row_miss_ptr", "column_negative_ptr", "column_miss_ptr")
    return Program(
        name=f"infonce_weights{variant}",
        kernel=weights_kernel,
        signature={
            **_block(M, dtype, ids),
            **dict.fromkeys((*sides, "scale_part_ptr"), "*fp32"),
            "weight_ptr": pointer(dtype),
            "stride_wm": B,
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={**_flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=((M + B) * D + M * B) * dtype.itemsize + 4 * 2 * (M + B),
        flops=2 * M * B * D,
    )


def _add_parts(arch: Arch) -> Program:
    tile = blocks(arch, torch.bfloat16, "ieee")
    parts = ceil_div(B, tile.BLOCK_N)
    return Program(
        name="infonce_add_parts",
        kernel=add_parts_kernel,
        signature={"part_ptr": "*fp32", "total_ptr": "*fp32", "parts": parts, "size": B},
        constants={"ONTO": False, **PART_BLOCKS},
        bytes_moved=4 * B * (parts + 1),
    )


def _block(M: int, dtype: torch.dtype, ids: bool) -> dict[str, str | int]:
    """The rows and columns of a block of logits, and what is looked up beside them."""
    rows = pointer(dtype)
    return {
        "x_ptr": rows,
        "y_ptr": rows,
        "scale_ptr": "*fp32",
        # Without ids the embeddings are passed in their place, and not read.
        **dict.fromkeys(("x_ids_ptr", "y_ids_ptr"), "*i64" if ids else rows),
        "M": M,
        "N": B,
        "D": D,
        "offset": 0,
        **dict.fromkeys(("stride_xm", "stride_yn"), D),
        **dict.fromkeys(("stride_xd", "stride_yd"), 1),
    }


def _flags(precision: str, ids: bool) -> dict[str, bool | str]:
    return {"ROWS": True, "COLUMNS": True, "IDS": ids, "PRECISION": precision, "WIDEN": False}
