"""Where kernels are tested: the plain path, the interpreter, and a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from flap_kernels.launch import HAS_TRITON

KERNEL_PLACES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["plain", *KERNEL_PLACES])
def device(request, monkeypatch) -> Iterator[str]:
    """The device of each place; under the interpreter, kernels then serve the CPU's tensors."""
    with _device(request.param, monkeypatch) as device:
        yield device


@pytest.fixture(params=KERNEL_PLACES)
def kernel_device(request, monkeypatch) -> Iterator[str]:
    """The device of each place where kernels run, and not the plain path."""
    with _device(request.param, monkeypatch) as device:
        yield device


@contextmanager
def _device(place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if place == "cuda":
        yield "cuda"
        return
    if place == "interpreter":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("needs Triton, and no GPU: with one the kernels are compiled")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Infinities that are right, or masked: a row without negatives, a column past the end.
    with np.errstate(divide="ignore", over="ignore"):
        yield "cpu"
