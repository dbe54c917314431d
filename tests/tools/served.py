"""A small model and a folder of sounds, for tests of `flap serve`."""

from __future__ import annotations

from pathlib import Path

import torch

from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder, load
from flap_fast.tools.search import Index, find_sounds, plan_update, update_index
from flap_fast.tools.windows import window_policy
from tests.sounds import encode, noise
from tests.tiny import tiny

RATE = 16_000
HOSTILE = "<img src=x onerror=document.body.remove()>&'\"\u202e.wav"
"""A name that a page must show as it is."""


def write_sounds(folder: Path) -> Path:
    """25 sounds of 0.5 to 3 s; returns the folder."""
    folder.mkdir()
    for n in range(25):
        wave = noise(n, 0.5 + n / 10, RATE, slope=n - 12)
        (folder / (HOSTILE if n == 24 else f"{n:02d}.wav")).write_bytes(encode(wave, RATE, "WAV"))
    return folder


def write_model(folder: Path) -> Path:
    """A model with random weights; returns its folder."""
    config = tiny("frontend.threads=1")
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def opened(model: Path, folder: Path, crop: str | None = None) -> tuple[Embedder, Index]:
    """The model, and the index of the folder: without crops, of windows of 1 s every 0.5 s."""
    embedder = load(model)
    policy = crop or window_policy("1", embedder.config)
    file = folder / ".flap-index-windows"
    plan = plan_update(file, embedder, find_sounds([folder]), policy)
    return embedder, update_index(file, embedder, plan, crop=policy)
