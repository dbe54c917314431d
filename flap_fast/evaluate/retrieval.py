"""Retrieval of captions by clips and of clips by captions.

    text_to_media   each of M captions ranks N clips; one is right        (of sounds FLAP's T-A)
    media_to_text   each of N clips ranks M captions; its own are right   (of sounds FLAP's A-T)

The position of a right answer counts from 0; of equal scores the smaller index comes first. Any
number of captions a clip, also ragged. Cosines are computed in chunks of a fixed size, never N x M
of them, and each rank takes some of the queries. The language-encoder paper calls A-T "text
retrieval" and T-A "audio retrieval".

Source: FLAP, arXiv 2311.01615, section 4; DCASE 2023 Task 6b for the sorted mAP@10.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluate import papers
from flap_fast.evaluate.embed import Embeddings, Texts, rank_slice
from flap_fast.evaluate.evaluated_model import EvaluatedModel
from flap_fast.evaluate.evaluation import Evaluation
from flap_fast.evaluate.sheet import Row, Sheet, percent
from flap_fast.ranks import Ranks

_COSINES = 2**25
"""Of a chunk: 128 MiB, and 96 MiB more while they are compared."""
TOP = (1, 5, 10)


def retrieval(
    media: Tensor,
    text: Tensor,
    clip_of_caption: Tensor,
    ranks: Ranks | None = None,
    *,
    modality: str,
) -> dict[str, Any]:
    """Scores of both directions, fractions in [0, 1]. Collective: call on every rank.

    Args:
        media: (N, d) unit rows.
        text: (M, d) unit rows.
        clip_of_caption: (M,) int64, the clip that each caption belongs to; every clip has one.
        modality: what the directions are called by, as in audio_to_text.
    """
    require_captions(clip_of_caption.unique().numel(), len(media), modality)
    ranks = ranks or Ranks()
    to_text, to_media = directions(modality)
    return {
        to_text: media_to_text_scores(
            caption_positions(media, text, clip_of_caption, ranks), clip_of_caption, len(media)
        ),
        to_media: text_to_media_scores(media_positions(media, text, clip_of_caption, ranks)),
        "clips": len(media),
        "captions": len(text),
    }


def directions(modality: str) -> tuple[str, str]:
    """The names of both directions: ("audio_to_text", "text_to_audio")."""
    return f"{modality}_to_text", f"text_to_{modality}"


def directions_of(scores: dict[str, Any]) -> tuple[str, str]:
    """The names of both directions in the scores of a data set."""
    (modality,) = (key.removesuffix("_to_text") for key in scores if key.endswith("_to_text"))
    return directions(modality)


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
    precision = torch.where(positions < 10, 1 / (positions.double() + 1), 0.0)
    return found | {"mAP@10": precision.mean().item()} | _mean_and_median(positions)


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
    scores["mAP@10"] = _precision(positions, clip_of_caption, count, by_position=True)
    scores |= _mean_and_median(best)
    scores["mAP@10_laion"] = _precision(positions, clip_of_caption, count, by_position=False)
    for k in TOP:
        mine = torch.zeros(clips, dtype=torch.float64, device=positions.device)
        mine.index_add_(0, clip_of_caption, (positions < k).double())
        scores[f"frac_R@{k}"] = (mine / count).mean().item()
    return scores


def _precision(
    positions: Tensor, clip_of_caption: Tensor, count: Tensor, *, by_position: bool
) -> float:
    """Mean over clips of sum_i i / (position_i + 1) / captions, of its captions in the first 10."""
    order = torch.arange(len(positions), device=positions.device)
    order = positions.argsort(stable=True) if by_position else order
    order = order[clip_of_caption[order].argsort(stable=True)]
    positions, clip_of_caption = positions[order], clip_of_caption[order]
    hit = (positions < 10).double()
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


def chance(clip_of_caption: Tensor, clips: int, modality: str) -> dict[str, dict[str, float]]:
    """R@k of a random order, for the same clips and captions."""
    to_text, to_media = directions(modality)
    right = clip_of_caption.bincount(minlength=clips)
    return {
        to_text: chance_of_any(right, len(clip_of_caption)),
        to_media: {f"R@{k}": min(1.0, k / clips) for k in TOP},
    }


def chance_of_any(right: Tensor, answers: int) -> dict[str, float]:
    """R@k of a random order of `answers`, where query i has `right[i]` right ones among them."""
    counts, queries = right.unique(return_counts=True)
    pairs = list(zip(counts.tolist(), queries.tolist(), strict=True))
    missed = {k: sum(_missed(answers, own, k) * n for own, n in pairs) for k in TOP}
    return {f"R@{k}": 1 - missed[k] / len(right) for k in TOP}


def _missed(answers: int, own: int, k: int) -> float:
    """Probability that none of a query's `own` answers is among k random ones."""
    k = min(k, answers)
    return math.comb(answers - own, k) / math.comb(answers, k)


