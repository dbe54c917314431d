"""A teacher for the tests of plans and profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_distill import write_teacher


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a wider teacher than `tiny` is, with embeddings of 24 numbers."""
    wide = ("audio.width=192", "audio.heads=6", "audio.depth=2", "text.width=128")
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model", *wide)
