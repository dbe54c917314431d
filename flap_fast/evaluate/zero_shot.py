"""Classifying sounds by what their classes are called.

    class vector = normalise(mean over templates of normalise(text(template with the class name)))

Each sound ranks the C classes by cosine. A sound may have several labels: it is then right at k if
any of them is among its first k. `mAP` is the mean over classes of the average precision with which
a class ranks all sounds, as data sets of many labels use it.

Source: CyCLIP's protocol; SPEC 13.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import require
from flap_fast.evaluate.embed import EmbedTexts, share
from flap_fast.evaluate.prompts import fill
from flap_fast.evaluate.retrieval import TOP, audio_to_text, chance_of_any, places
from flap_fast.ranks import Ranks


def zero_shot(
    audio: Tensor,
    labels: Sequence[Sequence[str]],
    classes: Sequence[str],
    templates: Sequence[str],
    texts: EmbedTexts,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Scores of the sounds that have labels, shares in [0, 1]; every rank must ask.

    Args:
        audio: (N, d) unit rows.
        labels: of each sound its class names; those without any are counted as `unlabelled`.
        classes: what to choose from; without any, all that the sounds have, sorted.

    Raises:
        ConfigError: no sound has a label, or one has a label that is no class.
    """
    ranks = ranks or Ranks()
    known = classes_of(labels, classes)
    named = [own for own in labels if own]
    audio = audio[torch.tensor([bool(own) for own in labels], device=audio.device)]
    pairs = [(n, known[name]) for n, own in enumerate(named) for name in own]
    clip_of_caption, wanted = torch.tensor(pairs, device=audio.device).T
    vectors = class_vectors(texts, list(known), templates)

    found = audio_to_text(
        places(audio, clip_of_caption, vectors, wanted, ranks), clip_of_caption, len(audio)
    )
    scores: dict[str, Any] = {f"top_{k}": found[f"R@{k}"] for k in TOP}
    scores |= {name: found[name] for name in ("mAP@10", "mean_rank", "median_rank")}
    scores["mAP"] = _mean_precision(audio, vectors, clip_of_caption, wanted, ranks)
    by_chance = chance_of_any(clip_of_caption.bincount(minlength=len(audio)), len(known))
    scores["chance"] = {f"top_{k}": by_chance[f"R@{k}"] for k in TOP}
    counts = {"clips": len(audio), "unlabelled": len(labels) - len(audio), "classes": len(known)}
    return scores | counts | {"templates": len(templates)}


def classes_of(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> dict[str, int]:
    """The number of each class; raises `ConfigError` as `zero_shot` does."""
    there = sorted({name for own in labels for name in own})
    require(bool(there), "zero-shot data", "have labels", "none", "name them in the manifest")
    known = {name: n for n, name in enumerate(classes or there)}
    strange = [name for name in there if name not in known]
    require(not strange, "a label", f"be one of the {len(known)} classes", ", ".join(strange[:3]))
    return known


def class_vectors(texts: EmbedTexts, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, d) unit rows."""
    rows = texts([fill(template, name) for name in classes for template in templates])
    each = functional.normalize(rows, dim=-1).unflatten(0, (len(classes), len(templates)))
    return functional.normalize(each.mean(1), dim=-1)


def _mean_precision(
    audio: Tensor, vectors: Tensor, clip_of_caption: Tensor, wanted: Tensor, ranks: Ranks
) -> float:
    """Mean average precision over the classes that a sound has; each rank takes some of them."""
    there = wanted.unique()
    own = []
    for n in there[torch.from_numpy(share(len(there), ranks)).to(there.device)].tolist():
        right = torch.zeros(len(audio), dtype=torch.bool, device=audio.device)
        right[clip_of_caption[wanted == n]] = True
        own.append(average_precision(audio.float() @ vectors[n], right))
    return ranks.gather(torch.stack(own))[: len(there)].mean().item()


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
