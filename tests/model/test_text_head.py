"""joint.text_head: the captions' projection, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from flap_fast import load
from flap_fast.checks import ConfigError
from flap_fast.data.tokenize import tokenizer
from flap_fast.interchange.clap_hf import CLAP
from flap_fast.interchange.convert import export_checkpoint
from flap_fast.interchange.layout import Export
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import HTSAT, tiny

CAPTIONS = ["a dog barks", "rain on a tin roof"]


def test_without_a_head_captions_lie_in_the_text_encoders_own_space():
    config = tiny("joint.text_head=none", "joint.width=32")
    model = TwoTowers(config).eval()
    ids, attention_mask = tokenizer(config.text)(CAPTIONS)
    pooled = model.pool_text(ids, attention_mask)
    assert torch.equal(
        model.embed_text(ids, attention_mask), functional.normalize(pooled.float(), dim=-1)
    )
    assert not [name for name in model.state_dict() if name.startswith("text_head")]


def test_a_head_is_that_of_the_encoder_or_the_one_that_is_named():
    assert isinstance(TwoTowers(tiny()).text_head, nn.Sequential)
    assert isinstance(TwoTowers(tiny("joint.text_head=linear")).text_head, nn.Linear)


def test_without_a_head_the_joint_width_is_the_text_encoders():
    with pytest.raises(
        ConfigError, match=r"joint.width must be 32, the text encoder's width, .*16"
    ):
        TwoTowers(tiny("joint.text_head=none"))


def test_such_a_model_is_saved_and_opened(tmp_path: Path):
    config = tiny("joint.text_head=none", "joint.width=32")
    model = TwoTowers(config).eval()
    save_model(tmp_path / "model", config, model, model.state_dict())
    ids, attention_mask = tokenizer(config.text)(CAPTIONS)
    opened = load(tmp_path / "model", "cpu").embed_text(CAPTIONS)
    torch.testing.assert_close(opened, model.embed_text(ids, attention_mask).detach())


def test_heads_of_two_layers_may_have_a_hidden_layer_of_another_width(tmp_path: Path):
    config = tiny("joint.hidden=24")
    model = TwoTowers(config).eval()
    for head in (model.head, model.text_head):
        assert isinstance(head, nn.Sequential)
        assert [tuple(p.shape) for p in head.parameters()] == [(24, 32), (24,), (16, 24), (16,)]
    save_model(tmp_path / "model", config, model, model.state_dict())
    opened = load(tmp_path / "model", "cpu").embed_text(CAPTIONS)
    given = tokenizer(config.text)(CAPTIONS)
    torch.testing.assert_close(opened, model.embed_text(*given).detach())


@pytest.mark.parametrize("another", ["text_head = linear", "hidden = 24"])
def test_another_projects_layout_has_no_place_for_another_head(
    another: str, roberta_folder: Path, tmp_path: Path
):
    encoders = (*HTSAT, f"text.folder={roberta_folder}", "text.pool=pooler")
    config = tiny(*encoders, f"joint.{another.replace(' ', '')}")
    model = TwoTowers(config)
    export = Export(tmp_path, config, model, model.state_dict(), {}, "")
    assert CLAP.refusal(export) == f"it has joint.{another}"
    own = TwoTowers(tiny(*encoders))
    assert CLAP.refusal(Export(tmp_path, tiny(*encoders), own, own.state_dict(), {}, "")) == ""
    save_model(tmp_path / "model", config, model, model.state_dict())
    said = export_checkpoint(tmp_path / "model", tmp_path / "hf")
    assert f"no clap_text/: it has joint.{another}" in said
