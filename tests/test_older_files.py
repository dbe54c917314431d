"""What earlier versions wrote still opens; `tests/older/` was written by the version of bc983ae."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config, parse_config
from flap_fast.model.model_folder import load_model

OLDER = Path(__file__).parent / "older"
CONFIGS = Path(__file__).parents[1] / "configs"
WRITTEN = [json.loads(line) for line in (OLDER / "configs.jsonl").read_text().splitlines()]
INPUTS = {"vit": (2, 1, 112, 128), "htsat": (2, 4, 101, 16), "clip": (2, 3, 32, 32)}
# What has become of all files since, and of one, undone.
SINCE_IN_ALL = ("loss.contrastive.precision=ieee",)
SINCE = {
    "demo": (
        *("audio.length=fixed", "audio.max_duration_s=30", "audio.use_cls=true"),
        *("sched.warmup_steps=30", "eval.crop=random"),
    )
}


@pytest.mark.parametrize("written", WRITTEN, ids=lambda written: written["name"])
def test_a_config_that_was_written_out_in_full_means_what_its_file_means(written):
    """As runs and checkpoints keep it: with every setting, also those of other encoders."""
    name = written["name"]
    config = load_config(CONFIGS / f"{name}.yaml", [*SINCE_IN_ALL, *SINCE.get(name, ())])
    assert parse_config(written["config"]) == config


@pytest.mark.parametrize("name", INPUTS)
def test_a_checkpoint_gives_the_embeddings_that_it_gave(name: str):
    model, config = load_model(OLDER / name)
    assert config.encoder.encoder == {"clip": "resnet50"}.get(name, name)
    torch.manual_seed(2)
    media = torch.randn(INPUTS[name])
    ids = torch.tensor([[5, 6, 7, 1], [9, 1, 0, 0]])
    longer = torch.tensor([True, False]) if config.fusion.on else None
    wanted = json.loads((OLDER / name / "embeddings.json").read_text())
    with torch.no_grad():
        found = {
            "media": model.embed_media(media, longer=longer),
            "text": model.embed_text(ids, (ids != 0).long()),
        }
    for side, rows in found.items():
        torch.testing.assert_close(rows, torch.tensor(wanted[side]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_a_config_of_another_size_is_refused_before_the_memory_is_taken(name: str, tmp_path: Path):
    folder = shutil.copytree(OLDER / name, tmp_path / name)
    file = folder / "config.yaml"
    section = "image" if name == "clip" else "audio"
    before, found, after = file.read_text().partition(f"\n{section}:\n")
    after = re.sub(r"\n  width: \d+", "\n  width: 8388608", after, count=1)
    file.write_text(before + found + after)
    with pytest.raises(ConfigError, match=r"must hold the weights of this config's model"):
        load_model(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [("max_tokens: banana", "text.max_tokens must be"), ("no_such: 1", "no_such is not a setting")],
)
def test_a_wrong_value_in_a_models_config_names_the_file(line: str, message: str, tmp_path: Path):
    folder = shutil.copytree(OLDER / "vit", tmp_path / "vit")
    file = folder / "config.yaml"
    file.write_text(re.sub(r"max_tokens: \d+", line, file.read_text()))
    with pytest.raises(ConfigError, match=f"^{file}: .*{message}"):
        load_model(folder)
