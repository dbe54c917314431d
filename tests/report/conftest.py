"""A tiny run to report on, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from flap_fast.training.loop import train
from tests.tiny import tiny


@pytest.fixture(scope="session")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = (f"data.train={prepared}/train", f"data.val={prepared}/val")
    kept = ("ckpt.every_steps=2", "eval.every_steps=2", "log.every_steps=1")
    losses = ("loss.recon.weight=1", "loss.cyclic.in_weight=0.25")
    train(tiny(f"run.folder={folder}", "run.name=a.b", *data, *kept, *losses))
    return folder / "a.b"
