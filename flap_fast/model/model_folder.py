"""Writes and reads a trained model as a folder.

    FOLDER/model.safetensors   fp32 weights, this project's names
    FOLDER/config.yaml         the config it was trained with
    FOLDER/text/               the text tower's config and tokenizer
    FOLDER/SHA256SUMS          what the files were when they were written

The folder needs nothing but itself; weights are safetensors, never a pickle. An audio tower alone
(`flap import` makes one of AudioMAE's) is a folder with audio.safetensors instead.
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
from flap_fast.section import MEANS_WEIGHTS
from flap_fast.tensors import fault, load_tensors, save_tensors

# The weights of only an audio tower, and of AudioMAE's decoder if requested.
TOWER = "audio.safetensors"
# What only training reads, in a checkpoint: Adam's state, and the weights themselves where
# model.safetensors is their average.
OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained.safetensors"
ONLY_TRAINING = (OPTIMIZER, TRAINED)
# Parts that a run may add to the weights it begins with: they begin at random.
_DECODER = "decoder."
_BIAS = "logit_bias"
_FUSION = ("mel_conv1d.", "mel_conv2d.", "fusion_model.")
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
    """The config of a model folder, its text tower taken from the folder itself.

    Raises:
        ConfigError: a file is missing or no config.
    """
    # Without it, transformers takes another tokenizer's settings.
    file = folder / "text" / "tokenizer_config.json"
    require(file.is_file(), str(file.parent), f"hold {file.name}", "none", _COPY)
    file = folder / "config.yaml"
    try:
        return with_text(load_config(file), folder / "text")
    except ConfigError as error:
        named = (
            line if str(file) in line else f"{file}: {line}" for line in str(error).split("\n")
        )
        raise ConfigError("\n".join(named)) from None


def with_text(config: Config, folder: Path) -> Config:
    """A config whose text encoder's files are those of a model's text/."""
    return config.model_copy(update={"text": config.text.with_files(str(folder))})


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
    _put(model, file, load_tensors(file), model.state_dict(), any_length=any_length)


def _check_size(config: Config, folder: Path) -> None:
    """Refuse a config of another size before the memory that it asks for is taken."""
    with torch.device("meta"):
        own = TwoTowers(config, weights=False).state_dict()
    saved = load_weights(folder)
    if _any_length(config):  # as many rows as a clip may have
        saved, own = (
            {n: w for n, w in s.items() if not n.endswith(_POSITIONS)} for s in (saved, own)
        )
    _same_shapes(folder / "model.safetensors", saved, own)


def put_first_weights(model: TwoTowers, config: Config) -> None:
    """Put the weights that train.init_from or train.init_audio_from name into a new model.

    A decoder, and for an audio encoder what fuses, begin at random where the folder has none; the
    bias of loss.sigmoid begins there as the setting says.

    Raises:
        ConfigError: they are another model's, or would compute something else in this one; or a
            file changed since it was written.
    """
    media, any_length, on = f"{model.modality}.", _any_length(config), config.ckpt.verify
    if config.train.init_from:
        folder = model_folder(config.train.init_from)
        with verified(folder, skip=ONLY_TRAINING, on=on):
            _same_meaning(config, folder, (media, "text.", _DECODER))
            _put_parts(model, folder / "model.safetensors", ("",), (_DECODER, _BIAS), any_length)
    if config.train.init_audio_from:
        path = local_folder(config.train.init_audio_from)
        audio_only = (path / TOWER).is_file()
        folder = path if audio_only else model_folder(path)
        file = folder / (TOWER if audio_only else "model.safetensors")
        with verified(folder, skip=ONLY_TRAINING, on=on):
            _same_meaning(config, folder, (media, _DECODER))
            _put_parts(model, file, (media, _DECODER), (_DECODER, *_FUSION), any_length)


def _any_length(config: Config) -> bool:
    return config.encoder is config.audio and config.audio.variable


def _same_meaning(config: Config, folder: Path, parts: tuple[str, ...]) -> None:
    """Refuse settings of these parts that differ from the folder's, where no shape does."""
    file = folder / "config.yaml"
    there = load_config(file)
    mine, other = config.encoder.modality, there.encoder.modality
    rule = f"hold an {mine} encoder, as this config's, not an {other} encoder"
    require(mine == other, "the weights to begin with", rule, folder)
    theirs, ours = _meaning(there), _meaning(config)
    for name, value in theirs.items():
        if name.startswith(parts) and name in ours:
            shown, got = (list(v) if isinstance(v, tuple) else v for v in (value, ours[name]))
            setting = "null" if shown is None else shown
            remedy = f"set {name}={setting}, or change it in {file} if another is meant"
            require(got == shown, name, f"be {shown}, as in {folder}", got, remedy)


def _meaning(config: Config) -> dict[str, object]:
    """The settings that a config's weights depend on and that shapes do not determine, by name."""
    sections = {config.encoder.modality: config.encoder.meaning(), "text": config.text.meaning()}
    if config.loss.recon.weight:
        sections["decoder"] = config.decoder.marked(MEANS_WEIGHTS)
    named = {f"{name}.{n}": v for name, found in sections.items() for n, v in found.items()}
    # An encoder comes before what follows from it, whose remedy would lead astray.
    return dict(sorted(named.items(), key=lambda item: not item[0].endswith(".encoder")))


def _put_parts(
    model: TwoTowers, file: Path, parts: tuple[str, ...], new: tuple[str, ...], any_length: bool
) -> None:
    """Names that begin with one of `parts`; whole groups with one of `new` in them may be new."""
    saved = {name: value for name, value in load_tensors(file).items() if name.startswith(parts)}
    if model.decoder is None:
        saved = {name: value for name, value in saved.items() if not name.startswith(_DECODER)}
    if model.logit_bias is None:
        saved.pop(_BIAS, None)
    absent = tuple(group for group in new if not any(group in name for name in saved))
    own = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
    own = {n: v for n, v in own.items() if not any(g in n for g in absent)}
    _put(model, file, saved, own, any_length=any_length)


def _put(
    model: TwoTowers,
    file: Path,
    saved: dict[str, Tensor],
    own: dict[str, Tensor],
    *,
    any_length: bool,
) -> None:
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
        put_weights(model, folder / "model.safetensors", any_length=_any_length(config))
    return model.to(device).eval(), config
