"""Programs that `patch_embed` launches: the embedding forward, the packing of patches backward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from bench.programs.program import (
    FIXED,
    ODD,
    ODD_RAGGED,
    OTHER_PATCHES,
    OTHER_VARIANTS,
    RAGGED,
    VARIANTS,
    Arch,
    Batch,
    PaperSizes,
    Program,
    pointer,
    shaped,
)
from flap_kernels.launch import ceil_div
from flap_kernels.patch_embed_tiles import patch_embed_kernel, tiles
from flap_kernels.patches import pack_patches_kernel, pack_tile, strides


def _programs(batch: Batch, arch: Arch, variants: Iterable[str] = VARIANTS) -> tuple[Program, ...]:
    B, K, P = batch.B, batch.K, batch.P
    pixels = P * P
    pack = Program(
        name=f"{batch.name}pack_patches",
        kernel=pack_patches_kernel,
        signature={
            "mel_ptr": "*fp32",
            "index_ptr": "*i64",
            "out_ptr": "*bf16",
            "rows": B * K,
            "K": K,
            "N": batch.N,
            "patches_per_row": 8,
            "width": pixels + 8,
            **strides("m", "btf", shaped(B, batch.T, batch.bins)),
            **strides("i", "bk", shaped(B, K)),
        },
        constants={"P": P, **pack_tile(pixels)},
        blocks=ceil_div(B * K, pack_tile(pixels)["BLOCK_ROWS"]),
        bytes_moved=B * K * (4 * pixels + 2 * (pixels + 8)),
    )
    embed = (_program(batch, variant, arch) for variant in variants)
    return (*(program for program in embed if program), pack)


def _program(batch: Batch, variant: str, arch: Arch) -> Program | None:
    """None where plain PyTorch is used."""
    B, K, D, P = batch.B, batch.K, batch.D, batch.P
    argument, product, precision = VARIANTS[variant]
    tile = tiles(P * P, product, precision, arch)
    if tile is None:
        return None
    trips = ceil_div(D, tile["BLOCK_D"])
    return Program(
        name=f"{batch.name}patch_embed{variant}",
        kernel=patch_embed_kernel,
        signature={
            **dict.fromkeys(("mel_ptr", "bias_ptr", "position_ptr", "out_ptr"), pointer(argument)),
            "weight_ptr": pointer(product),
            # Absent pointers get a dummy tensor; the kernel never reads it.
            **dict.fromkeys(("ids_keep_ptr", "position_index_ptr"), "*i64"),
            "rows": B * K,
            "K": K,
            "D": D,
            "N": batch.N,
            "positions": batch.positions,
            "patches_per_row": 8,
            **strides("m", "btf", shaped(B, batch.T, batch.bins)),
            **strides("k", "bk", shaped(B, K)),
            **strides("w", "dp", shaped(D, P * P)),
            **strides("b", "d", shaped(D)),
            **strides("p", "nd", shaped(batch.positions, D)),
            **strides("i", "bk", shaped(B, K)),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"HAS_INDEX": batch.ragged, "P": P, "UPCAST": False, **tile},
        matrix_product=product == torch.bfloat16 or precision == "tf32",
        bytes_moved=argument.itemsize * B * K * (P * P + D),
        flops=2 * B * K * P * P * D,
        blocks=ceil_div(B * K, tile["BLOCK_ROWS"]),
        tile_flops=2 * tile["BLOCK_ROWS"] * tile["PIXELS"] * trips * tile["BLOCK_D"],
        trips=(trips,),
    )


def _others(batches: tuple[Batch, ...], arch: Arch) -> tuple[Program, ...]:
    return tuple(program for batch in batches for program in _programs(batch, arch, OTHER_VARIANTS))


def _paper(batch: Batch, *others: Batch) -> PaperSizes:
    rows = batch.B * batch.K
    return PaperSizes(
        partial(_programs, batch),
        partial(_others, others),
        bytes_moved=2 * rows * 4 * (256 + 768),
        flops=4 * rows * 256 * 768,
    )


PAPER, RAGGED_PAPER = _paper(FIXED, ODD, *OTHER_PATCHES), _paper(RAGGED, ODD_RAGGED)
