"""Where kernels are tested: the plain path, the interpreter, and a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from flap_kernels.launch import HAS_TRITON

# Its logarithm of nothing, minus infinity, is right: a row without negatives.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
PLACES = ["plain", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def device(request, monkeypatch) -> str:
    """The device of a place; under the interpreter, kernels then serve the CPU's tensors."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    if request.param == "interpreter":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("needs Triton, and no GPU: with one the kernels are compiled")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
