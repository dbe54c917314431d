"""Sounds and texts -> embeddings, the work shared by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.data.batch import MediaInput
from flap_fast.data.evaluation import evaluation_batches
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks

Encode = Callable[[Tensor, Tensor], Tensor]
"""(B, L) ids and mask -> (B, d)."""
EmbedTexts = Callable[[Sequence[str]], Tensor]
"""M texts -> (M, d) float32 on every rank; every rank must ask."""


@dataclass(frozen=True)
class Texts:
    """What is written of N sounds: M captions, and labels."""

    captions: Sequence[str]
    clip_of_caption: Sequence[int]
    """Of each caption the sound that it belongs to."""
    labels: tuple[tuple[str, ...], ...]
    """Of each sound its class names, often none; underscores have become spaces."""


@dataclass(frozen=True)
class Embeddings:
    """N sounds and their M captions, on every rank."""

    media: Tensor
    """(N, d) float32, unit rows."""
    text: Tensor
    """(M, d) float32, unit rows."""
    clip_of_caption: Tensor
    """(M,) int64: the sound that each caption belongs to."""
    labels: tuple[tuple[str, ...], ...]
    """Of each sound its class names, often none; underscores have become spaces."""


def embed(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    shards: Shards,
    ranks: Ranks,
    texts: Texts | None = None,
) -> Embeddings:
    """Embed everything once, in evaluation mode; every rank must ask.

    Args:
        texts: of the shards, if they have been read before.

    Raises:
        ShardError: a clip that cannot be read, on all ranks; evaluation leaves nothing out.
        ArithmeticError: an embedding that is not finite.
    """
    texts = texts or read_texts(shards)
    with evaluating(model):
        mine = share(len(shards), ranks)
        mels = _in_step(evaluation_batches(config, shards, mine, ranks), ranks)
        audio = torch.cat([model.embed_media(mel, longer=longer) for mel, longer in mels])
        if config.eval.crops > 1:
            crops = audio.unflatten(0, (-1, config.eval.crops))
            audio = functional.normalize(crops.mean(1), dim=-1)
        audio = finite(ranks.gather(audio)[: len(shards)], shards.name)
        text = text_embedder(model.embed_text, tokenizer, ranks, config.eval.batch)(texts.captions)
    clip_of_caption = torch.tensor(texts.clip_of_caption, device=ranks.device).long()
    return Embeddings(audio, text, clip_of_caption, texts.labels)


def text_embedder(encode: Encode, tokenizer: Tokenizer, ranks: Ranks, batch: int) -> EmbedTexts:
    """What embeds any number of texts, in the mode that the model is in, without gradients."""

    @torch.no_grad()
    def texts_to_rows(texts: Sequence[str]) -> Tensor:
        if not texts:  # the width is known by an encoder alone
            return texts_to_rows(["."])[:0]
        mine = [texts[int(i)] for i in share(len(texts), ranks)]
        # Texts of a length together: a batch is padded to its longest.
        order = sorted(range(len(mine)), key=lambda i: len(mine[i]))
        own = [mine[i] for i in order]
        parts = [own[i : i + batch] for i in range(0, len(own), batch)]
        tokens = (tokenizer(part) for part in parts)
        rows = torch.cat([encode(ids.to(ranks.device), mask) for ids, mask in tokens])
        back = torch.empty_like(rows)
        back[torch.tensor(order, device=rows.device)] = rows
        return finite(ranks.gather(back)[: len(texts)], lambda n: repr(texts[n]))

    return texts_to_rows


def finite(rows: Tensor, name: Callable[[int], str]) -> Tensor:
    """The rows; raises `ArithmeticError` where one is not finite: it would score by accident."""
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ArithmeticError(
            f"an embedding must be finite, got NaN or infinity for {len(bad)} of {len(rows)}, the "
            f"first of {name(bad[0])}; take an earlier checkpoint"
        )
    return rows


def _in_step(mels: Iterator[MediaInput], ranks: Ranks) -> Iterator[MediaInput]:
    """The same batches, until a rank has one that it cannot read: then all raise.

    A rank that raised alone would leave the others waiting for its rows, or for its weights.
    """
    while True:
        found, bad = None, None
        try:
            found = next(mels, None)
        except ShardError as why:
            bad = why
        if ranks.any(bad is not None):
            other = "a clip of another rank's share cannot be read; that rank says which"
            raise bad or ShardError(other)
        if found is None:
            return
        yield found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode and no gradients; after: the mode before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def share(count: int, ranks: Ranks) -> np.ndarray:
    """This rank's share of `count` things; `ranks.gather(...)[:count]` puts them in order again.

    All ranks have as many (ZeRO-3 gathers weights in step), so the last ones repeat some.
    """
    each = -(-count // ranks.world)
    return (np.arange(each) + ranks.rank * each) % count


def read_texts(shards: Shards) -> Texts:
    """All captions and labels; raises `ShardError` on a clip whose cannot be read."""
    captions: list[str] = []
    clip_of_caption: list[int] = []
    labels: list[tuple[str, ...]] = []
    for clip in range(len(shards)):
        try:
            record = shards.record(clip, captionless=True)
        except Unusable as why:
            raise ShardError(
                f"{shards.name(clip)}: {why}; delete the tar and run the same flap prepare again"
            ) from None
        captions += record["text"]
        clip_of_caption += [clip] * len(record["text"])
        labels.append(_labels(record.get("tag")))
    return Texts(captions, clip_of_caption, tuple(labels))


def _labels(tag: object) -> tuple[str, ...]:
    """LAION's `tag`: class names, or one of them."""
    names: Iterable[object] = (
        [tag] if isinstance(tag, str) else tag if isinstance(tag, list) else []
    )
    spoken = (" ".join(n.replace("_", " ").split()) for n in names if isinstance(n, str))
    return tuple(dict.fromkeys(name for name in spoken if name))
