"""Programs that `unshuffle_tokens` launches, forward and backward."""

from __future__ import annotations

from bench.programs.program import Arch, PaperSizes, Program, shaped
from flap_kernels.patches import strides
from flap_kernels.unshuffle_tokens import (
    blocks,
    unshuffle_tokens_backward_kernel,
    unshuffle_tokens_kernel,
)


def _programs(arch: Arch) -> tuple[Program, ...]:
    B, N, K, D = 288, 512, 306, 512
    sizes = {"N": N, "K": K, "D": D}
    return (
        Program(
            name="unshuffle_tokens",
            kernel=unshuffle_tokens_kernel,
            signature={
                **dict.fromkeys(("y_ptr", "token_ptr", "position_ptr", "out_ptr"), "*bf16"),
                "ids_restore_ptr": "*i64",
                **sizes,
                **strides("y", "bkd", shaped(B, K, D)),
                **strides("r", "bn", shaped(B, N)),
                **strides("t", "d", shaped(D)),
                **strides("p", "nd", shaped(N, D)),
            },
            constants={"HAS_TOKEN": True, "HAS_POSITION": True, **blocks(D)},
            bytes_moved=2 * B * D * (K + N) + 8 * B * N,
        ),
        Program(
            name="unshuffle_tokens_backward",
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


PAPER = PaperSizes(_programs, bytes_moved=4 * 288 * 512 * (306 + 512))
