"""Weights of a folder of transformers': what is damaged is named, not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from flap_fast.checks import ConfigError
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.settings import RobertaSettings

NAME = "encoder.layer.0.output.dense.weight"
LAST = "pooler.dense.bias"
FILES = ("model.safetensors", "pytorch_model.bin")
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    return tmp_path


def opened(folder: Path, pool: str = "pooler") -> TransformersText:
    return TransformersText(RobertaSettings(folder=str(folder), pool=pool, max_tokens=16))  # type: ignore[arg-type]


def rewritten(folder: Path, name: str, change: Callable[[Weights], Weights]) -> Weights:
    """The folder's weights changed, in a file of this name."""
    old = folder / "model.safetensors"
    weights = change(load_file(old))
    old.unlink()
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name, {"format": "pt"})
    return weights


CHANGES: list[tuple[Callable[[Weights], Weights], str]] = [
    (lambda w: w | {NAME: w[NAME] * float("nan")}, f"with {NAME} with values that are not finite"),
    (lambda w: w | {LAST: w[LAST] - float("inf")}, f"with {LAST} with values that are not finite"),
    (lambda w: w | {NAME: (w[NAME] * 99).to(torch.int8)}, f"with {NAME} as int8, which must be"),
    (lambda w: w | {NAME: w[NAME] > 0}, f"with {NAME} as bool, which must be float32"),
    (lambda w: {"roberta." + n: v.long() for n, v in w.items()}, r"with roberta\.\S+ as int64"),
    (lambda w: w | {NAME: w[NAME][:4].clone()}, rf"with {NAME} of \(4, 32\), which is \(16, 32\)"),
    (lambda w: {n: v for n, v in w.items() if n != NAME}, f"without {NAME};"),
    (lambda w: {n: v for n, v in w.items() if "layer" not in n}, r"without encoder\S+ and 15 oth"),
    (lambda w: {"other": torch.zeros(2)}, r"without \S+ and \d+ others"),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_weight_that_is_not_the_encoders_is_named(
    change: Callable[[Weights], Weights], message: str, file: str, folder: Path
):
    rewritten(folder, file, change)
    with pytest.raises(ConfigError, match=f"^text.folder must hold the weights.* {message}"):
        opened(folder)


KEPT: list[Callable[[Weights], Weights]] = [
    lambda w: w,
    lambda w: {name: value.bfloat16() for name, value in w.items()},
    lambda w: {"roberta." + name: value for name, value in w.items()},
    lambda w: (
        w | {"embeddings.position_ids": torch.arange(40)[None], "lm_head.bias": torch.ones(5)}
    ),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", KEPT)
def test_whole_weights_are_taken(change: Callable[[Weights], Weights], file: str, folder: Path):
    found = rewritten(folder, file, change)
    wanted = next(value for name, value in found.items() if name.endswith(NAME))
    assert torch.equal(opened(folder).inner.get_parameter(NAME), wanted.float())


def test_a_masked_language_models_weights_have_no_pooler(folder: Path):
    rewritten(folder, FILES[0], lambda w: {n: v for n, v in w.items() if "pooler" not in n})
    assert opened(folder).inner.pooler.dense.weight.isfinite().all()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [0, 1, 50, 700, -100])
def test_a_damaged_file_of_weights_is_one_sentence(keep: int, file: str, folder: Path):
    rewritten(folder, file, lambda w: w)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    with pytest.raises(ConfigError, match=r"^text\.folder must hold an encoder, got '.*': .") as e:
        opened(folder)
    assert "\n" not in str(e.value)


def test_weights_in_several_files_are_checked_in_each(folder: Path):
    weights = load_file(folder / FILES[0])
    (folder / FILES[0]).unlink()
    parts = {f"model-0000{n}-of-00002.safetensors": names for n, names in enumerate(
        (sorted(weights)[::2], sorted(weights)[1::2]), 1)}  # fmt: skip
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    where = {name: file for file, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    opened(folder)
    bad = {n: weights[n].int() if n == NAME else weights[n] for n in parts[where[NAME]]}
    save_file(bad, folder / where[NAME], {"format": "pt"})
    with pytest.raises(ConfigError, match=f"with {NAME} as int32"):
        opened(folder)
