"""A CLAP of random weights with LAION's front end, real sounds, and the record of differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder, load
from tests.tiny import as_if_trained, tiny

DEMO = Path(__file__).parents[2] / "demo"
RATE = 48_000
# HTSAT's real geometry, narrow, and CLAP's own front end: 48 kHz, 10 s, 64 bins.
SETTINGS = (
    *("audio.encoder=htsat", "audio.width=16", "audio.heads=2", "audio.depth=null"),
    *("audio.depths=[2,2,2,2]", "audio.duration_s=10", "audio.frames=1001"),
)

Largest = Callable[[str, str, float, float, str], None]
"""(peer, what, difference, bound, why it is not less): records it, and fails above the bound."""


class Clips(NamedTuple):
    """Sounds of the demo and their captions."""

    files: list[Path]
    waves: list[np.ndarray]
    """At 48 kHz, one channel."""
    captions: list[str]


@pytest.fixture
def largest(record_property: Callable[[str, object], None]) -> Largest:
    """Records a difference for `python -m tests.peers`."""

    def record(peer: str, what: str, difference: float, most: float, why: str) -> None:
        record_property("difference", (peer, what, f"{difference:.1e}", f"{most:.0e}", why))
        assert difference <= most, f"{peer}, {what}: {difference:.2e} over {most:.0e}"

    return record


@pytest.fixture(scope="session")
def clips() -> Clips:
    """12 sounds of the demo from all of it, none longer than 10 s."""
    rows = [json.loads(line) for line in (DEMO / "manifest.jsonl").read_text().splitlines()]
    found: dict[str, tuple[Path, np.ndarray, str]] = {}
    for row in rows[::45]:
        file, caption = DEMO / row["audio"], row.get("caption") or row["captions"][0]
        wave = read_sound(file, RATE)
        if len(wave) <= 10 * RATE and caption not in found and len(found) < 12:
            found[caption] = file, wave, caption
    assert len(found) == 12
    files, waves, captions = zip(*found.values(), strict=True)
    return Clips(list(files), list(waves), list(captions))


class Clap(NamedTuple):
    """A model of random weights."""

    folder: Path
    opened: Embedder


def made(folder: Path, text: Path, *, rounded: bool) -> Clap:
    """Write a model of random weights and statistics, and open it."""
    own = (f"audio.int16_roundtrip={rounded}".lower(), f"text.folder={text}")
    config = tiny(*SETTINGS, *own)
    torch.manual_seed(0)
    model = TwoTowers(config).eval()
    as_if_trained(model)
    save_model(folder, config, model, model.state_dict())
    return Clap(folder, load(folder, "cpu"))


@pytest.fixture(scope="session")
def exact(roberta_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Clap:
    """One that takes samples as they are, as transformers does."""
    return made(tmp_path_factory.mktemp("exact"), roberta_folder, rounded=False)


@pytest.fixture(scope="session")
def rounded(roberta_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Clap:
    """The same, but that it rounds samples to 16 bits, as LAION-CLAP does."""
    return made(tmp_path_factory.mktemp("rounded"), roberta_folder, rounded=True)
