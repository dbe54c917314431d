"""How the embeddings lie on the sphere: alignment of pairs, uniformity of each side.

    alignment  = mean over captions of |a - t|^2                              (0 is best)
    uniformity = ln mean over pairs i < j of exp(-2 |z_i - z_j|^2)            (low is even)

On the sphere |z_i - z_j|^2 = 2 - 2 cos lies in [0, 4], so the exponentials lie in [e^-8, 1] and
their plain sum in float64 is exact enough; it is taken tile by tile, each rank its share of them.

Source: Wang and Isola 2020; the language-encoder paper section 5.2; SPEC 13.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flap_fast.checks import require
from flap_fast.ranks import Ranks

_TILE = 4096


def geometry(
    audio: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks | None = None
) -> dict[str, float | None]:
    """Alignment and uniformity; every rank must ask, all get the same.

    Args:
        audio: (N, d) unit rows.
        text: (M, d) unit rows.
        clip_of_caption: (M,) int64, the sound that each caption belongs to.
    """
    need_pairs(len(text))
    ranks = ranks or Ranks()
    return {
        "alignment": alignment(audio, text, clip_of_caption),
        "uniformity_audio": uniformity(audio, ranks),
        "uniformity_text": uniformity(text, ranks),
    }


def need_pairs(captions: int) -> None:
    """Fail unless there are captions."""
    require(captions > 0, "the geometry of pairs", "have captions", "none")


def alignment(audio: Tensor, text: Tensor, clip_of_caption: Tensor) -> float:
    """Mean squared distance of a caption from its sound, in [0, 4]."""
    parts = zip(text.split(_TILE), clip_of_caption.split(_TILE), strict=True)
    far = [(audio[o].double() - t.double()).square().sum() for t, o in parts]
    return (torch.stack(far).sum() / len(text)).item()


def uniformity(rows: Tensor, ranks: Ranks) -> float | None:
    """Over all pairs of unit rows (N, d), in [-8, 0]; None of a single row, which has no pair."""
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