# The evaluation


def _check(model: EvaluatedModel, texts: Texts) -> None:
    require_captions(len(set(texts.clip_of_caption)), len(texts.labels), model.modality)


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, Any]:
    found = retrieval(e.media, e.text, e.clip_of_caption, model.ranks, modality=model.modality)
    return {**found, "chance": chance(e.clip_of_caption, len(e.media), model.modality)}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """{"audio_to_text/R@1": ..}."""
    return {
        f"{direction}/{metric}": value
        for direction in directions_of(found)
        for metric, value in found[direction].items()
        if metric.startswith("R@") or metric == "mAP@10"
    }


_COLUMNS = (*(f"R@{k}" for k in TOP), "mAP@10")


def _terminal(sets: dict[str, Any]) -> Table:
    """One table with a row for each direction, and chance."""
    sizes = [f"{n}: {s['clips']} clips, {s['captions']} captions" for n, s in sets.items()]
    caption = Text("\n".join(sizes))
    out = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    out.add_column("data", overflow="fold")  # a name may fold, a number must stay whole
    for heading in ("query to answer", *_COLUMNS, "chance R@10"):
        out.add_column(heading, no_wrap=True, min_width=len("0.000"))
    for name, found in sets.items():
        for direction in directions_of(found):
            values = (f"{found[direction][metric]:.3f}" for metric in _COLUMNS)
            by_chance = f"{found['chance'][direction]['R@10']:.3f}"
            out.add_row(Text(name), direction.replace("_", " "), *values, by_chance)
    return out


_NOTES = {
    "audio": "In percent. T-A: a caption finds its sound (the language-encoder paper's audio "
    "retrieval); A-T: a sound finds its captions (its text retrieval).",
    "image": "In percent. T-I: a caption finds its image; I-T: an image finds its captions.",
}
_CLOTHO = (
    "FLAP's rows are of Clotho's evaluation split, the language-encoder paper's of its validation "
    "split."
)


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    to_text, to_media = directions_of(found)
    modality = to_text.removesuffix("_to_text")
    known = papers.data_set(path, modality) or ""
    letter = modality[0].upper()
    head = ("system", *(f"{way} {m}" for way in (f"T-{letter}", f"{letter}-T") for m in _COLUMNS))
    ours = [percent(found[d][m]) for d in (to_media, to_text) for m in _COLUMNS]
    by_chance = [
        percent(found["chance"][d][m]) if m in found["chance"][d] else "-"
        for d in (to_media, to_text)
        for m in _COLUMNS
    ]
    rows: list[Row] = [
        (papers.cited(row), *row.text_to_media.split(), "-", *row.media_to_text.split(), "-")
        for row in papers.RETRIEVAL.get(known, ())
    ]
    rows += [
        (papers.cited(row), *"---", row.text_to_media, *"---", row.media_to_text)
        for row in papers.PRECISION.get(known, ())
    ]
    laion = percent(found[to_text]["mAP@10_laion"])
    note = f"{letter}-T mAP@10 as LAION-CLAP computes it: {laion}"
    note += f", which is what {papers.LE_4} reports." if known in papers.PRECISION else "."
    ways = f"In percent. T-{letter}: from text to {modality}; {letter}-T: from {modality} to text."
    notes = [_NOTES.get(modality, ways), note, *([_CLOTHO] if known == "Clotho" else [])]
    title = f"Retrieval, {name}: {found['clips']} clips, {found['captions']} captions"
    both = [("this model", *ours), ("chance", *by_chance)]
    return Sheet(title, head, both, rows, " ".join(notes))


EVALUATION = Evaluation(
    name="retrieval",
    data="clips",
    check=_check,
    score=_score,
    sheet=_sheet,
    metrics=_metrics,
    terminal=_terminal,
)
