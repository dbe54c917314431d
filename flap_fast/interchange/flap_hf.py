"""Layout of this project's models as a transformers folder.

OUT/config.json          "model_type": "flap", and the whole config
OUT/config.yaml ...      a model folder, which opens as it is
OUT/clap_text/           a RoBERTa and its head as a `ClapTextModelWithProjection`
"""

from __future__ import annotations

import json
from pathlib import Path

from flap_fast.checks import ConfigError, require
from flap_fast.checksums import write_sums
from flap_fast.config.file import dump_config, parse_config
from flap_fast.interchange.clap_hf import CLAP, clap_text_config, why_no_clap_text
from flap_fast.interchange.clap_names import text_to_clap
from flap_fast.interchange.layout import Export, Imported, Layout, Source
from flap_fast.interchange.tensors import read_json, read_tensors
from flap_fast.model.model_folder import save_text_files, with_text
from flap_fast.tensors import save_tensors

_MODEL_TYPE = "flap"


def _write(export: Export, folder: Path) -> str:
    config = export.config.shareable()
    save_tensors(folder / "model.safetensors", export.weights)
    save_text_files(export.config, export.model, folder / "text")
    (folder / "config.yaml").write_text(dump_config(config))
    write_sums(folder)  # of the model; what comes now is for others
    tree = {"model_type": _MODEL_TYPE, "architectures": ["Flap"]}
    tree["config"] = config.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    written = f"a FLAP's folder ({CLAP.refusal(export)})"
    if why_not := why_no_clap_text(export):
        return f"{written}; no clap_text/: {why_not}"
    text = folder / "clap_text"
    save_text_files(export.config, export.model, text)
    theirs = clap_text_config(config, export.text_config)
    theirs.architectures = ["ClapTextModelWithProjection"]
    theirs.to_json_file(text / "config.json", use_diff=False)
    save_tensors(text / "model.safetensors", text_to_clap(export.weights))
    return f"{written}; clap_text/ is its text side"


def _read(source: Source) -> Imported:
    overrides = " ".join(source.overrides)
    file, weights = (source.path / name for name in ("config.json", "model.safetensors"))
    tree = read_json(file).get("config")
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold the model's config, got {tree!r}")
    require(weights.is_file(), str(source.path), f"hold {weights.name}", "none")
    config = with_text(parse_config(tree), source.path / "text")
    tensors = read_tensors(weights)
    require(not overrides, "NAME=VALUE", "be left out for a FLAP's folder", overrides)
    return Imported(config, tensors)


FLAP = Layout(
    names=_MODEL_TYPE,
    form="folder",
    matches=lambda source: source.model_type == _MODEL_TYPE,
    read=_read,
    write=_write,
    own_heads=False,
    holds_bias=True,
)
