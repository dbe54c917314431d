"""Refuses to run benchmarks under Triton's interpreter."""

import pytest

from flap_kernels.launch import interpreted


def pytest_configure() -> None:
    """Exit under Triton's interpreter, before anything is timed."""
    if interpreted():
        pytest.exit("a benchmark must not be interpreted: unset TRITON_INTERPRET", returncode=2)
