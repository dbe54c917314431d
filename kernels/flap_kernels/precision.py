"""The dtypes of products and of accumulators, on every device.

total = beta * total + alpha * a @ b          summed in total's type, whatever a and b are
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from flap_kernels.launch import interpreted

Float32Precision = Literal["ieee", "tf32"]
"""How float32 factors are multiplied: in full precision, or rounded to TF32 for tensor cores."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype for inputs of this dtype: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a product's factors are rounded to: autocast's, if it is on."""
    device = weight.device.type
    # The meta device has no autocast, and asking for its state raises.
    narrow = device != "meta" and weight.dtype.itemsize <= 4 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if narrow else weight.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast on this device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def float32_products(precision: Float32Precision) -> Iterator[None]:
    """A context in which the library's float32 products on a GPU have this precision.

    The earlier setting is restored on exit.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def float32_precision() -> Float32Precision:
    """The float32 precision of a kernel's products: the setting of PyTorch's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1, alpha: int = 1) -> Tensor:
    """Compute `total = beta * total + alpha * a @ b` in place, beta 0 or 1; returns `total`.

    With `beta=0` what `total` holds is not read. On a GPU a product of bfloat16 is summed onto
    float32 without rounding; on a CPU, where PyTorch has no such product, it is rounded first.
    """
    if a.dtype == total.dtype:
        return torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    if a.is_cuda and total.dtype == torch.float32:
        if _adds_to_float32(a.dtype, a.device):
            kept = {"out_dtype": total.dtype, "beta": beta, "alpha": alpha}
            return torch.addmm(total, a, b, **kept, out=total)
        product = torch.mm(a, b, out_dtype=total.dtype)
    elif interpreted() and total.dtype == torch.float32:  # it stands in for a GPU
        return torch.addmm(total, a.float(), b.float(), beta=beta, alpha=alpha, out=total)
    else:
        product = torch.mm(a, b)
    return total.add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=total)


@cache
def _adds_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU's `addmm` adds a product of narrow factors to float32, as of torch 2.14.1.

    Tried once on a few numbers: earlier versions refuse it, and the product then takes memory of
    its own before it is added.
    """
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, narrow, narrow, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
