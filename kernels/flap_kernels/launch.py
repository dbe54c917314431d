"""The only import of Triton in this package, and the only launch of its kernels.

Without Triton, `jit` leaves a kernel undecorated and `tl` is empty; kernels are then never
called, since `runs_triton` says no to every tensor.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flap_kernels.cards import AMD, INTERPRETER

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton import jit

    HAS_TRITON: bool
else:
    try:
        import triton
        import triton.language as tl
        from triton import jit

        HAS_TRITON = True
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        triton, tl, HAS_TRITON = None, None, False

        def jit(function=None, **_):
            """Return the kernel unchanged."""
            return function if function is not None else jit


__all__ = [
    "HAS_TRITON",
    "capability",
    "ceil_div",
    "interpreted",
    "jit",
    "run_kernel",
    "runs_triton",
    "tl",
    "triton",
]


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), on the CPU's tensors.

    Triton reads the variable when a kernel is decorated: set it before the first import.
    """
    # The values that Triton reads as true.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def runs_triton(*tensors: Tensor) -> bool:
    """Whether the kernels support these tensors; otherwise plain PyTorch is used."""
    if not HAS_TRITON or any(x.dtype.itemsize > 4 and x.is_floating_point() for x in tensors):
        return False  # float64 is for checking, in plain PyTorch
    if interpreted():
        return all(x.device.type in ("cpu", "cuda") for x in tensors)
    return all(x.is_cuda for x in tensors)


def run_kernel(
    kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any
) -> None:
    """Launch a kernel with `x` as its first argument, on the device of `x`, the current or not."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, **options)


def ceil_div(size: int, block: int) -> int:
    """Number of blocks that cover the size."""
    return -(-size // block)


def capability(x: Tensor) -> int:
    """The GPU that kernels on this tensor run on: 90 for compute capability 9.0, see `cards`."""
    return _capability(x.device.index) if x.is_cuda and not interpreted() else INTERPRETER


@cache
def _capability(device: int) -> int:
    if torch.version.hip:  # its numbers mean other GPUs than NVIDIA's
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
