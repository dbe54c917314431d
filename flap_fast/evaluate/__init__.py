"""Checkpoint -> scores: an evaluation is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flap_fast.checks import require

# Modules, not their functions: `flap_fast.evaluate.retrieval` stays the module.
from flap_fast.evaluate import flops, geometry, prompts, retrieval, sentence, transfer, zero_shot
from flap_fast.evaluate.embed import Embeddings, Texts
from flap_fast.evaluate.evaluated_model import EvaluatedModel

Scored = dict[str, Any]


def _retrieval(subject: EvaluatedModel, e: Embeddings) -> Scored:
    found = retrieval.retrieval(e.media, e.text, e.clip_of_caption, subject.ranks)
    return {**found, **_sense(subject), "chance": retrieval.chance(e.clip_of_caption, len(e.media))}


def _zero_shot(subject: EvaluatedModel, e: Embeddings) -> Scored:
    templates = prompts.prompts(subject.config.eval.templates)
    found = zero_shot.zero_shot(
        e.media, e.labels, subject.classes, templates, subject.texts, subject.ranks
    )
    return {**found, **_sense(subject)}


def _sense(subject: EvaluatedModel) -> Scored:
    """What `audio` is here, if it is another sense."""
    return {} if subject.config.image is None else {"sense": "image"}


def _geometry(subject: EvaluatedModel, e: Embeddings) -> Scored:
    return geometry.geometry(e.media, e.text, e.clip_of_caption, subject.ranks)


def _flops(subject: EvaluatedModel) -> Any:
    other = "a text encoder alone" if subject.alone else "an image" if subject.config.image else ""
    require(not other, "the model of flops", "have an audio tower", other)
    return flops.masking_flops(subject.config.audio, subject.config.mask)


# Of folders of shards.
OF_CLIPS: dict[str, Callable[[EvaluatedModel, Embeddings], Scored]] = {
    "retrieval": _retrieval,
    "zero_shot": _zero_shot,
    "geometry": _geometry,
}
# What the texts of a folder must have for it, asked before anything is embedded.
NEEDS: dict[str, Callable[[EvaluatedModel, Texts], object]] = {
    "retrieval": lambda _, t: retrieval.need_captions(len(set(t.clip_of_caption)), len(t.labels)),
    "zero_shot": lambda subject, t: (
        prompts.prompts(subject.config.eval.templates),
        zero_shot.classes_of(t.labels, subject.classes),
    ),
    "geometry": lambda _, t: geometry.need_pairs(len(t.captions)),
}
# Of files or folders of sentences.
OF_SENTENCES: dict[str, Callable[[EvaluatedModel, Path], Scored]] = {
    "sts": lambda subject, path: sentence.similarity(subject.sentences, path),
    "transfer": lambda subject, path: transfer.transfer(subject.sentences, path, subject.ranks),
}
# Of nothing but the settings.
OF_SETTINGS: dict[str, Callable[[EvaluatedModel], Any]] = {
    "flops": _flops,
}
TASKS = (*OF_CLIPS, *OF_SENTENCES, *OF_SETTINGS)
