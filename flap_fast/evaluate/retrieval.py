"""How often a sound finds its captions, and a caption its sound.

    text_to_audio   each of M captions ranks N sounds; one is right       (FLAP's T-A)
    audio_to_text   each of N sounds ranks M captions; its own are right  (FLAP's A-T)

Places count from 0; of equal scores the smaller index comes first. Any number of captions a sound,
also ragged. Cosines are computed in chunks of a fixed size, never N x M of them, and each rank
takes its share of the queries. The language-encoder paper calls A-T "text retrieval" and T-A
"audio retrieval".

Source: SPEC 13.1; DCASE 2023 Task 6b for the sorted mAP@10.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluate.embed import share
from flap_fast.ranks import Ranks

_COSINES = 2**25
"""Of a chunk: 128 MiB, and 96 MiB more while they are compared."""
TOP = (1, 5, 10)


def retrieval(
    audio: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks | None = None
) -> dict[str, dict[str, float] | int]:
    """Scores of both directions, shares in [0, 1]; every rank must ask, all get the same.

    Args:
        audio: (N, d) unit rows.
        text: (M, d) unit rows.
        clip_of_caption: (M,) int64, the sound that each caption belongs to; every sound has one.
    """
    need_captions(clip_of_caption.unique().numel(), len(audio))
    ranks = ranks or Ranks()
    return {
        "audio_to_text": audio_to_text(
            caption_places(audio, text, clip_of_caption, ranks), clip_of_caption, len(audio)
        ),
        "text_to_audio": text_to_audio(sound_places(audio, text, clip_of_caption, ranks)),
        "clips": len(audio),
        "captions": len(text),
    }


def need_captions(captioned: int, sounds: int) -> None:
    """Fail unless all sounds have captions."""
    if captioned < sounds:
        raise ConfigError(
            f"each of the {sounds} sounds must have a caption to be retrieved by, got "
            f"{sounds - captioned} without; score their labels with --tasks zero_shot"
        )


def sound_places(audio: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks) -> Tensor:
    """(M,) int64: where each caption finds its sound among all sounds."""
    captions = torch.arange(len(text), device=clip_of_caption.device)
    return places(text, captions, audio, clip_of_caption, ranks)


def caption_places(audio: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks) -> Tensor:
    """(M,) int64: where each caption's sound finds it among all captions."""
    captions = torch.arange(len(text), device=clip_of_caption.device)
    return places(audio, clip_of_caption, text, captions, ranks)


def places(queries: Tensor, asks: Tensor, answers: Tensor, wanted: Tensor, ranks: Ranks) -> Tensor:
    """(Q,) int64: where query row `asks[i]` finds answer row `wanted[i]`, for i of Q.

    Args:
        queries: (N, d).
        answers: (M, d).
    """
    mine = torch.from_numpy(share(len(asks), ranks)).to(asks.device)
    rows = max(1, _COSINES // max(len(answers), queries.shape[1]))
    table = answers.float().T
    found = [
        _places(queries[asks[some]].float() @ table, wanted[some]) for some in mine.split(rows)
    ]
    return ranks.gather(torch.cat(found))[: len(asks)]


def _places(cosines: Tensor, wanted: Tensor) -> Tensor:
    """(Q,) places of each row's wanted column: how many others are not surely behind it."""
    own = cosines.gather(1, wanted[:, None])
    behind = torch.arange(cosines.shape[1], device=cosines.device) >= wanted[:, None]
    behind = behind.logical_and_(cosines == own).logical_or_(cosines < own)
    return behind.logical_not_().sum(1)


def text_to_audio(places: Tensor) -> dict[str, float]:
    """Scores of queries with one right answer each."""
    found = {f"R@{k}": _share(places < k) for k in TOP}
    precision = torch.where(places < 10, 1 / (places.double() + 1), 0.0)
    return found | {"mAP@10": precision.mean().item()} | _mean_and_median(places)


def audio_to_text(places: Tensor, clip_of_caption: Tensor, sounds: int) -> dict[str, float]:
    """Scores of queries with one or more right answers: found if any of them is among the first k.

    Adds the share of a sound's captions among the first k (`frac_R@k`, DCASE's reading), and
    `mAP@10_laion`, LAION-CLAP's statistic, which leaves each sound's places unsorted (SPEC D23).
    """
    count = torch.zeros(sounds, dtype=torch.int64, device=places.device).index_add_(
        0, clip_of_caption, torch.ones_like(clip_of_caption)
    )
    best = torch.full_like(count, torch.iinfo(torch.int64).max)
    best = best.scatter_reduce(0, clip_of_caption, places, "amin")
    scores = {f"R@{k}": _share(best < k) for k in TOP}
    scores["mAP@10"] = _precision(places, clip_of_caption, count, by_place=True)
    scores |= _mean_and_median(best)
    scores["mAP@10_laion"] = _precision(places, clip_of_caption, count, by_place=False)
    for k in TOP:
        mine = torch.zeros(sounds, dtype=torch.float64, device=places.device)
        mine.index_add_(0, clip_of_caption, (places < k).double())
        scores[f"frac_R@{k}"] = (mine / count).mean().item()
    return scores


def _precision(places: Tensor, clip_of_caption: Tensor, count: Tensor, *, by_place: bool) -> float:
    """Mean over sounds of sum_i i / (place_i + 1) / captions, over its captions in the first 10."""
    order = torch.arange(len(places), device=places.device)
    order = places.argsort(stable=True) if by_place else order
    order = order[clip_of_caption[order].argsort(stable=True)]
    places, clip_of_caption = places[order], clip_of_caption[order]
    hit = (places < 10).double()
    total = hit.cumsum(0)
    first = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    earlier = (total - hit)[first][clip_of_caption]  # hits of the sounds before this one
    values = hit * (total - earlier) / (places.double() + 1) / count[clip_of_caption]
    return (values.sum() / len(count)).item()


def _mean_and_median(places: Tensor) -> dict[str, float]:
    """Mean and median place, counted from 1; a median between two places is rounded down."""
    ordered, n = places.sort().values, len(places)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) // 2 + 1
    return {"mean_rank": places.double().mean().item() + 1, "median_rank": float(median.item())}


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def chance(clip_of_caption: Tensor, sounds: int) -> dict[str, dict[str, float]]:
    """R@k of a random order, for the same clips and captions."""
    a2t = chance_of_any(clip_of_caption.bincount(minlength=sounds), len(clip_of_caption))
    t2a = {f"R@{k}": min(1.0, k / sounds) for k in TOP}
    return {"audio_to_text": a2t, "text_to_audio": t2a}


def chance_of_any(right: Tensor, answers: int) -> dict[str, float]:
    """R@k of a random order of `answers`, where query i has `right[i]` right ones among them."""
    kinds, queries = right.unique(return_counts=True)
    pairs = list(zip(kinds.tolist(), queries.tolist(), strict=True))
    missed = {k: sum(_missed(answers, mine, k) * n for mine, n in pairs) for k in TOP}
    return {f"R@{k}": 1 - missed[k] / len(right) for k in TOP}


def _missed(answers: int, mine: int, k: int) -> float:
    """That none of a query's right answers is among k random ones."""
    k = min(k, answers)
    return math.comb(answers - mine, k) / math.comb(answers, k)
