"""joint.dropout: before each layer of the heads, in training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flap_fast.config import Config, Joint
from flap_fast.model.heads import LinearHead, MlpHead
from flap_fast.model.model_folder import load_weights, model_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.training.loop import train
from tests.tiny import tiny

MICRO = "train.micro_batch=4"


@pytest.mark.parametrize("kind", [MlpHead, LinearHead])
def test_a_head_drops_in_training_alone(kind: type[MlpHead | LinearHead]):
    torch.manual_seed(0)
    head, plain = (kind(1000, Joint(width=8, dropout=p)) for p in (0.3, 0.0))
    plain.load_state_dict(head.state_dict())
    x = torch.ones(4, 1000)
    assert torch.equal(head.eval()(x), plain.eval()(x))
    assert torch.equal(plain.train()(x), plain.eval()(x))
    with torch.no_grad():
        drawn = torch.stack([head.train()(x) for _ in range(300)])
    assert drawn.std(0).min() > 1e-3


def test_it_drops_what_the_layers_are_given():
    """Of the first layer's input 0.3, scaled by 1 / 0.7; of what the ReLU gives likewise."""
    torch.manual_seed(0)
    head, seen = MlpHead(1000, Joint(width=2000, dropout=0.3)).train(), []
    for layer in (head[0], head[2]):
        layer.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
    head(torch.ones(1, 1000))
    first, second = seen
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert 0.25 < (first == 0).float().mean() < 0.35
    assert 0.60 < (second == 0).float().mean() < 0.70  # half by the ReLU, 0.3 of the rest


def test_both_heads_have_it_and_their_weights_their_names():
    model = TwoTowers(tiny("joint.dropout=0.3"))
    heads = model.audio_head, model.text_head
    assert [head.dropout for head in heads] == [0.3, 0.3]  # type: ignore[union-attr]
    assert model.state_dict().keys() == TwoTowers(tiny()).state_dict().keys()


def settings(prepared: Path, runs: Path, *overrides: str) -> Config:
    data = f"run.folder={runs}", f"data.train={prepared}/train", "train.steps=3"
    return tiny(*data, "joint.dropout=0.3", "log.tensorboard=false", *overrides)


def test_a_second_pass_drops_what_the_first_did(prepared: Path, tmp_path: Path):
    """So cached gradients are right: decoding again or keeping log-mels, the same weights."""
    for name in ("keep", "decode"):
        train(settings(prepared, tmp_path, f"run.name={name}", MICRO, f"train.replay={name}"))
    kept, decoded = (load_weights(model_folder(tmp_path / name)) for name in ("keep", "decode"))
    assert all(torch.equal(kept[name], decoded[name]) for name in kept)
