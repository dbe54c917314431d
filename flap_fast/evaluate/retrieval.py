"""How often a sound finds its captions, and a caption its sound.

    text_to_audio   each of M captions ranks N sounds; one is right       (FLAP's T-A)
    audio_to_text   each of N sounds ranks M captions; its own are right  (FLAP's A-T)

Ranks count from 0; of equal scores the smaller index comes first. Any number of captions a sound,
also ragged. Scores are computed in chunks: no N x M matrix. The language-encoder paper calls A-T
"text retrieval" and T-A "audio retrieval".

Source: SPEC 13.1; DCASE 2023 Task 6b for the sorted mAP@10.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1024
TOP = (1, 5, 10)


def retrieval(audio: Tensor, text: Tensor, owner: Tensor) -> dict[str, dict[str, float] | int]:
    """Scores of both directions, shares in [0, 1].

    Args:
        audio: (N, d) unit rows.
        text: (M, d) unit rows.
        owner: (M,) int64, the sound that each caption belongs to; every sound has one.
    """
    if owner.unique().numel() != len(audio):
        raise ValueError(f"owner must name each of the {len(audio)} sounds, got {owner.unique()}")
    return {
        "audio_to_text": audio_to_text(caption_ranks(audio, text, owner), owner, len(audio)),
        "text_to_audio": text_to_audio(sound_ranks(audio, text, owner)),
        "clips": len(audio),
        "captions": len(text),
    }


def sound_ranks(audio: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """(M,) int64: where each caption finds its sound among all sounds."""
    parts = zip(text.split(_CHUNK), owner.split(_CHUNK), strict=True)
    return torch.cat([_ranks(rows.float() @ audio.float().T, mine) for rows, mine in parts])


def caption_ranks(audio: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """(M,) int64: where each caption's sound finds it among all captions."""
    captions = torch.arange(len(text), device=text.device)
    parts = zip(captions.split(_CHUNK), owner.split(_CHUNK), strict=True)
    return torch.cat([_ranks(audio[o].float() @ text.float().T, mine) for mine, o in parts])


def _ranks(scores: Tensor, target: Tensor) -> Tensor:
    """(Q,) ranks of each row's target column."""
    own = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(1)


def text_to_audio(ranks: Tensor) -> dict[str, float]:
    """Scores of queries with one right answer each."""
    found = {f"R@{k}": _share(ranks < k) for k in TOP}
    precision = torch.where(ranks < 10, 1 / (ranks.double() + 1), 0.0)
    return found | {"mAP@10": precision.mean().item()} | _places(ranks)


def audio_to_text(ranks: Tensor, owner: Tensor, sounds: int) -> dict[str, float]:
    """Scores of queries with one or more right answers: found if any of them is among the first k.

    Adds the share of a sound's captions among the first k (`frac_R@k`, DCASE's reading), and
    `mAP@10_laion`, LAION-CLAP's statistic, which leaves each sound's ranks unsorted (SPEC D23).
    """
    count = torch.zeros(sounds, dtype=torch.int64, device=ranks.device).index_add_(
        0, owner, torch.ones_like(owner)
    )
    best = torch.full_like(count, torch.iinfo(torch.int64).max)
    best = best.scatter_reduce(0, owner, ranks, "amin")
    scores = {f"R@{k}": _share(best < k) for k in TOP}
    scores["mAP@10"] = _precision(ranks, owner, count, by_rank=True)
    scores |= _places(best)
    scores["mAP@10_laion"] = _precision(ranks, owner, count, by_rank=False)
    for k in TOP:
        mine = torch.zeros(sounds, dtype=torch.float64, device=ranks.device)
        mine.index_add_(0, owner, (ranks < k).double())
        scores[f"frac_R@{k}"] = (mine / count).mean().item()
    return scores


def _precision(ranks: Tensor, owner: Tensor, count: Tensor, *, by_rank: bool) -> float:
    """Mean over sounds of sum_i i / (rank_i + 1) / captions, over its captions in the first ten."""
    order = ranks.argsort(stable=True) if by_rank else torch.arange(len(ranks), device=ranks.device)
    order = order[owner[order].argsort(stable=True)]
    ranks, owner = ranks[order], owner[order]
    hit = (ranks < 10).double()
    total = hit.cumsum(0)
    first = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    earlier = (total - hit)[first][owner]  # hits of the sounds before this one
    values = hit * (total - earlier) / (ranks.double() + 1) / count[owner]
    return (values.sum() / len(count)).item()


def _places(ranks: Tensor) -> dict[str, float]:
    """Mean and median place, counted from 1."""
    places = ranks.double() + 1
    return {
        "mean_rank": places.mean().item(),
        "median_rank": float(math.floor(ranks.double().quantile(0.5).item()) + 1),
    }


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def chance(owner: Tensor, sounds: int) -> dict[str, dict[str, float]]:
    """R@k of a random order, for the same clips and captions."""
    captions = len(owner)
    count = owner.bincount(minlength=sounds).tolist()
    a2t, t2a = {}, {}
    for k in TOP:
        missed = [_missed(captions, mine, k) for mine in count]
        a2t[f"R@{k}"] = 1 - sum(missed) / sounds
        t2a[f"R@{k}"] = min(1.0, k / sounds)
    return {"audio_to_text": a2t, "text_to_audio": t2a}


def _missed(captions: int, mine: int, k: int) -> float:
    """That none of a sound's captions is among k random ones."""
    k = min(k, captions)
    return math.comb(captions - mine, k) / math.comb(captions, k)
