"""Programs that `gather_tokens` launches: a gather forward, a scatter backward."""

from __future__ import annotations

from bench.programs.program import Arch, PaperSizes, Program, shaped
from flap_kernels.gather_tokens import gather_tokens_kernel
from flap_kernels.patches import strides
from flap_kernels.unshuffle_tokens_tiles import blocks, unshuffle_tokens_kernel


def _programs(arch: Arch) -> tuple[Program, ...]:
    B, N, K, D = 288, 512, 306, 768
    return (
        Program(
            name="gather_tokens",
            kernel=gather_tokens_kernel,
            signature={
                "x_ptr": "*bf16",
                "ids_keep_ptr": "*i64",
                "out_ptr": "*bf16",
                "N": N,
                "K": K,
                "D": D,
                **strides("x", "bnd", shaped(B, N, D)),
                **strides("k", "bk", shaped(B, K)),
            },
            constants=blocks(D),
            bytes_moved=2 * B * K * D * 2 + 8 * B * K,
        ),
        Program(
            name="scatter_tokens",
            kernel=unshuffle_tokens_kernel,
            signature={
                # Absent pointers get a dummy tensor; the kernel never reads it.
                **dict.fromkeys(("y_ptr", "token_ptr", "position_ptr", "out_ptr"), "*bf16"),
                **dict.fromkeys(("ids_restore_ptr", "position_index_ptr"), "*i64"),
                "N": N,
                "K": K,
                "D": D,
                "positions": 1,
                **strides("y", "bkd", shaped(B, K, D)),
                **strides("r", "bn", shaped(B, N)),
                **strides("t", "d", shaped(1)),
                **strides("p", "nd", shaped(1, 1)),
                **strides("i", "bn", shaped(B, N)),
            },
            constants={
                "HAS_TOKEN": False,
                "HAS_POSITION": False,
                "HAS_INDEX": False,
                **blocks(D),
            },
            bytes_moved=2 * B * D * (K + N) + 8 * B * N,
        ),
    )


PAPER = PaperSizes(_programs, bytes_moved=2 * 288 * 768 * (3 * 306 + 512))
