"""Multiply-adds of encoders' parts. TODO-MERGE: goes when `flop` takes PyTorch's counter."""

from __future__ import annotations

from flap_fast.config import Audio


def htsat_products(audio: Audio) -> tuple[int, list[int], int]:
    """Of one clip: the patches' embedding, each block, all merges."""
    N, last = audio.grid[0] ** 2, len(audio.stages) - 1
    conv, blocks, merges = N * audio.patch**2 * audio.stages[0][0], [], 0
    for n, (width, depth, _) in enumerate(audio.stages):
        window = min(N, audio.window_patches**2)
        blocks += [N // window * block_products(window, width, 4 * width)] * depth
        if n < last:
            merges += 2 * N * width**2
            N //= 4
    return conv, blocks, merges


def block_products(tokens: int, width: int, inner: int) -> int:
    """Multiply-adds of one transformer block over one sequence."""
    return tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
