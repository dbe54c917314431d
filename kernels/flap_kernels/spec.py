"""The record of a kernel: its op, its reference implementation, and their test inputs.

A new kernel is one file with a `KERNEL` of this type and one line in `KERNELS`. In the repository,
tests/kernels/test_every_kernel.py then holds it to its reference and asks for its programs in
bench/programs/; with those, bench/static.py compiles it for each chip and bench/gpu.py times it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Size = Literal["edge", "odd", "paper"]
"""`edge`: the smallest legal sizes. `odd`: no size a multiple of a block. `paper`: as published."""


@dataclass(frozen=True)
class Inputs:
    """The keyword arguments of one call."""

    arguments: Mapping[str, Any]
    """Tensors that are not integers are float64; tests round them to the dtype under test."""
    differentiable: tuple[str, ...]
    """The arguments that require gradients."""
    float32: tuple[str, ...] = ()
    """The arguments that stay float32 if the others have a narrower dtype."""

    def cast(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments as new leaves in this dtype; integers and settings unchanged."""
        return {name: self._leaf(name, value, dtype) for name, value in self.arguments.items()}

    def rounded(self, dtype: torch.dtype) -> Inputs:
        """The inputs in float64, rounded to values that are exact in this dtype."""
        cast = {name: _as_double(value) for name, value in self.cast(dtype).items()}
        return Inputs(cast, self.differentiable, self.float32)

    def _leaf(self, name: str, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if name in self.float32 and dtype.itemsize < 4:
            dtype = torch.float32
        return value.detach().to(dtype, copy=True).requires_grad_(name in self.differentiable)


def _as_double(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if narrow else value


@dataclass(frozen=True)
class Kernel:
    """An op, its reference implementation and its test inputs."""

    name: str
    op: Callable[..., Any]
    """The public op. Returns a tensor or a tuple of tensors."""
    reference: Callable[..., Any]
    """The reference in plain PyTorch, in the precision of its inputs; takes the same arguments."""
    inputs: Callable[[Size, torch.Generator], Inputs]
    """The arguments at a size, drawn from the generator and on its device."""
    slack: float = 2.0
    """How many times the reference's own rounding error is allowed."""
