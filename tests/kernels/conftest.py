"""Where kernels are tested: plain PyTorch, the interpreter, and a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from flap_kernels.launch import HAS_TRITON

KERNEL_MODES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["plain", *KERNEL_MODES])
def device(request, monkeypatch) -> Iterator[str]:
    """The device of each mode; under the interpreter, kernels then serve the CPU's tensors."""
    with _device(request.param, monkeypatch) as device:
        yield device


@pytest.fixture(params=KERNEL_MODES)
def kernel_device(request, monkeypatch) -> Iterator[str]:
    """The device of each mode where kernels run, and not plain PyTorch."""
    with _device(request.param, monkeypatch) as device:
        yield device


@contextmanager
def _device(mode: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if mode == "cuda":
        yield "cuda"
        return
    if mode == "interpreter":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("needs Triton, and no GPU: with one the kernels are compiled")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Infinities that are right, or masked: a row without negatives, a column past the end.
    with np.errstate(divide="ignore", over="ignore"):
        yield "cpu"
