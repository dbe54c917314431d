"""What is evaluated: a model, or a text tower alone, as functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.evaluate.embed import Embeddings, EmbedTexts, Texts, embed, text_embedder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks


@dataclass(frozen=True)
class EvaluatedModel:
    """What evaluators ask; every rank must ask, all get the same."""

    config: Config
    ranks: Ranks
    clips: Callable[[Shards, Texts], Embeddings]
    """A data set's sounds and captions in the joint space."""
    texts: EmbedTexts
    """Prompts in the joint space."""
    sentences: EmbedTexts
    """Sentences as STS and SentEval take them (eval.sentences)."""
    alone: bool = False
    """A text tower without another: for sentences."""
    classes: tuple[str, ...] = ()
    """What zero-shot classification chooses from; without any, the labels of the data."""


def whole_model(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    ranks: Ranks,
    classes: tuple[str, ...] = (),
) -> EvaluatedModel:
    """A model with both towers, in the mode that it is in."""
    texts = text_embedder(model.embed_text, tokenizer, ranks, config.eval.batch)
    tower = text_embedder(model.text, tokenizer, ranks, config.eval.batch)
    return EvaluatedModel(
        config=config,
        ranks=ranks,
        clips=lambda shards, read: embed(model, config, tokenizer, shards, ranks, read),
        texts=texts,
        sentences=texts if config.eval.sentences == "joint" else tower,
        classes=classes,
    )


def text_tower(
    tower: TransformersText, config: Config, tokenizer: Tokenizer, ranks: Ranks
) -> EvaluatedModel:
    """A text encoder as it comes, for sentences."""

    def no_clips(shards: Shards, read: Texts) -> Embeddings:
        raise ConfigError("a text tower alone has no ears: name a run or a checkpoint for shards")

    texts = text_embedder(tower, tokenizer, ranks, config.eval.batch)
    return EvaluatedModel(config, ranks, no_clips, texts, texts, alone=True)
