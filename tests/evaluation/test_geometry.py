"""Alignment and uniformity: by hand, and by another formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.evaluation.geometry import alignment, geometry, uniformity
from flap_fast.ranks import Ranks

EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_alignment_is_the_mean_squared_distance_of_a_caption_from_its_sound():
    audio = torch.stack([EAST, NORTH])
    text = torch.stack([EAST, -NORTH, EAST])
    # Distances squared: 0 of its own sound, 4 from the opposite one, 2 across a right angle.
    assert alignment(audio, text, torch.tensor([0, 1, 1])) == 2


def test_uniformity_of_few_points_by_hand():
    assert uniformity(torch.stack([EAST, EAST]), Ranks()) == 0
    assert uniformity(torch.stack([EAST, -EAST]), Ranks()) == pytest.approx(-8, abs=1e-6)
    three = uniformity(torch.stack([EAST, NORTH, -EAST]), Ranks())
    assert three == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), abs=1e-6)
    assert uniformity(EAST[None], Ranks()) is None


def test_uniformity_is_the_published_formula_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch):
    rows = functional.normalize(torch.randn(53, 8, generator=torch.Generator().manual_seed(0)))
    published = torch.pdist(rows.double()).pow(2).mul(-2).exp().mean().log().item()
    assert uniformity(rows, Ranks()) == pytest.approx(published, abs=1e-6)
    monkeypatch.setattr("flap_fast.evaluation.geometry._TILE", 10)
    assert uniformity(rows, Ranks()) == pytest.approx(published, abs=1e-6)


def test_captions_are_needed():
    with pytest.raises(ConfigError, match="must have captions"):
        geometry(EAST[None], torch.empty(0, 2), torch.empty(0, dtype=torch.int64), modality="audio")
