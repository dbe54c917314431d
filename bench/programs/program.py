"""The programs that a kernel's op launches at the paper's sizes, for the compile report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flap_kernels.precision import Float32Precision
from flap_kernels.ragged_patch_mask import ragged_sizes

Arch = Literal[80, 86, 89, 90, 100, 120, 942]
"""GPUs that are compiled for, as in `flap_kernels.cards`: A100, RTX 30, RTX 40 and L4, H100 and
H200, B200, RTX 50; and AMD's MI300."""

ARCHES: tuple[Arch, ...] = get_args(Arch)
AMD: Arch = 942


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

OTHER_VARIANTS = tuple(name for name in VARIANTS if name != "_bf16")
"""Those of training: log-mels, and what a LayerNorm gives, are never bfloat16."""


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
    blocks: int = 1
    """Programs of one launch."""
    tile_flops: int = 0
    """Arithmetic of the product of one of them, edges counted in full."""
    trips: tuple[int, ...] = (1,)
    """Iterations of its loops that do work, in order."""


@dataclass(frozen=True)
class PaperSizes:
    """The programs of a kernel at the paper's sizes."""

    programs: Callable[[Arch], tuple[Program, ...]]
    """The programs that the op launches on a chip."""
    others: Callable[[Arch], tuple[Program, ...]] = lambda arch: ()
    """Programs at other sizes and types that training launches: smaller widths, sizes that are not
    multiples of 16, other patches."""
    bytes_moved: float = 0.0
    """Least traffic of the op, forward and backward, in training's types; 0 if not counted."""
    flops: float = 0.0
    """Least arithmetic of the op, forward and backward."""


@dataclass(frozen=True)
class Batch:
    """The log-mels of some clips and their masks, 8 patches to a column."""

    name: str
    """What begins its programs' names."""
    B: int
    """Clips, or 1: the clips of a ragged batch lie end to end."""
    T: int
    N: int
    K: int
    positions: int
    """Patches of the longest clip."""
    P: int = 16
    D: int = 768
    H: int = 512
    """Width of the decoder."""

    @property
    def bins(self) -> int:
        """Mel bins."""
        return 8 * self.P

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
WITH_CLS = Batch("cls_", 288, 1024, 513, K=307, positions=513)
"""Tokens of a clip behind its [CLS]."""
ODD = Batch("odd_", 287, 1008, 504, K=303, positions=504, D=100, H=100)
"""No size a multiple of 16 where a setting allows it: numbers are then loaded one by one."""
ODD_RAGGED = Batch("odd_ragged_", 1, 80_016, 40_008, K=24_003, positions=1000, D=100, H=100)


def _of_patch(P: int, **sizes: int) -> Batch:
    name = f"p{P}_{'odd_' if sizes else ''}"
    return Batch(name, 287, 63 * P, 504, K=303, positions=504, P=P, **sizes)


OTHER_PATCHES = (
    *(_of_patch(P) for P in (8, 10, 20, 32)),
    *(_of_patch(P, D=100, H=100) for P in (10, 20)),
)
"""One side of a patch for each power of two that holds its pixels."""


def shaped(*sizes: int) -> Tensor:
    """A contiguous tensor on the meta device, for its strides."""
    return torch.empty(sizes, device="meta")
