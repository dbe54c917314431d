"""The frozen teacher of loss.distill: embeddings of a batch by another model.

    batch's media, before SpecAug and masking -> teacher's encoder -> teacher_media (B, E)
    batch's captions                          -> its text encoder  -> teacher_text  (B, E)

It is a plain module on each rank, in evaluation mode: outside of the engine, which would shard it,
and of checkpoints. It takes the batch that the student takes, so both must have the same front end
and the same tokenizer; their encoders may differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.batch import Batch, to_device
from flap_fast.data.tokenize import tokenizer, tokenizer_digest
from flap_fast.hub import on_hub
from flap_fast.model.model_folder import load_model, model_folder, read_config
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks


class Teacher:
    """Embeds batches by the model of loss.distill.teacher.

    Raises:
        ConfigError: see `check_teacher`; also where its weights are not those of its config.
    """

    def __init__(self, config: Config, ranks: Ranks):
        distill = config.loss.distill
        assert distill.teacher is not None
        self._device = ranks.device
        model, _ = load_model(distill.teacher, ranks.device, verify=config.ckpt.verify)
        self.model = frozen(model, config.train.precision)
        own = self.model.logit_scale.clamp(0, self.model.max_logit_scale).exp().squeeze(0)
        self._scale = own if distill.scale is None else own.new_tensor(distill.scale)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """`teacher_media` and `teacher_text` (B, E), unit norm, and `teacher_scale` (), float32."""
        return embeddings(self.model, batch, self._device) | {"teacher_scale": self._scale}


def frozen(model: TwoTowers, precision: str) -> TwoTowers:
    """The model as a teacher: in evaluation mode, untrained, without its decoder.

    Args:
        precision: the student's train.precision.
    """
    model.eval().requires_grad_(False)
    model.decoder, model.precision = None, precision
    return model


@torch.no_grad()
def embeddings(model: TwoTowers, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """`teacher_media` and `teacher_text` (B, E): of the unmasked media and of their captions."""
    media = batch.media.contiguous() if isinstance(batch.media, Tensor) else batch.media
    captions = slice(len(batch.clips))  # the other sentences follow them
    ids = to_device(batch.ids[captions], device)
    return {
        "teacher_media": model.embed_media(media, longer=batch.longer),
        "teacher_text": model.embed_text(ids, batch.attention_mask[captions]),
    }


def teacher(config: Config, ranks: Ranks) -> Teacher | None:
    """The config's teacher; None without loss.distill."""
    return Teacher(config, ranks) if config.loss.distill.active else None


def teacher_config(config: Config) -> Config | None:
    """The config of loss.distill's teacher, its text tower's files its own; None without one.

    Raises:
        ConfigError: loss.distill.teacher is not the folder of a model or a run.
    """
    path = config.loss.distill.teacher
    if path is None or not config.loss.distill.active:
        return None
    rule, remedy = "be an existing folder of a model or a run", "name one that `flap train` wrote"
    require(on_hub(path) or os.path.isdir(path), "loss.distill.teacher", rule, path, remedy)
    return read_config(model_folder(path))


def check_teacher(config: Config) -> None:
    """Raise `ConfigError` where the teacher cannot take the student's batches."""
    there = teacher_config(config)
    if there is None:
        return
    differing = [
        f"{name} = {theirs} (here {ours})"
        for name, theirs, ours in _compared(there, config)
        if theirs != ours
    ]
    if not differing and not _same_tokenizer(there, config):
        differing = ["another tokenizer (text.folder, text.tokenizer)"]
    if differing:
        assert config.loss.distill.teacher is not None
        raise ConfigError(
            "loss.distill.teacher must have this config's front end and tokenizer, got "
            f"'{model_folder(config.loss.distill.teacher)}' with {', '.join(differing)}"
        )


def _compared(there: Config, here: Config) -> Iterator[tuple[str, object, object]]:
    """Settings of a teacher and of a student that decide what a batch holds."""
    modality = there.encoder.modality, here.encoder.modality
    yield "the encoder's modality", *modality
    if len(set(modality)) > 1:
        return
    if here.encoder is here.audio:
        yield "audio.length", there.audio.length, here.audio.length
        of_mel = here.audio.front_end().keys() - {"length"}
        if here.audio.mel != "clap":
            of_mel -= {"mel_variant", "low_hz", "high_hz"}  # CLAP's
        bound = "max_duration_s" if here.audio.variable else "frames"
        names = [*sorted(of_mel), "mean", "std", bound]
        if there.fusion.channels != here.fusion.channels:
            yield "fusion.type", there.fusion.type, here.fusion.type
    else:
        names = ["resolution", "mean", "std"]
    for name in names:
        theirs, ours = (getattr(config.encoder, name, None) for config in (there, here))
        yield f"{modality[0]}.{name}", theirs, ours
    yield "text.max_tokens", there.text.max_tokens, here.text.max_tokens


def _same_tokenizer(there: Config, here: Config) -> bool:
    theirs, ours = (tokenizer_digest(tokenizer(config.text)) for config in (there, here))
    return theirs == ours
