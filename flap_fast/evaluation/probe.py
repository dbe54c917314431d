"""Probes: classes of clips by classifiers on frozen features, cross-validated.

    features      joint, the embedding that search uses; pooled, the encoder's, before its head
    classifiers   linear, multinomial logistic regression; knn, nearest neighbours by cosine

Each fold is tested once by a classifier that all the others train. Its setting, the L2 weight or
k, is the one whose mean accuracy over the others is best when each of them is left out as well: a
fit without folds i and j serves the choices for both. So no clip of a test fold, and with folds of
whole sources no source of one, is seen before the test.

Chance is the accuracy of the training folds' most frequent class.

Source: the folds of Piczak, ESC-50 (2015), and Salamon et al., UrbanSound8K (2014); linear probes
as of Alain and Bengio, arXiv 1610.01644.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.evaluation.classifiers import LINEAR, NEAREST, Classifier
from flap_fast.evaluation.embed import Embeddings, Texts, rank_slice
from flap_fast.evaluation.evaluated_model import EvaluatedModel
from flap_fast.evaluation.folds import Folds, make_folds
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Row, Sheet, percent
from flap_fast.progress import progress
from flap_fast.ranks import Ranks

FEATURES = ("joint", "pooled")
CLASSIFIERS = {"linear": LINEAR, "knn": NEAREST}
_NAMES = {"linear": "linear", "knn": "nearest neighbours"}


def probe(
    features: dict[str, Tensor],
    labels: Sequence[Sequence[str]],
    folds: Sequence[str],
    sources: Sequence[str],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Accuracies over folds of the clips that have a label, the same on all ranks. Collective.

    Args:
        features: (N, D) each.
        labels: the class name of each clip; clips without one are counted as `unlabelled`.
        folds: the fold of each clip, "" without.
        sources: the source of each clip, "" without.

    Raises:
        ConfigError: a clip of several labels, a class of a single fold, or as `make_folds`.
    """
    ranks = ranks or Ranks()
    rows, classes, names, made = _problem(labels, folds, sources)
    of_fold, K = torch.from_numpy(made.of_clip), len(made.names)
    y = torch.from_numpy(classes)
    found: dict[str, Any] = {
        "clips": len(y),
        "unlabelled": len(labels) - len(y),
        "classes": len(names),
        "folds": made.made_by,
        "fold_names": list(made.names),
        "chance": _over_folds(_chance(y, of_fold, K)),
    }
    for feature, values in features.items():
        device = values.device
        x = values[torch.from_numpy(rows).to(device)].double()
        found[feature] = {
            name: _cross_validated(kind, x, y.to(device), of_fold.to(device), K, ranks, named)
            for name, kind in CLASSIFIERS.items()
            for named in [f"probe {feature}, {name}"]
        }
    return found


def _problem(
    labels: Sequence[Sequence[str]], folds: Sequence[str], sources: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], Folds]:
    """The n labelled clips, their (n,) classes, the classes' names, and the folds."""
    rows = [n for n, own in enumerate(labels) if own]
    rule, remedy = "have labels", "name them in the manifest's `labels`"
    require(bool(rows), "the clips of a probe", rule, "none", remedy)
    several = [own for own in labels if len(own) > 1]
    if several:
        raise ConfigError(
            f"a clip of a probe must have one label, got {len(several)} of {len(rows)} with more, "
            f"such as {' and '.join(several[0])}; give each clip one, or none to leave it out"
        )
    names = tuple(sorted({labels[n][0] for n in rows}))
    require(len(names) > 1, "the classes of a probe", "be two or more", f"1 ({names[0]})")
    numbers = {name: n for n, name in enumerate(names)}
    classes = np.array([numbers[labels[n][0]] for n in rows], np.int64)
    made = make_folds(classes, [folds[n] for n in rows], [sources[n] for n in rows])
    rule, filled = f"be at least {len(made.names)}, one a fold", len(np.unique(made.of_clip))
    got = f"{len(rows)} in {filled} folds ({made.made_by})"
    require(filled == len(made.names), "the clips of a probe", rule, got, "give it more clips")
    rule, remedy = "have clips in two folds or more", "give it more, or leave its label out"
    for n, name in enumerate(names):
        inside = np.unique(made.of_clip[classes == n])
        got = f"{made.names[inside[0]]} alone ({made.made_by})"
        require(len(inside) > 1, f"the class '{name}' of a probe", rule, got, remedy)
    return np.array(rows), classes, names, made


