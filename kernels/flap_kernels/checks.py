"""Argument checks of the public ops; errors are one sentence with name, rule and value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, x: Tensor, shape: Sequence[int | None], legend: str) -> None:
    """Raise unless `x` has this shape; None allows any size, `legend` is the shape in letters."""
    matches = x.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not matches:
        sizes = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be {legend} = ({sizes}), got {tuple(x.shape)}")


def check_floats(**tensors: Tensor) -> None:
    """Raise unless all have a floating dtype that the ops support."""
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_integers(**tensors: Tensor) -> None:
    """Raise unless all are int32 or int64."""
    for name, x in tensors.items():
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")


# Where indices are checked: reading them would make a GPU synchronise.
CHECKED_DEVICES = ("cpu",)


def checks_values(index: Tensor) -> bool:
    """Whether the values of an index are checked."""
    return index.device.type in CHECKED_DEVICES


def check_inside(name: str, index: Tensor, N: int) -> None:
    """Raise unless all values are in [0, N), where values are checked."""
    if checks_values(index) and index.numel():
        low, high = (bound.item() for bound in index.aminmax())
        if low < 0 or high >= N:
            raise IndexError(f"{name} must be in [0, {N}), got {low} to {high}")


def clamped(name: str, index: Tensor, N: int) -> tuple[Tensor, Tensor | None]:
    """Int64 indices in [0, N), and a mask of those that were not; None if values are checked.

    On a GPU, PyTorch's own indexing of what is outside would end the process.
    """
    check_inside(name, index, N)
    index = index.long()
    if checks_values(index):
        return index, None
    return index.clamp(0, max(N - 1, 0)), (index < 0) | (index >= N)


def check_together(**tensors: Tensor) -> None:
    """Raise unless all are on one device."""
    devices = {name: x.device for name, x in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{' and '.join(devices)} must lie on one device, got {found}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_above(name: str, value: float | None, bound: float) -> None:
    """Raise unless the value is None or above the bound."""
    if value is not None and not value > bound:
        raise ValueError(f"{name} must be above {bound:g}, got {value:g}")


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward whose gradients raise where they are differentiated again.

    PyTorch's `once_differentiable` lets them pass as constants where the gradient that arrives
    needs none itself, as that of a loss.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        many = found if isinstance(found, tuple) else (found,)
        functions: Any = torch._C
        error = functions._functions.DelayedError(_ONCE, len(many))
        marked = error(*(x if x is None else x.detach().requires_grad_() for x in many))
        return tuple(m if x is not None else None for x, m in zip(many, marked, strict=True))

    return once


_ONCE = b"flap_kernels' losses have no second derivatives: differentiate them once"
