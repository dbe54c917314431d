"""Programs that `gather_tokens` launches: a gather forward, a scatter backward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bench.programs.program import (
    FIXED,
    ODD,
    WITH_CLS,
    Arch,
    Batch,
    PaperSizes,
    Program,
    pointer,
    shaped,
)
from flap_kernels.gather_tokens import gather_tokens_kernel
from flap_kernels.launch import ceil_div
from flap_kernels.patches import strides
from flap_kernels.unshuffle_tokens_tiles import blocks, unshuffle_tokens_kernel

_VARIANTS = {"": torch.float32, "_bf16": torch.bfloat16}
"""The type of the tokens. The first is what training has under autocast: a decoder's blocks add to
what `unshuffle_tokens` gave, in float32."""


def _programs(batch: Batch, arch: Arch) -> tuple[Program, ...]:
    return tuple(
        program(batch, variant) for variant in _VARIANTS for program in (_gather, _scatter)
    )


def _gather(batch: Batch, variant: str) -> Program:
    B, N, K, D = batch.B, batch.N, batch.K, batch.D
    dtype = _VARIANTS[variant]
    return Program(
        name=f"{batch.name}gather_tokens{variant}",
        kernel=gather_tokens_kernel,
        signature={
            "x_ptr": pointer(dtype),
            "ids_keep_ptr": "*i64",
            "out_ptr": pointer(dtype),
            "N": N,
            "K": K,
            "D": D,
            **strides("x", "bnd", shaped(B, N, D)),
            **strides("k", "bk", shaped(B, K)),
        },
        constants=blocks(D),
        blocks=_blocks_of(B, K, D),
        bytes_moved=dtype.itemsize * B * K * D * 2 + 8 * B * K,
    )


def _scatter(batch: Batch, variant: str) -> Program:
    B, N, K, D = batch.B, batch.N, batch.K, batch.D
    dtype = _VARIANTS[variant]
    # Absent pointers get a dummy tensor; the kernel never reads it.
    rows = ("y_ptr", "token_ptr", "position_ptr", "out_ptr")
    return Program(
        name=f"{batch.name}scatter_tokens{variant}",
        kernel=unshuffle_tokens_kernel,
        signature={
            **dict.fromkeys(rows, pointer(dtype)),
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
        blocks=_blocks_of(B, N, D),
        bytes_moved=dtype.itemsize * B * D * (K + N) + 8 * B * N,
    )


def _blocks_of(B: int, rows: int, D: int) -> int:
    tile = blocks(D)
    return B * ceil_div(rows, tile["BLOCK_ROWS"]) * ceil_div(D, tile["BLOCK_D"])


def _others(arch: Arch) -> tuple[Program, ...]:
    # A decoder's masked tokens, behind [CLS]; an encoder's, packed end to end.
    masked = replace(WITH_CLS, K=206, D=512)
    packed = Batch("packed_", 1, 0, 88_417, K=88_129, positions=0)
    return tuple(program for batch in (masked, ODD, packed) for program in _programs(batch, arch))


PAPER = PaperSizes(partial(_programs, FIXED), _others, bytes_moved=4 * 288 * 768 * (3 * 306 + 512))