def _cross_validated(
    kind: Classifier, x: Tensor, y: Tensor, of_fold: Tensor, K: int, ranks: Ranks, named: str
) -> dict[str, Any]:
    """Accuracy over folds of one classifier, and the setting chosen for each."""

    def accuracies(training: Tensor, tests: Sequence[int], settings: Sequence[float]) -> Tensor:
        """(S, folds) float64 on some folds, trained on the clips of a mask."""
        predict = kind.train(x[training], y[training], settings)
        right = [(predict(x[of_fold == n]) == y[of_fold == n]).double().mean(1) for n in tests]
        return torch.stack(right, 1)

    # Of the fit without folds i and j, the accuracy on i helps to choose for j, and vice versa.
    pairs = list(combinations(range(K), 2))
    mine = [pairs[n] for n in rank_slice(len(pairs), ranks)]
    own = []
    with progress(named, len(mine) + K) as advance:
        for pair in mine:
            left_out = (of_fold == pair[0]) | (of_fold == pair[1])
            own.append(accuracies(~left_out, pair, kind.settings))
            advance(1)
        inner = ranks.gather(torch.stack(own))[: len(pairs)].cpu().numpy()  # (pairs, S, 2)
        scores = np.zeros((K, len(kind.settings)))
        for (i, j), found in zip(pairs, inner, strict=True):
            scores[j] += found[:, 0] / (K - 1)
            scores[i] += found[:, 1] / (K - 1)
        # Rounded: equal means may differ in their last bits.
        chosen = [kind.settings[n] for n in scores.round(9).argmax(1)]
        tested = []
        for n in rank_slice(K, ranks).tolist():
            tested.append(accuracies(of_fold != n, (n,), (chosen[n],))[0, 0])
            advance(1)
    found = _over_folds(ranks.gather(torch.stack(tested))[:K])
    return {**found, kind.setting: chosen}


def _chance(y: Tensor, of_fold: Tensor, K: int) -> Tensor:
    """(K,): the accuracy on each fold of the others' most frequent class, the first of equals."""
    most = [int(np.argmax(np.bincount(y[of_fold != n].numpy()))) for n in range(K)]
    return torch.stack([(y[of_fold == n] == most[n]).double().mean() for n in range(K)])


def _over_folds(accuracy: Tensor) -> dict[str, Any]:
    return {
        "accuracy": accuracy.mean().item(),
        "std": accuracy.std().item(),
        "of_fold": accuracy.tolist(),
    }


def _check(model: EvaluatedModel, texts: Texts) -> None:
    _problem(texts.labels, texts.folds, texts.sources)


def _score(model: EvaluatedModel, e: Embeddings) -> dict[str, Any]:
    assert e.pooled is not None  # the record asks for it
    features = {"joint": e.media, "pooled": e.pooled}
    return probe(features, e.labels, e.folds, e.sources, model.ranks)


def _sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    def cells(one: dict[str, Any]) -> Row:
        values = one["accuracy"], one["std"], min(one["of_fold"]), max(one["of_fold"])
        return tuple(map(percent, values))

    ours: list[Row] = [
        (f"{feature}, {_NAMES[kind]}", *cells(found[feature][kind]))
        for feature in FEATURES
        for kind in CLASSIFIERS
    ]
    ours.append(("chance", *cells(found["chance"])))
    counts = f"{found['clips']} clips, {found['classes']} classes, {found['folds']}"
    note = "In percent over folds. Joint: the embedding; pooled: the encoder's, before its head."
    note += " Chance: the most frequent class of the training folds."
    if found["unlabelled"]:
        note += f" {found['unlabelled']} clips without a label are left out."
    head = ("features, classifier", "accuracy", "std", "lowest", "highest")
    return Sheet(f"Probe, {name}: {counts}", head, ours, note=note)


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"probe/{feature}/{kind}": found[feature][kind]["accuracy"]
        for feature in FEATURES
        for kind in CLASSIFIERS
    }


EVALUATION = Evaluation(
    name="probe",
    data="clips",
    check=_check,
    score=_score,
    sheet=_sheet,
    metrics=_metrics,
    selects=lambda found: found["pooled"]["linear"]["accuracy"],
    pooled=True,
)
