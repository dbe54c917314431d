"""Writes and reads a trained model as a folder.

    FOLDER/model.safetensors   fp32 weights, this project's names
    FOLDER/config.yaml         the config it was trained with
    FOLDER/text/               the text tower's config and tokenizer
    FOLDER/SHA256SUMS          what the files were when they were written

The folder needs nothing but itself; weights are safetensors, never a pickle. An audio tower alone
(`flap import` makes one of AudioMAE's) is a folder with audio.safetensors instead, and with
classes.txt if it has a classifier.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.checksums import SUMS, verified, write_sums
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config, parse_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.hub import local_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tensors import fault, load_tensors, save_tensors

# The weights of only an audio tower, and of AudioMAE's decoder if requested.
TOWER = "audio.safetensors"
# The names of the classes that its classifier scores, a line each.
CLASSES = "classes.txt"
# What only training reads, in a checkpoint: the optimizer's state; the weights themselves where
# model.safetensors is their average, or has adapters merged; their average before the merge.
OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained.safetensors"
AVERAGE = "average.safetensors"
ONLY_TRAINING = (OPTIMIZER, TRAINED, AVERAGE)
_POSITIONS = ".pos_embed"
_COPY = "copy it again"


def save_model(
    folder: Path,
    config: Config,
    model: TwoTowers,
    weights: dict[str, Tensor],
    *,
    sums: bool = True,
) -> None:
    """Write a model folder; `weights` is the whole state dict, on the CPU.

    Args:
        sums: write SHA256SUMS too; False where the caller adds files first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)  # of the files that are overwritten now
    save_tensors(folder / "model.safetensors", weights)
    (folder / "config.yaml").write_text(dump_config(config))
    save_text_files(config, model, folder / "text")
    if sums:
        write_sums(folder)


def save_text_files(config: Config, model: TwoTowers, folder: Path) -> None:
    """Write the text encoder's config and tokenizer, which suffice to open a checkpoint."""
    model.text.save_config(folder)  # type: ignore[operator]
    tokenizer(config.text).inner.save_pretrained(folder)


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, the last checkpoint of a run, the Hub's.

    Raises:
        ConfigError: none of them.
    """
    path = local_folder(path)
    if (path / "model.safetensors").is_file():
        theirs = (path / "config.json").is_file() and not (path / "config.yaml").is_file()
        rule, remedy = "be this project's model", f"flap import {path} OUT makes it one"
        require(not theirs, "the checkpoint", rule, path, remedy)
        return path
    if (path / TOWER).is_file():
        raise ConfigError(
            f"the checkpoint must be a whole model, got '{path}', an audio tower; train from it "
            f"with train.init_audio_from={path}"
        )
    steps = step_folders(path / "checkpoints")
    if not steps:
        raise ConfigError(
            "the checkpoint must be a run's folder or a folder with model.safetensors, "
            f"got '{path}'"
        )
    return steps[-1]


def step_folders(checkpoints: Path) -> list[Path]:
    """The complete checkpoints of a run, by their steps; a copy under another name is none."""
    found = (file.parent for file in checkpoints.glob("step-*/state.json"))
    whole = (folder for folder in found if re.fullmatch(r"step-\d+", folder.name))
    return sorted(whole, key=step_of)


def step_of(folder: Path) -> int:
    """The steps of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def read_config(folder: Path) -> Config:
    """The config of a model folder: its text tower is the folder's, adapters are merged.

    Raises:
        ConfigError: a file is missing or no config.
    """
    # Without it, transformers takes another tokenizer's settings.
    file = folder / "text" / "tokenizer_config.json"
    require(file.is_file(), str(file.parent), f"hold {file.name}", "none", _COPY)
    file = folder / "config.yaml"
    try:
        return _merged(with_text(load_config(file), folder / "text"))
    except ConfigError as error:
        named = (
            line if str(file) in line else f"{file}: {line}" for line in str(error).split("\n")
        )
        raise ConfigError("\n".join(named)) from None


def with_text(config: Config, folder: Path) -> Config:
    """A config whose text encoder's files are those of a model's text/."""
    return config.model_copy(update={"text": config.text.with_files(str(folder))})


def _merged(config: Config) -> Config:
    """A config without adapters: a model folder's weights have them merged."""
    without, media = {"lora_rank": 0}, config.encoder.modality
    encoders = {media: config.encoder, "text": config.text}
    update = {name: encoder.model_copy(update=without) for name, encoder in encoders.items()}
    return config.model_copy(update=update)


