"""Geometry of the embeddings: alignment of pairs, uniformity of each modality.

    alignment  = mean over captions of |m - t|^2                              (0 is best)
    uniformity = ln mean over pairs i < j of exp(-2 |z_i - z_j|^2)            (low is even)

On the sphere |z_i - z_j|^2 = 2 - 2 cos lies in [0, 4], so the exponentials lie in [e^-8, 1] and
their plain sum in float64 is exact enough; it is taken tile by tile, some of them on each rank.

Source: Wang and Isola 2020; the language-encoder paper, section 5.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flap_fast.checks import require
from flap_fast.evaluation.embed import Embeddings, Texts
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Sheet
from flap_fast.ranks import Ranks

_TILE = 4096


def geometry(
    media: Tensor,
    text: Tensor,
    clip_of_caption: Tensor,
    ranks: Ranks | None = None,
    *,
    modality: str = "audio",
) -> dict[str, float | None]:
    """Alignment and uniformity, the same on all ranks. Collective: call on every rank.

    Args:
        media: (N, d) unit rows.
        text: (M, d) unit rows.
        clip_of_caption: (M,) int64, the clip that each caption belongs to.
    """
    require_captions(len(text))
    ranks = ranks or Ranks()
    return {
        "alignment": alignment(media, text, clip_of_caption),
        f"uniformity_{modality}": uniformity(media, ranks),
        "uniformity_text": uniformity(text, ranks),
    }


def require_captions(captions: int) -> None:
    """Raise `ConfigError` unless there are captions."""
    require(captions > 0, "the geometry of pairs", "have captions", "none")


def alignment(media: Tensor, text: Tensor, clip_of_caption: Tensor) -> float:
    """Mean squared distance of a caption from its clip, in [0, 4]."""
    tiles = zip(text.split(_TILE), clip_of_caption.split(_TILE), strict=True)
    far = [(media[o].double() - t.double()).square().sum() for t, o in tiles]
    return (torch.stack(far).sum() / len(text)).item()


def uniformity(rows: Tensor, ranks: Ranks) -> float | None:
    """Uniformity over all pairs of unit rows (N, d), in [-8, 0]; None for a single row."""
    tiles = rows.float().split(_TILE)
    pairs = [(i, j) for i in range(len(tiles)) for j in range(i, len(tiles))]
    total = torch.zeros(1, dtype=torch.float64, device=rows.device)
    for i, j in pairs[ranks.rank :: ranks.world]:
        kernel = (tiles[i] @ tiles[j].T).mul_(4).sub_(4).exp_()
        if i == j:
            kernel.triu_(diagonal=1)
        total += kernel.sum(dtype=torch.float64)
    count = len(rows) * (len(rows) - 1) / 2
    return math.log(ranks.gather(total).sum().item() / count) if count else None


def _check(model: EvaluatedModel, texts: Texts) -> None:
    require_captions(len(texts.captions))


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, float | None]:
    return geometry(e.media, e.text, e.clip_of_caption, model.ranks, modality=model.modality)


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    ours = ("this model", *("-" if v is None else f"{v:.3f}" for v in found.values()))
    head = ("system", *(key.replace("_", ", ") for key in found))
    note = "Alignment: 0 is best. Uniformity: the lower, the more even."
    return Sheet(f"Geometry, {name}", head, [ours], note=note)


def _metrics(found: dict[str, float | None]) -> dict[str, float]:
    return {f"geometry/{name}": value for name, value in found.items() if value is not None}


EVALUATION = Evaluation(
    name="geometry", data="clips", check=_check, score=_score, sheet=_sheet, metrics=_metrics
)
