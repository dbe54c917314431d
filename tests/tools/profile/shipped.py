"""The shipped configs as a test's parameters: at once those that bring something new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flap_fast.config.file import load_config


def shipped() -> list[Any]:
    """All files; those are slow whose encoders, fusion and lengths other ones have."""
    known: set[tuple[str, str]] = set()
    found = []
    for file in sorted(Path("configs").glob("*.yaml")):
        config = load_config(file)
        has = {("media", config.encoder.encoder), ("text", config.text.encoder)}
        has |= {("fusion", config.fusion.type), ("length", config.audio.length)}
        has |= {("reconstructs", str(config.loss.recon.weight > 0))}
        found.append(
            pytest.param(file, id=file.stem, marks=pytest.mark.slow if has <= known else ())
        )
        known |= has
    return found
