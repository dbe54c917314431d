"""Retrieval of captions by clips and of clips by captions.

    text_to_media   each of M captions ranks N clips; one is right        (of sounds FLAP's T-A)
    media_to_text   each of N clips ranks M captions; its own are right   (of sounds FLAP's A-T)

The position of a right answer counts from 0; of equal scores the smaller index comes first. Any
number of captions a clip, also ragged. Cosines are computed in chunks of a fixed size, never N x M
of them, and each rank takes some of the queries. The language-encoder paper calls A-T "text
retrieval" and T-A "audio retrieval".

With eval.equal_captions, right for a caption are all clips that have it or an equal one, and for a
clip all captions equal to one of its own. A query is found by the best of its right answers. Equal
captions have one score and take places one after the other; by chance, too.

mAP@k is the mean of sum_i i / rank_i / R over queries: R right answers, of which the i-th stands at
rank_i <= k. As in DCASE's baselines of 2023 and 2025, R is not cut off at k.

Source: FLAP, arXiv 2311.01615, section 4; DCASE 2023 Task 6b for the sorted mAP@10, 2025 Task 6 for
mAP@16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluation.chance import TOP, chance_of_any, chance_of_groups
from flap_fast.evaluation.embed import Embeddings, Texts, rank_slice
from flap_fast.evaluation.equal_captions import Pairs, equal_to_others, right_pairs, text_numbers
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.retrieval_tables import directions, directions_of, sheet, terminal
from flap_fast.ranks import Ranks

_COSINES = 2**25
"""Of a chunk: 128 MiB, and 96 MiB more while they are compared."""
_PRECISION_AT = (10, 16)


def retrieval(
    media: Tensor,
    text: Tensor,
    clip_of_caption: Tensor,
    ranks: Ranks | None = None,
    *,
    modality: str,
    texts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores of both directions, fractions in [0, 1]. Collective: call on every rank.

    Args:
        media: (N, d) unit rows.
        text: (M, d) unit rows.
        clip_of_caption: (M,) int64, the clip that each caption belongs to; every clip has one.
        modality: what the directions are called by, as in audio_to_text.
        texts: (M,) as `text_numbers` gives them; with it, equal captions count as right.
    """
    require_captions(clip_of_caption.unique().numel(), len(media), modality)
    ranks = ranks or Ranks()
    to_text, to_media = directions(modality)
    own = caption_positions(media, text, clip_of_caption, ranks)
    by_media = media_to_text_scores(own, clip_of_caption, len(media))
    if (pairs := _with_equal(clip_of_caption, texts)) is None:
        by_text = text_to_media_scores(media_positions(media, text, clip_of_caption, ranks))
    else:
        of_captions, of_clips = pairs
        by_text = scores_of_pairs(text, media, of_captions, ranks)
        # LAION-CLAP's stays a statistic of a clip's own captions.
        by_media |= scores_of_pairs(media, text, of_clips, ranks)
    return {to_text: by_media, to_media: by_text, "clips": len(media), "captions": len(text)}


def _with_equal(clip_of_caption: Tensor, texts: Sequence[int] | None) -> tuple[Pairs, Pairs] | None:
    """`right_pairs` if there are others than each caption and its clip."""
    clips = clip_of_caption.tolist()
    if texts is None or not equal_to_others(clips, texts):
        return None
    return right_pairs(clips, texts)


def scores_of_pairs(
    queries: Tensor, answers: Tensor, pairs: Pairs, ranks: Ranks
) -> dict[str, float]:
    """Scores of queries with any number of right answers, without LAION-CLAP's statistic."""
    asks, wanted = torch.tensor(pairs, device=queries.device).T
    positions = answer_positions(queries, asks, answers, wanted, ranks)
    found = media_to_text_scores(positions, asks, len(queries))
    return {name: value for name, value in found.items() if name != "mAP@10_laion"}


def require_captions(captioned: int, clips: int, modality: str) -> None:
    """Raise `ConfigError` unless all clips have captions."""
    if captioned < clips:
        raise ConfigError(
            f"each of the {clips} {'sounds' if modality == 'audio' else modality + 's'} must have "
            f"a caption to be retrieved by, got {clips - captioned} without; score their labels "
            "with --tasks zero_shot"
        )


def media_positions(media: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks) -> Tensor:
    """(M,) int64: the position of each caption's clip among all clips."""
    captions = torch.arange(len(text), device=clip_of_caption.device)
    return answer_positions(text, captions, media, clip_of_caption, ranks)


def caption_positions(media: Tensor, text: Tensor, clip_of_caption: Tensor, ranks: Ranks) -> Tensor:
    """(M,) int64: the position of each caption among all captions, as its clip ranks them."""
    captions = torch.arange(len(text), device=clip_of_caption.device)
    return answer_positions(media, clip_of_caption, text, captions, ranks)


