"""Where kernels are tested: the plain path, the interpreter, and a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from flap_kernels.launch import HAS_TRITON

PLACES = ["plain", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch) -> Iterator[str]:
    """The device of a place; under the interpreter, kernels then serve the CPU's tensors."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    if request.param == "interpreter":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("needs Triton, and no GPU: with one the kernels are compiled")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # The logarithm of nothing, minus infinity, is right: a row without negatives.
    with np.errstate(divide="ignore"):
        yield "cpu"
