"""The weights that a new run begins with: another model's, whole or its audio encoder alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.checksums import verified
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.hub import local_folder
from flap_fast.model.heads import ClassNamesHead
from flap_fast.model.model_folder import (
    CLASSES,
    ONLY_TRAINING,
    TOWER,
    any_length_of,
    model_folder,
    put,
)
from flap_fast.model.two_towers import TwoTowers
from flap_fast.section import MEANS_WEIGHTS
from flap_fast.tensors import load_tensors

# Parts that a run may add to the weights it begins with: they begin at random.
_DECODER = "decoder."
_BIAS = "logit_bias"
_LORA = "lora."
_FUSION = ("mel_conv1d.", "mel_conv2d.", "fusion_model.")
_CLASSIFIER = "audio.classifier."


def put_first_weights(model: TwoTowers, config: Config) -> None:
    """Put the weights that train.init_from or train.init_audio_from name into a new model.

    A decoder, and for an audio encoder what fuses, begin at random where the folder has none; the
    bias of loss.sigmoid begins there as the setting says.

    Raises:
        ConfigError: they are another model's, or would compute something else in this one; or a
            file changed since it was written.
    """
    media, any_length, on = f"{model.modality}.", any_length_of(config), config.ckpt.verify
    if config.train.init_from:
        folder = model_folder(config.train.init_from)
        with verified(folder, skip=ONLY_TRAINING, on=on):
            there = _same_meaning(config, folder, (media, "text.", _DECODER)).joint
            here = config.joint
            rule = f"be {'above ' if there.class_names else ''}0, as in {folder}"
            remedy = f"set joint.class_names={there.class_names:g}"
            same = bool(there.class_names) == bool(here.class_names)
            require(same, "joint.class_names", rule, here.class_names, remedy)
            _put_parts(
                model, folder / "model.safetensors", ("",), (_DECODER, _BIAS, _LORA), any_length
            )
    if config.train.init_audio_from:
        path = local_folder(config.train.init_audio_from)
        audio_only = (path / TOWER).is_file()
        folder = path if audio_only else model_folder(path)
        file = folder / (TOWER if audio_only else "model.safetensors")
        with verified(folder, skip=ONLY_TRAINING, on=on):
            there = _same_meaning(config, folder, (media, _DECODER)).joint
            names = _class_names(config, folder, whole=there.class_names > 0)
            _put_parts(model, file, (media, _DECODER), (_DECODER, _LORA, *_FUSION), any_length)
            if isinstance(model.head, ClassNamesHead):
                _put_class_names(model.head.class_names, names, model, config)
    elif not config.train.init_from:
        rule = "be 0 where no weights bring a classifier and its classes' names"
        named, remedy = config.joint.class_names, "set train.init_audio_from: see flap import"
        require(named == 0, "joint.class_names", rule, named, remedy)


def _class_names(config: Config, folder: Path, *, whole: bool) -> list[str]:
    """The names of the classes that an audio encoder's folder brings, where they are needed.

    Args:
        whole: it is the folder of a model that has their embeddings.
    """
    file, named = folder / CLASSES, config.joint.class_names
    if not named:
        return []
    rule = f"be 0 with {folder}, which names no classes: it has no {CLASSES}"
    remedy = "import it again, from a model with a classifier and its class map"
    if whole:
        remedy = f"train.init_from={folder} brings their embeddings"
    require(file.is_file(), "joint.class_names", rule, named, remedy)
    try:
        names = file.read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} must be UTF-8: {error}; import it again") from None
    classes: int = config.encoder.classes  # type: ignore[attr-defined]
    rule, remedy = f"be {len(names)}, as in {file}", f"set audio.classes={len(names)}"
    require(len(names) == classes, "audio.classes", rule, classes, remedy)
    return names


@torch.no_grad()
def _put_class_names(classes: Tensor, names: list[str], model: TwoTowers, config: Config) -> None:
    """Make the classes' embeddings those that the text encoder gives their names."""
    training = model.training
    model.eval()
    classes.copy_(model.embed_text(*tokenizer(config.text)(names)))
    model.train(training)


def _same_meaning(config: Config, folder: Path, parts: tuple[str, ...]) -> Config:
    """Refuse settings of these parts that differ from the folder's, where no shape does.

    Returns:
        The folder's config.
    """
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
    return there


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
    if not isinstance(model.head, ClassNamesHead):
        saved = {name: value for name, value in saved.items() if not name.startswith(_CLASSIFIER)}
    if model.logit_bias is None:
        saved.pop(_BIAS, None)
    absent = tuple(group for group in new if not any(group in name for name in saved))
    own = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
    own = {n: v for n, v in own.items() if not any(g in n for g in absent)}
    put(model, file, saved, own, any_length=any_length)