def answer_positions(
    queries: Tensor, asks: Tensor, answers: Tensor, wanted: Tensor, ranks: Ranks
) -> Tensor:
    """(Q,) int64: the position of answer `wanted[i]` among all, as query `asks[i]` ranks them.

    Args:
        queries: (N, d).
        answers: (M, d).
    """
    mine = torch.from_numpy(rank_slice(len(asks), ranks)).to(asks.device)
    rows = max(1, _COSINES // max(len(answers), queries.shape[1]))
    table = answers.float().T
    found = [
        _positions(queries[asks[some]].float() @ table, wanted[some]) for some in mine.split(rows)
    ]
    return ranks.gather(torch.cat(found))[: len(asks)]


def _positions(cosines: Tensor, wanted: Tensor) -> Tensor:
    """(Q,) positions of each row's target column: how many others do not score strictly lower."""
    own = cosines.gather(1, wanted[:, None])
    behind = torch.arange(cosines.shape[1], device=cosines.device) >= wanted[:, None]
    behind = behind.logical_and_(cosines == own).logical_or_(cosines < own)
    return behind.logical_not_().sum(1)


def text_to_media_scores(positions: Tensor) -> dict[str, float]:
    """Scores of queries with one right answer each."""
    found = {f"R@{k}": _fraction(positions < k) for k in TOP}
    for k in _PRECISION_AT:
        precision = torch.where(positions < k, 1 / (positions.double() + 1), 0.0)
        found[f"mAP@{k}"] = precision.mean().item()
    return found | _mean_and_median(positions)


def media_to_text_scores(
    positions: Tensor, clip_of_caption: Tensor, clips: int
) -> dict[str, float]:
    """Scores of queries with one or more right answers: found if any of them is among the first k.

    Adds the fraction of a clip's captions among the first k (`frac_R@k`, DCASE's reading), and
    `mAP@10_laion`, LAION-CLAP's statistic, which leaves each clip's positions unsorted.
    """
    count = torch.zeros(clips, dtype=torch.int64, device=positions.device).index_add_(
        0, clip_of_caption, torch.ones_like(clip_of_caption)
    )
    best = torch.full_like(count, torch.iinfo(torch.int64).max)
    best = best.scatter_reduce(0, clip_of_caption, positions, "amin")
    scores = {f"R@{k}": _fraction(best < k) for k in TOP}
    for k in _PRECISION_AT:
        scores[f"mAP@{k}"] = _precision(positions, clip_of_caption, count, k, by_position=True)
    scores |= _mean_and_median(best)
    scores["mAP@10_laion"] = _precision(positions, clip_of_caption, count, 10, by_position=False)
    for k in TOP:
        mine = torch.zeros(clips, dtype=torch.float64, device=positions.device)
        mine.index_add_(0, clip_of_caption, (positions < k).double())
        scores[f"frac_R@{k}"] = (mine / count).mean().item()
    return scores


def _precision(
    positions: Tensor, clip_of_caption: Tensor, count: Tensor, k: int, *, by_position: bool
) -> float:
    """Mean over clips of sum_i i / (position_i + 1) / captions, of its captions in the first k."""
    order = torch.arange(len(positions), device=positions.device)
    order = positions.argsort(stable=True) if by_position else order
    order = order[clip_of_caption[order].argsort(stable=True)]
    positions, clip_of_caption = positions[order], clip_of_caption[order]
    hit = (positions < k).double()
    total = hit.cumsum(0)
    first = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    earlier = (total - hit)[first][clip_of_caption]  # hits of the clips before this one
    values = hit * (total - earlier) / (positions.double() + 1) / count[clip_of_caption]
    return (values.sum() / len(count)).item()


def _mean_and_median(positions: Tensor) -> dict[str, float]:
    """Mean and median position, from 1; a median between two positions is rounded down."""
    ordered, n = positions.sort().values, len(positions)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) // 2 + 1
    return {"mean_rank": positions.double().mean().item() + 1, "median_rank": float(median.item())}


def _fraction(hits: Tensor) -> float:
    return hits.double().mean().item()


def chance(
    clip_of_caption: Tensor, clips: int, modality: str, texts: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """R@k of a random order, for the same clips, captions and right answers."""
    to_text, to_media = directions(modality)
    if texts is not None and (pairs := _with_equal(clip_of_caption, texts)) is not None:
        own: list[set[int]] = [set() for _ in range(clips)]
        for clip, text in zip(clip_of_caption.tolist(), texts, strict=True):
            own[clip].add(text)
        return {
            to_text: chance_of_groups(texts, own),
            to_media: chance_of_any(torch.tensor(pairs[0])[:, 0].bincount(), clips),
        }
    right = clip_of_caption.bincount(minlength=clips)
    return {
        to_text: chance_of_any(right, len(clip_of_caption)),
        to_media: {f"R@{k}": min(1.0, k / clips) for k in TOP},
    }


# The evaluation


def _check(model: EvaluatedModel, texts: Texts) -> None:
    require_captions(len(set(texts.clip_of_caption)), len(texts.labels), model.modality)


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, Any]:
    numbers, count_as_right = text_numbers(e.captions), model.config.eval.equal_captions
    texts, name = numbers if count_as_right else None, model.modality
    found = retrieval(e.media, e.text, e.clip_of_caption, model.ranks, modality=name, texts=texts)
    found["chance"] = chance(e.clip_of_caption, len(e.media), name, texts)
    equal = equal_to_others(e.clip_of_caption.tolist(), numbers)
    return {**found, "equal_captions": equal, "equal_captions_are_right": count_as_right}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """{"audio_to_text/R@1": ..}."""
    return {
        f"{direction}/{metric}": value
        for direction in directions_of(found)
        for metric, value in found[direction].items()
        if metric.startswith("R@") or metric == "mAP@10"
    }


def _selects(found: dict[str, Any]) -> float:
    both = [found[direction]["mAP@10"] for direction in directions_of(found)]
    return sum(both) / len(both)


EVALUATION = Evaluation(
    name="retrieval",
    data="clips",
    check=_check,
    score=_score,
    sheet=sheet,
    metrics=_metrics,
    selects=_selects,
    terminal=terminal,
)
