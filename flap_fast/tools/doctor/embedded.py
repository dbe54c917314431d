"""Embeddings of a sample of a run's clips, by its last checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import embed, read_texts
from flap_fast.model.model_folder import load_model
from flap_fast.ranks import Ranks
from flap_fast.tools.doctor.records import Embedded, Examined, Split

_EVALUATION = re.compile(r"(^|[^a-z])(val|valid|validation|dev|eval|evaluation|test)([^a-z]|$)")


def evaluation_split(splits: Sequence[Split]) -> Split:
    """The split to embed: the first that is called as evaluation's are, else the last."""
    named = [split for split in splits if _EVALUATION.search(split.name.lower())]
    return named[0] if named else splits[-1]


def embedded_sample(e: Examined, most: int) -> Embedded | None:
    """Embeddings of `most` clips with captions, spread over the split; None if these are lacking.

    Raises:
        ConfigError: the model cannot be opened.
    """
    if "embeddings" in e.lacking or e.run is None:
        return None
    split = evaluation_split(e.splits)
    faulty = split.sounds.faults if split.sounds else {}
    captioned = sorted(set(split.captions.clip_of_caption.tolist()))
    rows = np.array([row for row in captioned if row not in faulty], np.int64)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))]
    if len(rows) < 2:
        e.lacking["embeddings"] = f"{split.name} has {len(rows)} clips with captions"
        return None
    shards, picked = split.clips.shards, split.picked[rows]
    assert shards is not None
    assert shards.plain is not None
    assert shards.texts is not None
    some = replace(
        shards,
        locations=shards.locations[picked],
        plain=shards.plain[picked],
        texts=shards.texts[picked],
    )
    model, config = load_model(e.run.checkpoints[-1])
    texts = read_texts(some)
    found = embed(model, config, tokenizer(config.text), some, Ranks(), texts)
    first = np.unique(np.array(texts.clip_of_caption), return_index=True)[1].tolist()
    return Embedded(
        split=split.name,
        media=found.media,
        text=found.text[first],
        captions=[str(texts.captions[n]) for n in first],
    )
