"""What a kernel must say about itself to be tested, compiled and timed.

A new kernel is one file with a `KERNEL` of this type and one line in `KERNELS`. Then
tests/kernels/test_every_kernel.py holds it to its reference, bench/static.py compiles it for each
chip, and bench/gpu.py times it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Size = Literal["edge", "odd", "paper"]
"""`edge`: the smallest legal sizes. `odd`: no size a multiple of a block. `paper`: as published."""

Arch = Literal[80, 90, 100]
"""CUDA compute capabilities that are compiled for: A100, H100/H200, B200."""

ARCHES: tuple[Arch, ...] = (80, 90, 100)


@dataclass(frozen=True)
class Inputs:
    """The keyword arguments of one call."""

    arguments: Mapping[str, Any]
    """Tensors that are not integers are float64: the tests round them to the type they try."""
    differentiable: tuple[str, ...]
    """The arguments that take gradients."""
    wide: tuple[str, ...] = ()
    """The arguments that stay float32 where the others are of a narrower type."""

    def cast(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments as fresh leaves in this type; integers and settings as they are."""
        return {name: self._leaf(name, value, dtype) for name, value in self.arguments.items()}

    def rounded(self, dtype: torch.dtype) -> Inputs:
        """The same in float64, with values that the type can hold exactly."""
        cast = {name: _as_double(value) for name, value in self.cast(dtype).items()}
        return Inputs(cast, self.differentiable, self.wide)

    def _leaf(self, name: str, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if name in self.wide and dtype.itemsize < 4:
            dtype = torch.float32
        return value.detach().to(dtype, copy=True).requires_grad_(name in self.differentiable)


def _as_double(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if narrow else value


def pointer(dtype: torch.dtype) -> str:
    """How Triton writes the type of a pointer to this one."""
    return {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}[dtype]


VARIANTS: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
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
class Kernel:
    """An op, what it means, and on what to try it."""

    name: str
    op: Callable[..., Any]
    """The public op. Returns a tensor or a tuple of tensors."""
    reference: Callable[..., Any]
    """The same in plain PyTorch, in the precision of its inputs: takes the same arguments."""
    inputs: Callable[[Size, torch.Generator], Inputs]
    """The arguments at a size, drawn from the generator and on its device."""
    programs: Callable[[Arch], tuple[Program, ...]] = field(default=lambda arch: ())
    """What the op launches on a chip at the paper's sizes."""
    slack: float = 2.0
    """How many times the reference's own rounding error is allowed."""
    bytes_moved: float = 0.0
    """Least traffic, forward and backward, at the paper's sizes in bfloat16."""
    flops: float = 0.0
    """Least arithmetic, forward and backward, at the paper's sizes."""
