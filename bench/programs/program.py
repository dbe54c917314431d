"""The programs that a kernel's op launches at the paper's sizes, for the compile report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flap_kernels.precision import Float32Precision
from flap_kernels.ragged_patch_mask import ragged_sizes

Arch = Literal[80, 90, 100]
"""CUDA compute capabilities that are compiled for: A100, H100/H200, B200."""

ARCHES: tuple[Arch, ...] = (80, 90, 100)


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for the type of a pointer to this type."""
    return {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}[dtype]


VARIANTS: dict[str, tuple[torch.dtype, torch.dtype, Float32Precision]] = {
    "": (torch.float32, torch.bfloat16, "ieee"),
    "_bf16": (torch.bfloat16, torch.bfloat16, "ieee"),
    "_tf32": (torch.float32, torch.float32, "tf32"),
    "_float32": (torch.float32, torch.float32, "ieee"),
}
"""Programs of one kernel by the end of their name: the type of its arguments, that of its product
and the product's precision. The first is autocast's, which training runs."""


@dataclass(frozen=True)
class Program:
    """One Triton kernel at fixed block sizes, as bench/static.py compiles it."""

    name: str
    kernel: Any
    """The `@jit` function."""
    signature: Mapping[str, str | int]
    """Each run-time argument by name: its type as Triton writes it (`*bf16`, `fp32`), or, of an
    integer, its value at the paper's sizes, since launches specialise on 1 and multiples of 16."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument."""
    num_warps: int = 4
    num_stages: int = 3
    matrix_product: bool = False
    """Whether tensor-core instructions must show in the machine code."""
    bytes_moved: float = 0.0
    """Least traffic of one launch at the paper's sizes."""
    flops: float = 0.0
    """Arithmetic of one launch at the paper's sizes, 2 for a multiply-add."""


@dataclass(frozen=True)
class PaperSizes:
    """The programs of a kernel at the paper's sizes."""

    programs: Callable[[Arch], tuple[Program, ...]]
    """The programs that the op launches on a chip."""
    bytes_moved: float = 0.0
    """Least traffic of the op, forward and backward, in bfloat16; 0 where it is not counted."""
    flops: float = 0.0
    """Least arithmetic of the op, forward and backward."""


@dataclass(frozen=True)
class Batch:
    """The log-mels of 288 clips and their masks, of patches of 16 x 16, 8 to a column."""

    name: str
    """What begins its programs' names."""
    B: int
    """Clips, or 1: the clips of a ragged batch lie end to end."""
    T: int
    N: int
    K: int
    positions: int
    """Patches of the longest clip."""

    @property
    def M(self) -> int:
        """Dropped patches."""
        return self.N - self.K

    @property
    def ragged(self) -> bool:
        """Whether tokens name their positions, and rows have weights."""
        return self.B == 1


def _ragged() -> Batch:
    columns, rows, keep_columns = ragged_sizes("paper")
    N, T = rows * sum(columns), 16 * sum(columns)
    return Batch("ragged_", 1, T, N, K=6 * sum(keep_columns), positions=rows * max(columns))


FIXED = Batch("", 288, 1024, 512, K=306, positions=512)
RAGGED = _ragged()


def shaped(*sizes: int) -> Tensor:
    """A contiguous tensor on the meta device, for its strides."""
    return torch.empty(sizes, device="meta")
