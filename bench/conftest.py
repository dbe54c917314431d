"""An interpreted run is never a benchmark."""

import pytest

from flap_kernels.launch import interpreted


def pytest_configure() -> None:
    """Refuse before anything is timed."""
    if interpreted():
        pytest.exit("a benchmark must not be interpreted: unset TRITON_INTERPRET", returncode=2)
