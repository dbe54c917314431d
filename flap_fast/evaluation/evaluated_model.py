"""The model to evaluate, as functions: two towers, or only a text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluation.embed import (
    Embeddings,
    EmbedTexts,
    Texts,
    embed,
    text_embedder,
)
from flap_fast.evaluation.kept_outputs import KeptOutputs
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks

TEXT_ONLY = "a text encoder alone embeds no clips: name a run or a checkpoint for shards"


class EmbedClips(Protocol):
    def __call__(self, shards: Shards, read: Texts, pooled: bool = False) -> Embeddings:
        """Embed clips and their `Texts`; whether with `Embeddings.pooled`."""
        ...


@dataclass(frozen=True)
class EvaluatedModel:
    """Embedding functions for evaluators. Collective: call on every rank."""

    config: Config
    ranks: Ranks
    clips: EmbedClips
    """Embeds a data set's clips and captions into the joint space."""
    texts: EmbedTexts
    """Embeds prompts into the joint space."""
    sentences: EmbedTexts
    """Embeds sentences for STS and SentEval, as eval.sentences says."""
    text_only: bool = False
    """A text encoder without another, for sentences."""
    classes: tuple[str, ...] = ()
    """Classes of zero-shot classification; the labels of the data if empty."""

    @property
    def modality(self) -> str:
        """`audio` or `image`."""
        return self.config.encoder.modality


def whole_model(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    ranks: Ranks,
    classes: tuple[str, ...] = (),
    kept: KeptOutputs | None = None,
) -> EvaluatedModel:
    """A model with both towers, in its present mode.

    Args:
        kept: what frozen encoders gave before.
    """
    kept = kept or KeptOutputs(model, ranks)
    texts = text_embedder(kept.embed_text, tokenizer, ranks, config.eval.batch)
    tower = text_embedder(model.text, tokenizer, ranks, config.eval.batch)
    return EvaluatedModel(
        config=config,
        ranks=ranks,
        clips=lambda shards, read, pooled=False: embed(
            model, config, tokenizer, shards, ranks, read, kept, pooled=pooled
        ),
        texts=texts,
        sentences=texts if config.eval.sentences == "joint" else tower,
        classes=classes,
    )


def text_only_model(
    encoder: nn.Module, config: Config, tokenizer: Tokenizer, ranks: Ranks
) -> EvaluatedModel:
    """A text encoder without a projection, for sentences."""

    def no_clips(shards: Shards, read: Texts, pooled: bool = False) -> Embeddings:
        raise ConfigError(TEXT_ONLY)

    texts = text_embedder(encoder, tokenizer, ranks, config.eval.batch)
    return EvaluatedModel(config, ranks, no_clips, texts, texts, text_only=True)
