"""Checkpoint -> scores: an evaluation is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flap_fast.checks import need

# Modules, not their functions: `flap_fast.evaluate.retrieval` stays the module.
from flap_fast.evaluate import flops, geometry, prompts, retrieval, sentence, transfer, zero_shot
from flap_fast.evaluate.embed import Embeddings
from flap_fast.evaluate.subject import Subject

Scored = dict[str, Any]


def _retrieval(subject: Subject, e: Embeddings) -> Scored:
    found = retrieval.retrieval(e.audio, e.text, e.owner, subject.ranks)
    sense = {} if subject.config.image is None else {"sense": "image"}  # what `audio` is here
    return {**found, **sense, "chance": retrieval.chance(e.owner, len(e.audio))}


def _zero_shot(subject: Subject, e: Embeddings) -> Scored:
    templates = prompts.prompts(subject.config.eval.templates)
    return zero_shot.zero_shot(
        e.audio, e.labels, subject.classes, templates, subject.texts, subject.ranks
    )


def _geometry(subject: Subject, e: Embeddings) -> Scored:
    return geometry.geometry(e.audio, e.text, e.owner, subject.ranks)


def _flops(subject: Subject) -> Any:
    need(subject.config.image is None, "the model of flops", "have an audio tower", "an image")
    return flops.masking_flops(subject.config.audio, subject.config.mask)


# Of folders of shards.
OF_CLIPS: dict[str, Callable[[Subject, Embeddings], Scored]] = {
    "retrieval": _retrieval,
    "zero_shot": _zero_shot,
    "geometry": _geometry,
}
# Of files or folders of sentences.
OF_SENTENCES: dict[str, Callable[[Subject, Path], Scored]] = {
    "sts": lambda subject, path: sentence.similarity(subject.sentences, path),
    "transfer": lambda subject, path: transfer.transfer(subject.sentences, path, subject.ranks),
}
# Of nothing but the settings.
OF_SETTINGS: dict[str, Callable[[Subject], Any]] = {
    "flops": _flops,
}
TASKS = (*OF_CLIPS, *OF_SENTENCES, *OF_SETTINGS)
