"""Programs that `patch_embed` launches: the embedding forward, the packing of patches backward."""

from __future__ import annotations

import torch

from bench.programs.program import VARIANTS, Arch, PaperSizes, Program, pointer, shaped
from flap_kernels.patch_embed import patch_embed_kernel, tiles
from flap_kernels.patches import pack_patches_kernel, pack_tile, strides


def _programs(arch: Arch) -> tuple[Program, ...]:
    B, K, P = 288, 306, 16
    pixels = P * P
    pack = Program(
        name="pack_patches",
        kernel=pack_patches_kernel,
        signature={
            "mel_ptr": "*fp32",
            "index_ptr": "*i64",
            "out_ptr": "*bf16",
            "rows": B * K,
            "K": K,
            "N": 512,
            "patches_per_row": 8,
            "width": pixels + 8,
            **strides("m", "btf", shaped(B, 1024, 128)),
            **strides("i", "bk", shaped(B, K)),
        },
        constants={"P": P, **pack_tile(pixels)},
        bytes_moved=B * K * (4 * pixels + 2 * (pixels + 8)),
    )
    return (*(_program(arch, variant) for variant in VARIANTS), pack)


def _program(arch: Arch, variant: str) -> Program:
    B, K, D, N, P = 288, 306, 768, 512, 16
    argument, product, precision = VARIANTS[variant]
    tile = tiles(P * P, product, precision)
    return Program(
        name=f"patch_embed{variant}",
        kernel=patch_embed_kernel,
        signature={
            **dict.fromkeys(("mel_ptr", "bias_ptr", "position_ptr", "out_ptr"), pointer(argument)),
            "weight_ptr": pointer(product),
            "ids_keep_ptr": "*i64",
            "rows": B * K,
            "K": K,
            "D": D,
            "N": N,
            "patches_per_row": 8,
            **strides("m", "btf", shaped(B, 1024, 128)),
            **strides("k", "bk", shaped(B, K)),
            **strides("w", "dp", shaped(D, P * P)),
            **strides("b", "d", shaped(D)),
            **strides("p", "nd", shaped(N, D)),
        },
        num_warps=tile.pop("num_warps"),
        num_stages=tile.pop("num_stages"),
        constants={"P": P, "UPCAST": False, **tile},
        matrix_product=product == torch.bfloat16 or precision == "tf32",
        bytes_moved=argument.itemsize * B * K * (P * P + D),
        flops=2 * B * K * P * P * D,
    )


PAPER = PaperSizes(
    _programs,
    bytes_moved=2 * 288 * 306 * 2 * (256 + 768),
    flops=4 * 288 * 306 * 256 * 768,
)
