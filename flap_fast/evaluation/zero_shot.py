"""Zero-shot classification from class names.

    class vector = normalise(mean over templates of normalise(text(template with the class name)))

Each clip ranks the C classes by cosine. A clip may have several labels: it is right at k if any of
them is among its first k. `mAP` is the mean over classes of the average precision with which a
class ranks all clips, as data sets of many labels use it.

Source: Goel et al., CyCLIP, arXiv 2205.14459 (the protocol of zero-shot classification).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import require
from flap_fast.evaluation import papers
from flap_fast.evaluation.chance import TOP, chance_of_any
from flap_fast.evaluation.embed import Embeddings, EmbedTexts, Texts, rank_slice
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.prompts import fill, prompts
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.retrieval import answer_positions, media_to_text_scores
from flap_fast.evaluation.sheet import Row, Sheet, percent
from flap_fast.ranks import Ranks


def zero_shot(
    media: Tensor,
    labels: Sequence[Sequence[str]],
    classes: Sequence[str],
    templates: Sequence[str],
    texts: EmbedTexts,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Scores of the clips that have labels, fractions in [0, 1]. Collective.

    Args:
        media: (N, d) unit rows.
        labels: the class names of each clip; clips without any are counted as `unlabelled`.
        classes: what to choose from; if empty, all labels of the clips, sorted.

    Raises:
        ConfigError: no clip has a label, or one has a label that is no class.
    """
    ranks = ranks or Ranks()
    known = classes_of(labels, classes)
    named = [own for own in labels if own]
    media = media[torch.tensor([bool(own) for own in labels], device=media.device)]
    pairs = [(n, known[name]) for n, own in enumerate(named) for name in own]
    clip_of_caption, wanted = torch.tensor(pairs, device=media.device).T
    vectors = class_vectors(texts, list(known), templates)

    positions = answer_positions(media, clip_of_caption, vectors, wanted, ranks)
    found = media_to_text_scores(positions, clip_of_caption, len(media))
    scores: dict[str, Any] = {f"top_{k}": found[f"R@{k}"] for k in TOP}
    scores |= {name: found[name] for name in ("mAP@10", "mean_rank", "median_rank")}
    scores["mAP"] = _mean_precision(media, vectors, clip_of_caption, wanted, ranks)
    by_chance = chance_of_any(clip_of_caption.bincount(minlength=len(media)), len(known))
    scores["chance"] = {f"top_{k}": by_chance[f"R@{k}"] for k in TOP}
    counts = {"clips": len(media), "unlabelled": len(labels) - len(media), "classes": len(known)}
    return scores | counts | {"templates": len(templates)}


def classes_of(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> dict[str, int]:
    """The index of each class; raises `ConfigError` as `zero_shot` does."""
    present = sorted({name for own in labels for name in own})
    require(bool(present), "zero-shot data", "have labels", "none", "name them in the manifest")
    known = {name: n for n, name in enumerate(classes or present)}
    strange = [name for name in present if name not in known]
    require(not strange, "a label", f"be one of the {len(known)} classes", ", ".join(strange[:3]))
    return known


def class_vectors(texts: EmbedTexts, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, d) unit rows."""
    rows = texts([fill(template, name) for name in classes for template in templates])
    each = functional.normalize(rows, dim=-1).unflatten(0, (len(classes), len(templates)))
    return functional.normalize(each.mean(1), dim=-1)


def _mean_precision(
    media: Tensor, vectors: Tensor, clip_of_caption: Tensor, wanted: Tensor, ranks: Ranks
) -> float:
    """Mean average precision over the classes that a clip has; each rank takes some of them."""
    present = wanted.unique()
    own = []
    for n in present[torch.from_numpy(rank_slice(len(present), ranks)).to(present.device)].tolist():
        right = torch.zeros(len(media), dtype=torch.bool, device=media.device)
        right[clip_of_caption[wanted == n]] = True
        own.append(average_precision(media.float() @ vectors[n], right))
    return ranks.gather(torch.stack(own))[: len(present)].mean().item()


def average_precision(scores: Tensor, right: Tensor) -> Tensor:
    """Area under the steps of precision over recall; equal scores make one step.

    Args:
        scores: (N,).
        right: (N,) bool, at least one of them.
    """
    order = scores.argsort(descending=True)
    scores, hits = scores[order], right[order].double().cumsum(0)
    end = torch.ones_like(right)
    end[:-1] = scores[1:] != scores[:-1]
    taken = end.nonzero()[:, 0]
    found = hits[taken]
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return (gained * found / (taken + 1)).sum() / hits[-1]


def _check(model: EvaluatedModel, texts: Texts) -> None:
    prompts(model.config.eval.templates)
    classes_of(texts.labels, model.classes)


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, Any]:
    templates = prompts(model.config.eval.templates)
    found = zero_shot(e.media, e.labels, model.classes, templates, model.texts, model.ranks)
    # Files name the modality only where it is not sound's, as they always have.
    return found if model.modality == "audio" else {**found, "modality": model.modality}


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    columns = ("top_1", "top_5", "mAP@10", "mAP")
    many = found["templates"] > 1
    known = papers.data_set(path, found.get("modality", "audio")) or ""
    rows: list[Row] = []
    for row in papers.ZERO_SHOT.get(known, ()):
        top_1 = row.many if many else row.one
        if top_1:
            rows.append((papers.cited(row), top_1, "-", "-", "-"))
    ours = ("this model", *(percent(found[column]) for column in columns))
    chance = ("chance", *(percent(found["chance"][f"top_{k}"]) for k in (1, 5)), "-", "-")
    title = f"Zero-shot, {name}: {found['clips']} clips, {found['classes']} classes"
    note = f"In percent, {found['templates']} template{'s' if many else ''} a class."
    if found["unlabelled"]:
        note += f" {found['unlabelled']} clips without a label are left out."
    return Sheet(title, ("system", "top-1", "top-5", *columns[2:]), [ours, chance], rows, note)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    return {f"zero_shot/{name}": found[name] for name in ("top_1", "top_5", "mAP@10", "mAP")}


EVALUATION = Evaluation(
    name="zero_shot",
    data="clips",
    check=_check,
    score=_score,
    sheet=_sheet,
    metrics=_metrics,
    selects=lambda found: found["top_1"],
)
