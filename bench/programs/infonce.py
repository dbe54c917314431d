"""Programs that `infonce` launches on each chip: the paper's global batch, and other sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from bench.programs.program import Arch, PaperSizes, Program, pointer
from flap_kernels.infonce.triton_kernels import (
    add_partial_lse_kernel,
    dlogits_kernel,
    lse_negatives_kernel,
)
from flap_kernels.infonce.triton_tiles import (
    PARTIAL_BLOCKS,
    dlogits_parts,
    dlogits_stride,
    tile_shape,
)
from flap_kernels.launch import ceil_div
from flap_kernels.precision import Float32Precision


@dataclass(frozen=True)
class Block:
    """A block of logits: M rows from `offset` on of N columns, embeddings of width D."""

    name: str
    M: int
    N: int
    D: int
    offset: int = 0
    columns: bool = True
    """Whether the forward also sums columns."""


PAPER_BLOCK = Block("", 4608, 4608, 512)
OTHER_BLOCKS = (
    # No size a multiple of 16. The width has zeros added by then.
    Block("odd_", 4607, 4607, 112),
    # A rank's rows: with `columns` in the sharded scheme, without in the replicated one.
    Block("rank_", 576, 4608, 512, offset=1728),
    Block("odd_rank_", 575, 4600, 512, offset=1725, columns=False),
    Block("large_", 65_536, 65_536, 512),
)

# What the trainer compares of two pairs: the clip and the caption.
_IDS = 2

# Rows that share an id; and float32, as the trainer's embeddings are, in each precision.
VARIANTS: dict[str, tuple[torch.dtype, Float32Precision, bool]] = {
    "": (torch.bfloat16, "ieee", False),
    "_ids": (torch.bfloat16, "ieee", True),
    "_tf32": (torch.float32, "tf32", False),
    "_float32": (torch.float32, "ieee", False),
}


def _programs(block: Block, arch: Arch) -> tuple[Program, ...]:
    """Both directions of the loss, forward and backward, one program per variant."""
    found = [_add_partial_lse(block, arch)]
    for variant in VARIANTS:
        found += [_lse_negatives(block, arch, variant), _dlogits(block, arch, variant)]
    return tuple(found)


def _lse_negatives(block: Block, arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    tile = asdict(tile_shape(arch, dtype, precision, "sums"))
    BLOCK_M, BLOCK_N, BLOCK_D = (tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    M, N, D = block.M, block.N, block.D
    trips = ceil_div(D, BLOCK_D)
    partials = M * ceil_div(N, BLOCK_N) + N * ceil_div(M, BLOCK_M) * block.columns
    return Program(
        name=f"{block.name}infonce_lse_negatives{variant}",
        kernel=lse_negatives_kernel,
        signature={
            **arguments(block, M, N, dtype, ids),
            **dict.fromkeys(
                ("row_partial_ptr", "column_partial_ptr", "positive_logit_ptr"), "*fp32"
            ),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"ROWS": True, "COLUMNS": block.columns, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=(M + N) * D * dtype.itemsize + 4 * (partials + M),
        flops=2 * M * N * D,
        blocks=ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N),
        tile_flops=2 * BLOCK_M * BLOCK_N * trips * BLOCK_D,
        trips=(trips,),
    )


def _dlogits(block: Block, arch: Arch, variant: str) -> Program:
    dtype, precision, ids = VARIANTS[variant]
    shape = tile_shape(arch, dtype, precision, "dlogits")
    M, N = (parts[0].stop for parts in dlogits_parts(block.M, block.N, dtype, shape, None))
    tile, D = asdict(shape), block.D
    BLOCK_M, BLOCK_N, BLOCK_D = (tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D"))
    trips = ceil_div(D, BLOCK_D)
    sums = ("row_lse_ptr", "row_one_minus_p_ptr", "column_lse_ptr", "column_one_minus_p_ptr")
    return Program(
        name=f"{block.name}infonce_dlogits{variant}",
        kernel=dlogits_kernel,
        signature={
            **arguments(block, M, N, dtype, ids),
            **dict.fromkeys((*sums, "scale_partial_ptr"), "*fp32"),
            "dlogits_ptr": pointer(dtype),
            "stride_gm": dlogits_stride(N),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"ROWS": True, "COLUMNS": True, **flags(precision, ids), **tile},
        matrix_product=dtype == torch.bfloat16 or precision == "tf32",
        bytes_moved=((M + N) * D + M * N) * dtype.itemsize + 4 * 2 * (M + N),
        flops=2 * M * N * D,
        blocks=ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N),
        tile_flops=2 * BLOCK_M * BLOCK_N * trips * BLOCK_D,
        trips=(trips,),
    )


def _add_partial_lse(block: Block, arch: Arch) -> Program:
    tile = tile_shape(arch, torch.bfloat16, "ieee", "sums")
    partials = ceil_div(block.N, tile.BLOCK_N)
    return Program(
        name=f"{block.name}infonce_add_partial_lse",
        kernel=add_partial_lse_kernel,
        signature={
            "partial_ptr": "*fp32",
            "total_ptr": "*fp32",
            "partials": partials,
            "size": block.M,
        },
        constants={"ONTO": False, **PARTIAL_BLOCKS},
        blocks=ceil_div(block.M, PARTIAL_BLOCKS["BLOCK"]),
        trips=(ceil_div(partials, PARTIAL_BLOCKS["BLOCK_P"]),),
        bytes_moved=4 * block.M * (partials + 1),
    )


def arguments(block: Block, M: int, N: int, dtype: torch.dtype, ids: bool) -> dict[str, str | int]:
    """Rows and columns of a block of logits, and the vectors that belong to them."""
    rows = pointer(dtype)
    return {
        "x_ptr": rows,
        "y_ptr": rows,
        "scale_ptr": "*fp32",
        # Absent ids get the embeddings as a dummy; the kernel never reads it.
        **dict.fromkeys(("x_ids_ptr", "y_ids_ptr"), "*i64" if ids else rows),
        "M": M,
        "N": N,
        "D": block.D,
        "offset": block.offset,
        **dict.fromkeys(("stride_xm", "stride_yn"), block.D),
        **dict.fromkeys(("stride_xd", "stride_yd"), 1),
    }


def flags(precision: str, ids: bool) -> dict[str, bool | int | str]:
    return {"IDS": _IDS * ids, "PRECISION": precision, "UPCAST": False}


def _paper(arch: Arch) -> tuple[Program, ...]:
    return _programs(PAPER_BLOCK, arch)


def _others(arch: Arch) -> tuple[Program, ...]:
    return tuple(program for block in OTHER_BLOCKS for program in _programs(block, arch))


PAPER = PaperSizes(_paper, _others)
