"""Programs that `unshuffle_tokens` launches, forward and backward."""

from __future__ import annotations

from functools import partial

from bench.programs.program import FIXED, RAGGED, Arch, Batch, PaperSizes, Program, shaped
from flap_kernels.patches import strides
from flap_kernels.unshuffle_tokens_tiles import (
    blocks,
    unshuffle_tokens_backward_kernel,
    unshuffle_tokens_kernel,
)


def _programs(batch: Batch, arch: Arch) -> tuple[Program, ...]:
    B, N, K, D = batch.B, batch.N, batch.K, 512
    sizes = {"N": N, "K": K, "D": D}
    return (
        Program(
            name=f"{batch.name}unshuffle_tokens",
            kernel=unshuffle_tokens_kernel,
            signature={
                **dict.fromkeys(("y_ptr", "token_ptr", "position_ptr", "out_ptr"), "*bf16"),
                # Absent pointers get a dummy tensor; the kernel never reads it.
                **dict.fromkeys(("ids_restore_ptr", "position_index_ptr"), "*i64"),
                **sizes,
                "positions": batch.positions,
                **strides("y", "bkd", shaped(B, K, D)),
                **strides("r", "bn", shaped(B, N)),
                **strides("t", "d", shaped(D)),
                **strides("p", "nd", shaped(batch.positions, D)),
                **strides("i", "bn", shaped(B, N)),
            },
            constants={
                "HAS_TOKEN": True,
                "HAS_POSITION": True,
                "HAS_INDEX": batch.ragged,
                **blocks(D),
            },
            bytes_moved=2 * B * D * (K + N) + 8 * B * N,
        ),
        Program(
            name=f"{batch.name}unshuffle_tokens_backward",
            kernel=unshuffle_tokens_backward_kernel,
            signature={
                **dict.fromkeys(("grad_ptr", "y_grad_ptr"), "*bf16"),
                "ids_restore_ptr": "*i64",
                "partial_ptr": "*fp32",
                **sizes,
                **strides("g", "bnd", shaped(B, N, D)),
                **strides("r", "bn", shaped(B, N)),
            },
            constants=blocks(D),
            bytes_moved=2 * B * D * (K + N) + 8 * B * N,
        ),
    )


def _paper(batch: Batch) -> PaperSizes:
    tokens = batch.B * (batch.K + batch.N)
    return PaperSizes(partial(_programs, batch), bytes_moved=4 * 512 * tokens)


PAPER, RAGGED_PAPER = _paper(FIXED), _paper(RAGGED)
