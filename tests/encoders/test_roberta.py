"""A text encoder from a folder: what the settings ask of it, whatever transformers calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

from flap_fast.checks import ConfigError
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.settings import RobertaSettings

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 1,
}
MARKS: dict[str, Any] = {f"{mark}_token_id": 2 for mark in ("bos", "eos", "cls", "sep")}
CONFIGS = {
    "distilbert": DistilBertConfig(vocab_size=90, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "modernbert": ModernBertConfig(**(SMALL | MARKS)),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2),
    "bert": BertConfig(**SMALL, max_position_embeddings=20),
    "roberta": RobertaConfig(**SMALL, max_position_embeddings=22),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for name, config in CONFIGS.items():
        AutoModel.from_config(config).save_pretrained(root / name)
    return root


def tower(folder: Path, **settings) -> TransformersText:
    return TransformersText(RobertaSettings(folder=str(folder), pool="mean", **settings))


def tokens(length: int, padded: int) -> tuple[Tensor, Tensor]:
    """One caption."""
    mask = (torch.arange(padded) < length).long()[None]
    return torch.where(mask == 1, 3 + torch.arange(padded) % 80, 1), mask


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_dropout_is_set_whatever_an_encoder_calls_it(family: str, folders: Path):
    ids, mask = tokens(8, 8)
    model = tower(folders / family, dropout=0.3)
    assert not torch.allclose(model(ids, mask), model(ids, mask))
    model = tower(folders / family, dropout=0.0)
    assert torch.equal(model(ids, mask), model(ids, mask))


def test_an_encoder_whose_dropouts_are_unknown_serves_without(folders: Path):
    """SimCSE, which needs some, never gets one whose two views would be the same."""
    with pytest.raises(ConfigError, match=r"text\.dropout must be 0 for 'gpt2', .*set text\.dropo"):
        tower(folders / "gpt2", dropout=0.1)
    assert tower(folders / "gpt2", dropout=0.0)(*tokens(8, 8)).shape == (1, 32)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_captions_are_no_longer_than_the_table_of_positions(family: str, folders: Path):
    """20 of them; batches are padded beyond it."""
    packed = tower(folders / family, packing="packed", max_tokens=20).eval()
    found = packed(*tokens(20, 24))
    packed.packing = "padded"
    torch.testing.assert_close(packed(*tokens(20, 24)), found, rtol=1e-5, atol=1e-5)
    rule = r"text\.max_tokens must be at most 20, .*, got 21; set text\.max_tokens=20"
    with pytest.raises(ConfigError, match=rule):
        tower(folders / family, max_tokens=21)
