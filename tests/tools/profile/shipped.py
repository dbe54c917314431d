"""The shipped configs as a test's parameters: of each kind one at once, the others are slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flap_fast.config.file import load_config


def shipped() -> list[Any]:
    """All files; those are slow of whose encoders, fusion and losses another one is."""
    kinds: set[tuple] = set()
    found = []
    for file in sorted(Path("configs").glob("*.yaml")):
        config = load_config(file)
        encoders = config.encoder.encoder, config.text.encoder
        kind = (*encoders, config.fusion.type, config.audio.length, *config.loss.active)
        marks = pytest.mark.slow if kind in kinds else ()
        found.append(pytest.param(file, id=file.stem, marks=marks))
        kinds.add(kind)
    return found
