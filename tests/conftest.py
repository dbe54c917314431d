"""What many tests share: a synthetic corpus and its shards, written once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.sounds import write_corpus

# Before torch is imported: many small tests on few cores are faster without its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 30 sounds, the last 6 of them for validation."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 30, val=6)


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as shards of 7 clips: OUT/train/{0..3}.tar, OUT/val/0.tar."""
    from flap_fast.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(corpus, out, shard_clips=7, threads=2, show=False)
    return out
