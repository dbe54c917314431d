"""A model of this project in the form of a transformers folder, and back.

    OUT/config.json          "model_type": "flap", and the whole config
    OUT/model.safetensors    this project's names
    OUT/text/                the text tower's config and tokenizer
    OUT/clap_text/           a RoBERTa and its head as a `ClapTextModelWithProjection`

Source: SPEC 12.2.
"""

from __future__ import annotations

import json
from pathlib import Path

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.config.file import parse_config
from flap_fast.interchange.clap_hf import (
    clap_text_config,
    read_json,
    text_to_clap,
    why_no_clap_text,
)
from flap_fast.interchange.tensors import Tensors, read_tensors
from flap_fast.model.model_folder import save_tensors, save_text_files, with_text
from flap_fast.model.two_towers import TwoTowers

MODEL_TYPE = "flap"


def write_flap(folder: Path, config: Config, model: TwoTowers, weights: Tensors) -> str:
    """Write the folder; gives why it has no clap_text/, empty if it has."""
    tree = {"model_type": MODEL_TYPE, "architectures": ["Flap"]}
    tree["config"] = config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    save_tensors(folder / "model.safetensors", weights)
    save_text_files(config, model, folder / "text")
    encoder = getattr(model.text.inner, "config", None)  # CLIP's tower has none
    why_not = why_no_clap_text(config, encoder)
    if not why_not:
        text = folder / "clap_text"
        save_text_files(config, model, text)
        theirs = clap_text_config(config, encoder)
        theirs.architectures = ["ClapTextModelWithProjection"]
        theirs.to_json_file(text / "config.json", use_diff=False)
        save_tensors(text / "model.safetensors", text_to_clap(weights))
    return why_not


def read_flap(folder: Path) -> tuple[Tensors, Config]:
    """Its tensors and its config, the text tower's folder being its own."""
    file = folder / "config.json"
    tree = read_json(file).get("config")
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold the model's config, got {tree!r}")
    weights = folder / "model.safetensors"
    require(weights.is_file(), str(folder), f"hold {weights.name}", "none")
    return read_tensors(weights), with_text(parse_config(tree), folder / "text")
