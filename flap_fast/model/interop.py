"""A trained model as a folder, and back.

    FOLDER/model.safetensors   fp32 weights, this project's names
    FOLDER/config.yaml         the config it was trained with
    FOLDER/text/               the text tower's config and tokenizer

The folder needs nothing but itself; weights are safetensors, never a pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.configfile import dump_config, load_config
from flap_fast.model.flap import Flap
from flap_fast.model.text_encoder import save_text_files


def save_model(folder: Path, config: Config, model: Flap, weights: dict[str, Tensor]) -> None:
    """Write a model folder; `weights` is the whole state dict, on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.yaml").write_text(dump_config(config))
    save_text_files(config.text, model.text, folder / "text")


def model_folder(path: Path) -> Path:
    """The model folder that a path means: itself, or the last checkpoint of a run.

    Raises:
        ConfigError: neither.
    """
    if (path / "model.safetensors").is_file():
        return path
    steps = sorted(path.glob("checkpoints/step-*/state.json"))
    if not steps:
        raise ConfigError(
            "the checkpoint must be a run's folder or a folder with model.safetensors, "
            f"got '{path}'"
        )
    return max((file.parent for file in steps), key=lambda folder: int(folder.name[5:]))


def read_config(folder: Path) -> Config:
    """The config of a model folder, its text tower taken from the folder itself."""
    config = load_config(folder / "config.yaml")
    own = str(folder / "text")
    clip = config.text.encoder == "clip"
    files = {"tokenizer": own} if clip else {"folder": own, "tokenizer": "bytes"}
    text = config.text.model_copy(update=files)
    return config.model_copy(update={"text": text})


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, on the CPU."""
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{folder}/model.safetensors cannot be read: {error}") from None


def put_weights(model: Flap, folder: Path) -> None:
    """Put the weights of a model folder into a model.

    Raises:
        ConfigError: they are another model's.
    """
    saved, own = load_weights(folder), model.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(w[name].shape) if name in w else "nothing" for w in (saved, own))
        if there != here:
            raise ConfigError(
                f"{folder}/model.safetensors must hold the weights of this config's model, got "
                f"{there} for {name}, which is {here} here; use the config.yaml beside it"
            )
    model.load_state_dict(saved)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Flap, Config]:
    """Open a model folder, or a run's last checkpoint, for evaluation."""
    folder = model_folder(path)
    config = read_config(folder)
    model = Flap(config, weights=False)
    put_weights(model, folder)
    return model.to(device).eval(), config
