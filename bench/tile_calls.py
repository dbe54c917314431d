"""The tiles that bench/tiles.py tries, and the calls that it times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from bench.tasks import D, pairs
from flap_kernels.infonce import triton_launch
from flap_kernels.infonce.backend import Targets, TileBackend, losses_and_sums
from flap_kernels.infonce.triton_launch import TritonTiled
from flap_kernels.infonce.triton_tiles import KernelName, TileShape, tile_shape

# What is tried beside the tile in use, by the types that training passes to them on a large GPU.
_OTHERS: dict[KernelName, tuple[TileShape, ...]] = {
    "sums": (
        TileShape(128, 128, 64, 4, 8, 4, 3),
        TileShape(128, 128, 64, 4, 8, 8, 3),
        TileShape(128, 256, 64, 4, 8, 8, 3),
        TileShape(128, 128, 64, 1, 8, 8, 3),
    ),
    "dlogits": (
        TileShape(128, 256, 64, 4, 8, 8, 3),
        TileShape(128, 128, 64, 1, 8, 8, 3),
        TileShape(128, 128, 64, 4, 8, 8, 3),
        TileShape(128, 128, 64, 4, 8, 4, 3),
    ),
    "sigmoid": (
        TileShape(128, 128, 64, 4, 8, 8, 3),
        TileShape(128, 128, 64, 4, 8, 4, 3),
        TileShape(128, 256, 64, 4, 8, 8, 3),
    ),
}


def candidates(arch: int, kernel: KernelName) -> list[TileShape]:
    """The tile in use first, then the others, each once."""
    in_use = tile_shape(arch, torch.bfloat16, "ieee", kernel)
    others = _OTHERS[kernel]
    if in_use.BLOCK_D == 32:  # a GPU of 99 KiB of shared memory a block
        others = tuple(replace(tile, BLOCK_D=32) for tile in others)
    return list(dict.fromkeys((in_use, *others)))


@contextmanager
def with_tile(kernel: KernelName, tile: TileShape) -> Iterator[None]:
    """Within it, this kernel is launched with this tile."""

    def chosen(arch, dtype, precision, name):
        return tile if name == kernel else tile_shape(arch, dtype, precision, name)

    with patch.object(triton_launch, "tile_shape", chosen):
        yield


def named(tile: TileShape) -> str:
    """A tile in a word, slabs included where there are several."""
    size = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_D}"
    return f"{size} w{tile.num_warps} s{tile.num_stages} slabs {tile.SLABS}"


def calls(
    size: int,
    device: str,
    *,
    width: int = D,
    backend: TileBackend | None = None,
    dtype: torch.dtype | None = None,
) -> dict[KernelName, Callable[..., Any]]:
    """A call of each kernel through its backend, with whatever tile is in use then.

    `dlogits` takes `x_wanted` and `y_wanted`: whether the library products follow. `dtype` is what
    the same numbers are turned into.
    """
    given = pairs(size, device, D=width)
    audio, text = (given[name].detach() for name in ("audio", "text"))
    numbers = (given["scale"].detach(), *(torch.tensor(x, device=device) for x in (0.5, -10.0)))
    if dtype is not None:
        audio, text = audio.to(dtype), text.to(dtype)
        numbers = tuple(x.to(dtype) for x in numbers)
    scale, half, bias = numbers
    factor = half / size
    backend, targets = backend or TritonTiled(), Targets()
    forward = backend.sums(audio, text, scale, targets)
    rows, columns = (
        losses_and_sums(sums, forward.positive_logits)[1]
        for sums in (forward.row_lse_negatives, forward.column_lse_negatives)
        if sums is not None
    )

    def dlogits(x_wanted: bool = False, y_wanted: bool = False) -> object:
        sums = rows, columns
        return backend.gradients(
            audio, text, scale, *sums, factor, targets, x_wanted=x_wanted, y_wanted=y_wanted
        )

    return {
        "sums": lambda: backend.sums(audio, text, scale, targets),
        "dlogits": dlogits,
        "sigmoid": lambda: backend.sigmoid(audio, text, scale, bias, factor, targets),
    }
