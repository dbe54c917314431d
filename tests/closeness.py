"""How close is close enough: as close to the truth as the plain reference is, and a rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    """The root of the mean square."""
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def worst(x: Tensor) -> float:
    """The largest absolute value."""
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_exact(
    name: str, fused: Tensor, reference: Tensor, exact: Tensor, *, slack: float
) -> None:
    """Fail when `fused` is further from `exact` than `slack` times `reference` is.

    On the whole (rms), and at its worst element: one wrong value in a million moves no mean. One
    rounding of the result to its own type is allowed on top. `exact` is float64.
    """
    assert fused.shape == exact.shape, f"{name}: shape {fused.shape}, not {exact.shape}"
    assert fused.isfinite().all(), f"{name}: not finite"
    eps = torch.finfo(fused.dtype).eps
    for norm in (rms, worst):
        budget = slack * norm(reference.double() - exact) + eps * norm(exact)
        error = norm(fused.double() - exact)
        assert error <= budget, (
            f"{name}: {norm.__name__} error {error:.2e} over budget {budget:.2e}"
        )
