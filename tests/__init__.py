"""The tests. Before any of them is imported: kernels are decorated for Triton's interpreter.

Without a GPU, that is. Triton reads the variable when it is imported; it is put back at once, so
that a test runs the plain path unless it asks for the interpreter, as tests/kernels does.
"""

from __future__ import annotations

import os

# Before torch is imported: many small tests on few cores are faster without its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    _before = os.environ.get("TRITON_INTERPRET", "0")
    os.environ["TRITON_INTERPRET"] = "1"
    import flap_kernels  # noqa: F401 -- imported for its decorators

    os.environ["TRITON_INTERPRET"] = _before

    from flap_kernels.launch import HAS_TRITON
    from tests.interpreter import patch_once

    if HAS_TRITON:
        patch_once()
