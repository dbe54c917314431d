"""Media and texts -> embeddings, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.data.batch import MediaInput
from flap_fast.data.evaluation import crops_of, evaluation_batches, remedy_of
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.data.read_ahead import reading_in_order
from flap_fast.data.shards import ShardError, Shards
from flap_fast.data.tokenize import Tokenizer
from flap_fast.evaluation.kept_outputs import KeptOutputs
from flap_fast.model.two_towers import TwoTowers
from flap_fast.progress import progress
from flap_fast.ranks import Ranks

Encode = Callable[[Tensor, Tensor], Tensor]
"""(B, L) ids and mask -> (B, d)."""
EmbedTexts = Callable[[Sequence[str]], Tensor]
"""M texts -> (M, d) float32 on every rank. Collective: call on every rank."""


@dataclass(frozen=True)
class Texts:
    """The texts of N clips: M captions, and labels."""

    captions: Sequence[str]
    clip_of_caption: Sequence[int]
    """The clip that each caption belongs to."""
    labels: tuple[tuple[str, ...], ...]
    """The class names of each clip, often none; underscores have become spaces."""
    names: tuple[tuple[str, ...], ...]
    """The names of each clip: its media's file and its id, where they are known."""
    folds: tuple[str, ...]
    """The fold of cross-validation that each clip is in; "" without one."""
    sources: tuple[str, ...]
    """What each clip was cut from or made with; "" where it is not known."""


@dataclass(frozen=True)
class Embeddings:
    """N clips and their M captions, on every rank."""

    media: Tensor
    """(N, d) float32, unit rows."""
    text: Tensor
    """(M, d) float32, unit rows."""
    clip_of_caption: Tensor
    """(M,) int64: the clip that each caption belongs to."""
    captions: Sequence[str]
    """The text of each caption."""
    labels: tuple[tuple[str, ...], ...]
    """The class names of each clip, often none; underscores have become spaces."""
    names: tuple[tuple[str, ...], ...]
    """The names of each clip: its media's file and its id, where they are known."""
    folds: tuple[str, ...]
    """The fold of cross-validation that each clip is in; "" without one."""
    sources: tuple[str, ...]
    """What each clip was cut from or made with; "" where it is not known."""
    pooled: Tensor | None = None
    """(N, D) float32, the media encoder's vectors before its head, where they were asked for."""


def embed(
    model: TwoTowers,
    config: Config,
    tokenizer: Tokenizer,
    shards: Shards,
    ranks: Ranks,
    texts: Texts | None = None,
    kept: KeptOutputs | None = None,
    *,
    pooled: bool = False,
) -> Embeddings:
    """Embeddings of a data set, each computed once, in evaluation mode. Collective.

    Args:
        texts: those of the shards, if they have been read before.
        kept: what frozen encoders gave before.
        pooled: give the encoder's vectors before its head, too; of a clip's crops, the mean.

    Raises:
        ShardError: a clip that cannot be read, on all ranks; evaluation leaves nothing out.
        ArithmeticError: an embedding that is not finite.
    """
    texts = texts or read_texts(shards)
    kept = kept or KeptOutputs(model, ranks)
    with evaluating(model):
        crops = crops_of(config, shards, ranks)
        mine = crops.take(rank_slice(len(crops.clips), ranks))
        batches = _in_step(evaluation_batches(config, shards, mine, ranks), ranks)
        parts: list[tuple[Tensor, ...]] = []
        with progress(f"embed {config.encoder.modality}", len(mine.clips)) as advance:
            for x in kept.pool_media(shards, batches):
                projected = model.project_media(x)
                parts.append((projected, model.vectors(x)) if pooled else (projected,))
                advance(len(x))
        rows = [
            ranks.gather(torch.cat(some))[: len(crops.clips)] for some in zip(*parts, strict=True)
        ]
        counts = np.bincount(crops.clips).tolist()
        media = finite(_unit_means(rows[0], counts), shards.name)
        features = finite(_means(rows[1], counts), shards.name) if pooled else None
        text = text_embedder(kept.embed_text, tokenizer, ranks, config.eval.batch)(texts.captions)
    clip_of_caption = torch.tensor(texts.clip_of_caption, device=ranks.device).long()
    return Embeddings(
        media,
        text,
        clip_of_caption,
        texts.captions,
        texts.labels,
        texts.names,
        texts.folds,
        texts.sources,
        features,
    )


def _unit_means(rows: Tensor, counts: list[int]) -> Tensor:
    """(N, d) unit rows: the means of so many of the rows (R, d) each; one stays as it is."""
    means, several = _means(rows, counts), torch.tensor(counts, device=rows.device) > 1
    return torch.where(several[:, None], functional.normalize(means, dim=-1), means)


