"""The dtypes of products and of accumulators, on every device.

total = beta * total + alpha * a @ b          summed in total's type, whatever a and b are
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

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

    On exit the setting is what it was: a value of its own, or inherited from
    `torch.backends.fp32_precision` and followed again. PyTorch has one setting for all threads.
    """
    before = _own_precision("cuda", "matmul")
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# Whose value a setting has while its own is "none".
_PARENTS = {("cuda", "matmul"): ("cuda", "all"), ("cuda", "all"): ("generic", "all")}


def _own_precision(backend: str, op: str) -> str:
    """The precision that was set here, "none" if it is inherited; getters do not tell these apart.

    Only where the value equals the parent's must the parent be changed for a moment, to see whether
    the value follows. The legacy switches (`allow_tf32`, `torch.set_float32_matmul_precision`) set
    this value too, and a copy, which stays untouched here.
    """
    get, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    value, parent = get(backend, op), _PARENTS.get((backend, op))
    if parent is None or value == "none" or value != get(*parent):
        return value
    own_of_parent = _own_precision(*parent)
    set_(*parent, "ieee" if value == "tf32" else "tf32")
    try:
        inherited = get(backend, op) != value
    finally:
        set_(*parent, own_of_parent)
    return "none" if inherited else value


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
    if total.dtype == torch.float32 and (a.is_cuda or interpreted()):
        has = _narrow_product(a)
        if has == "addmm":
            kept = {"out_dtype": total.dtype, "beta": beta, "alpha": alpha}
            return torch.addmm(total, a, b, **kept, out=total)
        if has == "upcast":
            return torch.addmm(total, a.float(), b.float(), beta=beta, alpha=alpha, out=total)
        product = torch.mm(a, b, out_dtype=total.dtype)
    else:
        product = torch.mm(a, b)
    return total.add_(product, alpha=alpha) if beta else torch.mul(product, alpha, out=total)


NarrowProduct = Literal["addmm", "mm", "upcast"]
"""What gives a float32 product of narrower factors: `addmm`, which adds it too; `mm`, whose product
takes memory of its own before it is added; or copies of the factors in float32."""

# By the factors' dtype and device, as tried.
_NARROW_PRODUCTS: dict[tuple[torch.dtype, torch.device], NarrowProduct] = {}


def _narrow_product(a: Tensor) -> NarrowProduct:
    """The best that this PyTorch has for factors like `a`, tried once on a few numbers.

    CUDA builds from 2.11 on have `addmm`; others (ROCm's) may refuse it, or `mm`, or both. Nothing
    is tried where it would say nothing or do harm: a copy serves there, exact on every device.
    """
    # Fake tensors accept what the device refuses, or the reverse: 2.11 cannot trace `addmm`.
    if not a.is_cuda or torch.compiler.is_compiling() or isinstance(a, FakeTensor):
        return "upcast"
    key = a.dtype, a.device
    if key not in _NARROW_PRODUCTS:
        # A graph would replay the trial, and a failure in it may end the capture.
        if torch.cuda.is_current_stream_capturing():
            return "upcast"
        _NARROW_PRODUCTS[key] = _tried(*key)
    return _NARROW_PRODUCTS[key]


def _tried(dtype: torch.dtype, device: torch.device) -> NarrowProduct:
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    trials: dict[NarrowProduct, Callable[[], Tensor]] = {
        "addmm": lambda: torch.addmm(total, narrow, narrow, out_dtype=total.dtype, out=total),
        "mm": lambda: torch.mm(narrow, narrow, out_dtype=total.dtype),
    }
    for name, trial in trials.items():
        try:
            trial()
        except torch.OutOfMemoryError:
            raise  # says nothing of what there is
        except (RuntimeError, TypeError):
            continue
        return name
    return "upcast"
