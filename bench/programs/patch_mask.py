"""Programs that masks are drawn with: 1-D and 2-D, fixed and ragged."""

from __future__ import annotations

from bench.programs.program import FIXED, RAGGED, Arch, Batch, PaperSizes, Program
from flap_kernels.launch import ceil_div
from flap_kernels.patch_mask import blocks, draw_patch_mask_kernel


def _programs(arch: Arch) -> tuple[Program, ...]:
    return (
        _program("draw_patch_mask_1d", FIXED, (512, 1), (307, None), shared=True, K=307),
        _program("draw_patch_mask_2d", FIXED, (64, 8), (51, 6), shared=True, K=306),
        _program("draw_patch_mask_2d_unshared", FIXED, (64, 8), (51, 6), shared=False, K=306),
    )


def _ragged_programs(arch: Arch) -> tuple[Program, ...]:
    # 1-D: of clips of one row
    each = RAGGED.positions
    return (
        _program(
            "draw_ragged_patch_mask_1d", RAGGED, (each, 1), (0, None), shared=True, K=RAGGED.K
        ),
        _program("draw_ragged_patch_mask_2d", RAGGED, (64, 8), (0, 6), shared=True, K=RAGGED.K),
    )


def _program(
    name: str,
    batch: Batch,
    grid: tuple[int, int],
    stay: tuple[int, int | None],
    *,
    shared: bool,
    K: int,
) -> Program:
    (C, R), (columns, rows) = grid, stay
    tile = blocks(C, R)
    return Program(
        name=name,
        kernel=draw_patch_mask_kernel,
        signature={
            "sample_index_ptr": "*i64",
            # Absent pointers get a dummy tensor; the kernel never reads it.
            "clips_ptr": "*i64",
            **dict.fromkeys(("ids_keep_ptr", "ids_drop_ptr", "ids_restore_ptr"), "*i64"),
            **dict.fromkeys(("outer_key", "inner_key"), "i64"),
            "stride_s": 1,
            "C": C,
            "R": R,
            "columns": columns,
            "rows": rows or R,
            "N": batch.N,
            "K": K,
        },
        num_warps=tile.pop("num_warps"),
        constants={
            "RAGGED": batch.ragged,
            "ALL_ROWS": rows is None,
            "SHARED": shared,
            **tile,
        },
        blocks=288,
        trips=(ceil_div(C, tile["BLOCK_J"]), R),
        bytes_moved=8 * (288 * (5 if batch.ragged else 1) + 2 * batch.B * batch.N),
    )


PAPER = PaperSizes(_programs, bytes_moved=8 * 288 * (1 + 2 * 512))
RAGGED_PAPER = PaperSizes(_ragged_programs, bytes_moved=8 * (288 * 5 + 2 * RAGGED.N))
