"""Programs that `draw_patch_mask` launches, for 1-D and 2-D masks."""

from __future__ import annotations

from bench.programs.program import Arch, PaperSizes, Program
from flap_kernels.patch_mask import blocks, draw_patch_mask_kernel


def _programs(arch: Arch) -> tuple[Program, ...]:
    fixed: dict[str, str | int] = {
        **dict.fromkeys(
            ("sample_index_ptr", "ids_keep_ptr", "ids_drop_ptr", "ids_restore_ptr"), "*i64"
        ),
        **dict.fromkeys(("outer_key", "inner_key"), "i64"),
        "stride_s": 1,
    }
    return tuple(
        Program(
            name=name,
            kernel=draw_patch_mask_kernel,
            signature={
                **fixed,
                "C": C,
                "R": R,
                "columns": columns,
                "rows": rows or R,
                "K": columns * (rows or R),
            },
            constants={"ALL_ROWS": rows is None, "SHARED": shared, **blocks(C, R)},
            bytes_moved=288 * 8 * (1 + 2 * C * R),
        )
        for name, C, R, columns, rows, shared in (
            ("draw_patch_mask_1d", 512, 1, 307, None, True),
            ("draw_patch_mask_2d", 64, 8, 51, 6, True),
            ("draw_patch_mask_2d_unshared", 64, 8, 51, 6, False),
        )
    )


PAPER = PaperSizes(_programs, bytes_moved=288 * 8 * (1 + 2 * 512))
