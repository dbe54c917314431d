"""A data set's sounds and captions -> embeddings, the work shared by all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.captions import Tokenizer
from flap_fast.data.loader import evaluation_mels
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.sound import BadSound
from flap_fast.model.flap import Flap
from flap_fast.ranks import Ranks


@dataclass(frozen=True)
class Embeddings:
    """N sounds and their M captions, on every rank."""

    audio: Tensor
    """(N, d) float32, unit rows."""
    text: Tensor
    """(M, d) float32, unit rows."""
    owner: Tensor
    """(M,) int64: the sound that each caption belongs to."""


@torch.no_grad()
def embed(
    model: Flap, config: Config, tokenizer: Tokenizer, shards: Shards, ranks: Ranks
) -> Embeddings:
    """Embed everything once, in evaluation mode; every rank must ask.

    Raises:
        ShardError: a clip that cannot be read; evaluation leaves nothing out.
    """
    captions, owner = _captions(shards)
    training = model.training
    model.eval()
    try:
        mine = _mine(len(shards), ranks)
        mels = evaluation_mels(config, shards, mine, ranks)
        parts = (model.embed_audio(mel, longer=longer) for mel, longer in mels)
        audio = _whole(parts, len(shards), ranks)
        own = [captions[i] for i in _mine(len(captions), ranks)]
        some = (own[i : i + config.eval.batch] for i in range(0, len(own), config.eval.batch))
        tokens = (tuple(t.to(ranks.device) for t in tokenizer(texts)) for texts in some)
        text = _whole((model.embed_text(*both) for both in tokens), len(captions), ranks)
    finally:
        model.train(training)
    return Embeddings(audio, text, torch.tensor(owner, device=ranks.device))


def _mine(count: int, ranks: Ranks) -> np.ndarray:
    """This rank's share; all have as many (ZeRO-3 gathers weights in step), so some repeat."""
    each = -(-count // ranks.world)
    return (np.arange(each) + ranks.rank * each) % count


def _whole(parts: Iterable[Tensor], count: int, ranks: Ranks) -> Tensor:
    """(count, d): the shares of all ranks in order, without what was repeated."""
    return ranks.gather(torch.cat(list(parts)))[:count]


def _captions(shards: Shards) -> tuple[list[str], list[int]]:
    captions: list[str] = []
    owner: list[int] = []
    for clip in range(len(shards)):
        try:
            texts = shards.record(clip)["text"]
        except BadSound as why:
            raise ShardError(f"{shards.name(clip)}: {why}; prepare it again") from None
        captions += texts
        owner += [clip] * len(texts)
    return captions, owner