def _means(rows: Tensor, counts: list[int]) -> Tensor:
    """(N, d): the means of so many of the rows (R, d) each; one stays as it is."""
    if len(counts) == len(rows):
        return rows
    means = [part.mean(0) if len(part) > 1 else part[0] for part in rows.split(counts)]
    return torch.stack(means)


def text_embedder(encode: Encode, tokenizer: Tokenizer, ranks: Ranks, batch: int) -> EmbedTexts:
    """A function that embeds any number of texts, without gradients."""

    @torch.no_grad()
    def texts_to_rows(texts: Sequence[str]) -> Tensor:
        if not texts:  # only the encoder knows the width
            return texts_to_rows(["."])[:0]
        mine = [texts[int(i)] for i in rank_slice(len(texts), ranks)]
        # Texts of similar length together: a batch is padded to its longest.
        order = sorted(range(len(mine)), key=lambda i: len(mine[i]))
        own = [mine[i] for i in order]
        parts = [own[i : i + batch] for i in range(0, len(own), batch)]
        rows = []
        with progress("embed texts", len(own)) as advance:
            for part in parts:
                ids, mask = tokenizer(part)
                rows.append(encode(ids.to(ranks.device), mask))
                advance(len(part))
        rows = torch.cat(rows)
        unsorted = torch.empty_like(rows)
        unsorted[torch.tensor(order, device=rows.device)] = rows
        return finite(ranks.gather(unsorted)[: len(texts)], lambda n: repr(texts[n]))

    return texts_to_rows


def finite(rows: Tensor, name: Callable[[int], str]) -> Tensor:
    """The rows; raises `ArithmeticError` on NaN or infinity, whose scores mean nothing."""
    bad = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise ArithmeticError(
            f"an embedding must be finite, got NaN or infinity for {len(bad)} of {len(rows)}, the "
            f"first of {name(bad[0])}; take an earlier checkpoint"
        )
    return rows


def _in_step(batches: Iterator[MediaInput], ranks: Ranks) -> Iterator[MediaInput]:
    """Yield the same batches; all ranks raise if one of them cannot read its batch.

    If only one rank raised, the others would wait forever for its rows, or for its weights.
    """
    while True:
        found, bad = None, None
        try:
            found = next(batches, None)
        except ShardError as why:
            bad = why
        if ranks.any(bad is not None):
            other = "a clip of another rank cannot be read; that rank says which"
            raise bad or ShardError(other)
        if found is None:
            return
        yield found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode and without gradients; restores the mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def rank_slice(count: int, ranks: Ranks) -> np.ndarray:
    """This rank's indices of `count` items; `ranks.gather(...)[:count]` restores their order.

    All ranks get equally many (ZeRO-3 gathers weights in step), so the last ones repeat some.
    """
    each = -(-count // ranks.world)
    return (np.arange(each) + ranks.rank * each) % count


def read_texts(shards: Shards) -> Texts:
    """All captions and labels of shards; raises `ShardError` on a clip that has unreadable ones."""
    captions: list[str] = []
    clip_of_caption: list[int] = []
    labels: list[tuple[str, ...]] = []
    names: list[tuple[str, ...]] = []
    folds: list[str] = []
    sources: list[str] = []
    with reading_in_order(shards, np.arange(len(shards))) as reached:
        for clip in range(len(shards)):
            reached(clip)
            try:
                record = shards.record(clip, captionless=True)
            except Unusable as why:
                raise ShardError(
                    f"{shards.name(clip)}: {why}; {remedy_of(shards.folder(clip))}"
                ) from None
            captions += record["text"]
            clip_of_caption += [clip] * len(record["text"])
            labels.append(_labels(record.get("tag")))
            names.append(_names(record))
            folds.append(_named(record, "fold"))
            sources.append(_named(record, "source"))
    labelled = tuple(labels), tuple(names)
    return Texts(captions, clip_of_caption, *labelled, tuple(folds), tuple(sources))


def _named(record: dict[str, Any], column: str) -> str:
    """The text or number in a column of the manifest; "" without one."""
    found = _original(record).get(column)
    known = isinstance(found, (str, int, float)) and not isinstance(found, bool)
    return str(found).strip() if known else ""


def _original(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of the manifest that have no meaning of their own."""
    original = record.get("original_data")
    return original if isinstance(original, dict) else {}


def _names(record: dict[str, Any]) -> tuple[str, ...]:
    file = _original(record).get("file")
    names = (name.strip() for name in (file, record.get("id")) if isinstance(name, str))
    return tuple(dict.fromkeys(names))


def _labels(tag: object) -> tuple[str, ...]:
    """LAION's `tag`: class names, or one of them."""
    names: Iterable[object] = (
        [tag] if isinstance(tag, str) else tag if isinstance(tag, list) else []
    )
    labels = (" ".join(n.replace("_", " ").split()) for n in names if isinstance(n, str))
    return tuple(dict.fromkeys(label for label in labels if label))