def _with_length(config: Config, length: str) -> Config:
    tree = config.model_dump()
    tree["audio"] |= {"length": length}
    # The crop that was a default of the other length.
    if config.eval.crop == ("whole" if length == "fixed" else "random"):
        del tree["eval"]["crop"]
    tree["train"]["micro_tokens"] = None  # of training, and no setting of clips of one length
    try:
        return parse_config(tree)
    except ConfigError as error:
        # Its remedy is for who trains: a model's settings stay as they are.
        why, rule = str(error).partition(", got ")[0], f"be {config.audio.length} with this model"
        raise ConfigError(f"length must {rule}, got {length}: {why}; leave it out") from None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, on the CPU."""
    return load_tensors(folder / "model.safetensors")


def put_weights(model: TwoTowers, file: Path, *, any_length: bool = False) -> None:
    """Put a file's weights into a model.

    Args:
        any_length: the model takes clips of any length, so its positions must be computed.

    Raises:
        ConfigError: they are another model's.
    """
    put(model, file, load_tensors(file), model.state_dict(), any_length=any_length)


def _check_size(config: Config, folder: Path) -> None:
    """Refuse a config of another size before the memory that it asks for is taken."""
    with torch.device("meta"):
        own = TwoTowers(config, weights=False).state_dict()
    saved = load_weights(folder)
    if any_length_of(config):  # as many rows as a clip may have
        saved, own = (
            {n: w for n, w in s.items() if not n.endswith(_POSITIONS)} for s in (saved, own)
        )
    _same_shapes(folder / "model.safetensors", saved, own)


def any_length_of(config: Config) -> bool:
    """Whether the config's model takes clips of any length."""
    return config.encoder is config.audio and config.audio.variable


def put(
    model: TwoTowers,
    file: Path,
    saved: dict[str, Tensor],
    own: dict[str, Tensor],
    *,
    any_length: bool,
) -> None:
    """Put the weights that a file has, `saved`, in the place of some of the model's, `own`.

    Raises:
        ConfigError: they are others.
    """
    for name in sorted(saved.keys() & own.keys()):
        table, other = saved[name], own[name]
        if not name.endswith(_POSITIONS) or table.shape[1:] != other.shape[1:]:
            continue
        if _same_rows(table, other):
            saved[name] = other if len(table) != len(other) else table
        elif any_length:
            raise ConfigError(
                f"{file} must hold this config's sines as {name} with audio.length = variable, "
                "which takes as many rows as a clip has, got another table; set audio.pos_grid and "
                "audio.frames as in the config.yaml beside it; if they are, audio.length=fixed"
            )
    _same_shapes(file, saved, own)
    for name, weight in sorted(saved.items()):
        if why := fault(weight, own[name].dtype):
            raise ConfigError(f"{file} must hold weights of this model, got {name} {why}; {_COPY}")
    model.load_state_dict(saved, strict=False)


def _same_shapes(file: Path, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(w[name].shape) if name in w else "nothing" for w in (saved, own))
        if there != here:
            raise ConfigError(
                f"{file} must hold the weights of this config's model, got "
                f"{there} for {name}, which is {here} here; use the config.yaml beside it"
            )


def _same_rows(table: Tensor, other: Tensor) -> bool:
    """Whether two tables of positions differ at most in their number of rows, and by roundings."""
    rows = min(len(table), len(other))
    return torch.allclose(table[:rows].float(), other[:rows].to(table.device), atol=1e-4)


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    length: str | None = None,
    verify: bool = True,
) -> tuple[TwoTowers, Config]:
    """Open a model folder, or a run's last checkpoint, for evaluation.

    Args:
        length: audio.length, if not the one that it was trained with.
        verify: compare the folder's files with its SHA256SUMS, if it has one.

    Raises:
        ConfigError: no model, or its encoder cannot take clips so; or a file changed since it was
            written.
    """
    folder = model_folder(path)
    with verified(folder, skip=ONLY_TRAINING, on=verify):
        config = read_config(folder)
        if length is not None and length != config.audio.length:
            config = _with_length(config, length)
        if not (folder / SUMS).is_file():  # so nothing else says yet that the config is its own
            _check_size(config, folder)
        model = TwoTowers(config, weights=False)
        put_weights(model, folder / "model.safetensors", any_length=any_length_of(config))
    return model.to(device).eval(), config
