"""What embeddings say that is wrong: a collapsed tower, pairs that do not belong together.

The mean cosine of N different unit rows z is (|sum z|^2 - N) / (N (N - 1)): it takes no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flap_fast.tools.doctor.records import Check, Embedded, Examined, Found, Severity

# Mean cosines of other clips, and of other captions.
_COLLAPSED, _NARROW = 0.95, 0.85
# Clips from which on ranks say anything, and how many standard deviations of chance.
_FEW, _SIGMAS = 16, 3.0


def mean_cosine(rows: Tensor) -> float:
    """The mean cosine of different rows of (N, d) unit rows."""
    count = len(rows)
    total = float(rows.double().sum(0).square().sum())
    return (total - count) / (count * (count - 1))


def mean_rank(media: Tensor, text: Tensor) -> float:
    """Where a clip's own caption stands among the others', in [0, 1]: 0 first, 0.5 at chance."""
    cosines = media @ text.T
    own = cosines.diagonal()[:, None]
    others = len(media) - 1
    ahead = (cosines > own).sum(1) + ((cosines == own).sum(1) - 1) / 2
    return float(ahead.double().mean() / others)


def _embedded(e: Examined) -> Embedded:
    assert e.embedded is not None
    return e.embedded


def _not_finite(e: Examined) -> Iterator[Found]:
    if e.not_embedded:
        yield Found("error", "the model", e.not_embedded)


def _collapsed(e: Examined) -> Iterator[Found]:
    sample = _embedded(e)
    first = {text: n for n, text in reversed(list(enumerate(sample.captions)))}
    distinct = torch.tensor(sorted(first.values()))
    modality = e.config.encoder.modality
    for tower, rows in ((modality, sample.media), ("text", sample.text[distinct])):
        if len(rows) < 2:
            continue
        cosine = mean_cosine(rows)
        got = f"{cosine:.3f} of {len(rows)} {tower} embeddings of {sample.split}"
        if cosine > _NARROW:
            level: Severity = "error" if cosine > _COLLAPSED else "warning"
            yield Found(level, f"the {tower} tower", got, len(rows), len(rows))


def _unrelated(e: Examined) -> Iterator[Found]:
    sample = _embedded(e)
    count = len(sample.media)
    if count < _FEW:
        return
    rank, chance = mean_rank(sample.media, sample.text), 1 / math.sqrt(12 * count)
    if rank > 0.5 - _SIGMAS * chance:
        got = f"a clip's own caption ranks {rank:.2f} of the way down, chance is 0.50"
        yield Found("error", "both towers", got, count, count)


NOT_FINITE = Check(
    name="embeddings not finite",
    needs="weights",
    rule="embed clips and captions to finite numbers",
    remedy="take an earlier checkpoint, and lower optim.lr in a new run: its weights are too large",
    find=_not_finite,
)
COLLAPSED = Check(
    name="a collapsed tower",
    needs="embeddings",
    rule=f"have a mean cosine of different embeddings below {_NARROW}",
    remedy="do not search with it: all answers are about as near. Weights of another model or "
    "front end, or a learning rate that was too high",
    find=_collapsed,
)
UNRELATED = Check(
    name="pairs at chance",
    needs="embeddings",
    rule="rank a clip's own caption before those of others",
    remedy="see whether front end and tokenizer are those that the weights were trained with, and "
    "whether captions belong to their sounds",
    find=_unrelated,
)
