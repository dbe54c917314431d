"""The frozen teacher of loss.distill: embeddings of a batch by another model.

    batch's media, before SpecAug and masking -> teacher's encoder -> teacher_media (B, E)
    batch's captions                          -> its text encoder  -> teacher_text  (B, E)

It is a plain module on each rank, in evaluation mode: outside of the engine, which would shard it,
and of checkpoints. It takes the batch that the student takes, so both must have the same front end
and the same tokenizer; their encoders may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.batch import Batch, to_device
from flap_fast.data.tokenize import tokenizer, tokenizer_digest
from flap_fast.model.model_folder import load_model, model_folder, read_config
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
        self.model, _ = load_model(distill.teacher, ranks.device)
        self.model.requires_grad_(False)
        self.model.decoder = None
        self.model.precision = config.train.precision
        own = self.model.logit_scale.clamp(0, self.model.max_logit_scale).exp().squeeze(0)
        self._scale = own if distill.scale is None else own.new_tensor(distill.scale)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """`teacher_media` and `teacher_text` (B, E), unit norm, and `teacher_scale` (), float32."""
        media = batch.media.contiguous() if isinstance(batch.media, Tensor) else batch.media
        captions = slice(len(batch.clips))  # the other sentences follow them
        ids = to_device(batch.ids[captions], self._device)
        return {
            "teacher_media": self.model.embed_media(media, longer=batch.longer),
            "teacher_text": self.model.embed_text(ids, batch.attention_mask[captions]),
            "teacher_scale": self._scale,
        }


def teacher(config: Config, ranks: Ranks) -> Teacher | None:
    """The config's teacher; None without loss.distill."""
    return Teacher(config, ranks) if config.loss.distill.active else None


def check_teacher(config: Config) -> None:
    """Raise `ConfigError` where the teacher cannot take the student's batches."""
    path = config.loss.distill.teacher
    if path is None or not config.loss.distill.active:
        return
    rule = "be an existing folder of a model or a run"
    require(path.is_dir(), "loss.distill.teacher", rule, path)
    folder = model_folder(path)
    there = read_config(folder)
    differing = [
        f"{name} = {theirs} (here {ours})"
        for name, theirs, ours in _compared(there, config)
        if theirs != ours
    ]
    if not differing and not _same_tokenizer(there, config):
        differing = ["another tokenizer (text.folder, text.tokenizer)"]
    if differing:
        raise ConfigError(
            "loss.distill.teacher must have this config's front end and tokenizer, got "
            f"'{folder}' with {', '.join(differing)}"
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
        if here.audio.mel == "kaldi":
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
