"""Programs that `unshuffle_tokens` launches, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from bench.programs.program import (
    FIXED,
    ODD,
    ODD_RAGGED,
    RAGGED,
    WITH_CLS,
    Arch,
    Batch,
    PaperSizes,
    Program,
    pointer,
    shaped,
)
from flap_kernels.launch import ceil_div
from flap_kernels.patches import strides
from flap_kernels.unshuffle_tokens_tiles import (
    blocks,
    unshuffle_tokens_backward_kernel,
    unshuffle_tokens_kernel,
)

_VARIANTS = {
    "": (torch.bfloat16, torch.float32),
    "_bf16": (torch.bfloat16, torch.bfloat16),
    "_float32": (torch.float32, torch.float32),
}
"""The types of `y`, and of mask token, positions and result. The first is what training has under
autocast: `y` comes from a product, the others are parameters and a table in float32."""


def _programs(batch: Batch, arch: Arch) -> tuple[Program, ...]:
    return tuple(
        program(batch, variant) for variant in _VARIANTS for program in (_forward, _backward)
    )


def _forward(batch: Batch, variant: str) -> Program:
    B, N, K, D = batch.B, batch.N, batch.K, batch.H
    y, others = _VARIANTS[variant]
    return Program(
        name=f"{batch.name}unshuffle_tokens{variant}",
        kernel=unshuffle_tokens_kernel,
        signature={
            "y_ptr": pointer(y),
            **dict.fromkeys(("token_ptr", "position_ptr", "out_ptr"), pointer(others)),
            # Absent pointers get a dummy tensor; the kernel never reads it.
            **dict.fromkeys(("ids_restore_ptr", "position_index_ptr"), "*i64"),
            "N": N,
            "K": K,
            "D": D,
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
        blocks=_blocks_of(B, N, D),
        bytes_moved=B * D * (y.itemsize * K + others.itemsize * N) + 8 * B * N,
    )


def _backward(batch: Batch, variant: str) -> Program:
    B, N, K, D = batch.B, batch.N, batch.K, batch.H
    y, others = _VARIANTS[variant]
    return Program(
        name=f"{batch.name}unshuffle_tokens_backward{variant}",
        kernel=unshuffle_tokens_backward_kernel,
        signature={
            "grad_ptr": pointer(others),
            "y_grad_ptr": pointer(y),
            "ids_restore_ptr": "*i64",
            "partial_ptr": "*fp32",
            "N": N,
            "K": K,
            "D": D,
            **strides("g", "bnd", shaped(B, N, D)),
            **strides("r", "bn", shaped(B, N)),
        },
        constants=blocks(D),
        blocks=_blocks_of(B, N, D),
        bytes_moved=B * D * (y.itemsize * K + others.itemsize * N) + 8 * B * N,
    )


def _blocks_of(B: int, N: int, D: int) -> int:
    tile = blocks(D)
    return B * ceil_div(N, tile["BLOCK_ROWS"]) * ceil_div(D, tile["BLOCK_D"])


def _others(batches: tuple[Batch, ...], arch: Arch) -> tuple[Program, ...]:
    return tuple(program for batch in batches for program in _programs(batch, arch))


def _paper(batch: Batch, *others: Batch) -> PaperSizes:
    least = 2 * batch.B * batch.H * (2 * batch.K + 4 * batch.N)
    return PaperSizes(partial(_programs, batch), partial(_others, others), bytes_moved=least)


PAPER, RAGGED_PAPER = _paper(FIXED, WITH_CLS, ODD), _paper(RAGGED, ODD_RAGGED)
