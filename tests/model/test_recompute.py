"""Activation checkpointing: what is computed again, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import tiny


def step(towers: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """How often a block of each tower ran in a forward and backward pass, and the gradients."""
    config = tiny(f"train.checkpoint_activations={towers}", "audio.drop_path=0.5")
    torch.manual_seed(0)
    model = TwoTowers(config)
    runs = {"audio": 0, "text": 0}
    parts = {"audio": "audio.blocks.1.mlp", "text": "text.inner.encoder.layer.1.intermediate"}
    for tower, part in parts.items():

        def count(*_, tower=tower):
            runs[tower] += 1

        model.get_submodule(part).register_forward_pre_hook(count)
    torch.manual_seed(1)
    mel, ids = torch.randn(4, 1, 112, 128), torch.randint(5, 200, (4, 8))
    total_loss(model(mel, ids, torch.ones_like(ids)), config)["total"].backward()
    return runs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("towers", "expected"),
    [("audio", (2, 1)), ("text", (1, 2)), ("true", (2, 2)), ("decoder", (1, 1))],
)
def test_the_named_towers_are_computed_again_and_gradients_stay(towers, expected):
    _, kept = step("false")
    runs, gradients = step(towers)
    assert (runs["audio"], runs["text"]) == expected
    assert gradients.keys() == kept.keys()
    assert all(torch.equal(gradients[name], kept[name]) for name in kept)


@pytest.mark.parametrize("weights", [True, False])
def test_a_text_tower_from_a_folder_begins_in_training(weights: bool, roberta_folder: Path):
    """With dropout and recomputation, as the same tower has them when a run goes on."""
    text = f"text.folder={roberta_folder}"
    assert all(m.training for m in TwoTowers(tiny(text), weights=weights).modules())
    frozen = TwoTowers(tiny(text, "text.freeze=true"), weights=weights)
    assert not any(m.training for m in frozen.text.modules())
    assert frozen.training
