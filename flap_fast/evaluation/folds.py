"""The folds of cross-validation: those of the data, whole sources, or stratified ones.

A source is what several clips were cut from or made with: a recording, a speaker, an instrument.
Clips of one source in both training and test folds would let a probe recognise the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flap_fast.checks import require
from flap_fast.evaluation.logistic import SEED, stratified_folds

FOLDS = 5
# Up to so many sources, each is a fold.
_MOST_SOURCES = 10


@dataclass(frozen=True)
class Folds:
    """Which fold each of N clips is in."""

    of_clip: np.ndarray
    """(N,) int64 in [0, K)."""
    names: tuple[str, ...]
    """Of the K folds."""
    made_by: str
    """How they were made, for tables."""


def make_folds(classes: np.ndarray, folds: Sequence[str], sources: Sequence[str]) -> Folds:
    """The clips' `fold` where they have one; else whole sources; else five stratified folds.

    Up to ten sources are left out one at a time; of more, five folds are made, with the classes
    spread as evenly as sources allow. One source of all clips says as much as none.

    Args:
        classes: (N,) int64.
        folds: the fold of each clip, "" without one.
        sources: the source of each clip, "" without one.

    Raises:
        ConfigError: some clips have a fold (or a source) and some have none; two folds or sources.
    """
    numbers = tuple(str(n + 1) for n in range(FOLDS))
    if any(folds):
        names, of_clip = _all_numbered("fold", folds)
        _require_three("fold", names, "name all folds as one place, DATA/fold{1..5}/*.tar")
        folds_of = Counter(source for source, _ in {*zip(sources, folds, strict=True)} if source)
        split = sum(count > 1 for count in folds_of.values())
        shared = f", {split} sources in several" if split else ""
        return Folds(of_clip, names, f"the data's {len(names)} folds{shared}")
    if len(set(sources)) > 1:
        names, of_clip = _all_numbered("source", sources)
        if len(names) <= _MOST_SOURCES:
            _require_three("source", names, "name more of them in the manifest's `source`")
            return Folds(of_clip, names, f"one of {len(names)} sources left out")
        made = grouped_folds(classes, of_clip, FOLDS)
        return Folds(made, numbers, f"{FOLDS} folds of {len(names)} whole sources")
    of_clip = np.empty(len(classes), np.int64)
    for n, (_, test) in enumerate(stratified_folds(classes, FOLDS, SEED)):
        of_clip[test] = n
    return Folds(of_clip, numbers, f"{FOLDS} stratified folds")


def grouped_folds(classes: np.ndarray, groups: np.ndarray, folds: int) -> np.ndarray:
    """(N,) int64: a fold for each clip, whole groups in one, classes as evenly as that allows.

    The folds of scikit-learn's `StratifiedGroupKFold(folds)`: groups of the most uneven classes
    first, each into the fold that makes the classes' fractions differ least between folds.

    Args:
        classes: (N,) int64, 0 to C - 1, each there.
        groups: (N,) int64, 0 to G - 1, each there.
    """
    counts = np.zeros((groups.max() + 1, classes.max() + 1))  # (G, C)
    np.add.at(counts, (groups, classes), 1)
    total, filled = counts.sum(0), np.zeros((folds, counts.shape[1]))
    fold_of_group = np.empty(len(counts), np.int64)
    for group in np.argsort(-counts.std(1), kind="stable"):
        with_group = filled[None] + np.eye(folds)[:, :, None] * counts[group]
        spread = (with_group / total).std(1).mean(1)
        best = 0
        for fold in range(1, folds):
            equal = np.isclose(spread[fold], spread[best])
            emptier = filled[fold].sum() < filled[best].sum()
            if spread[fold] < spread[best] or (equal and emptier):
                best = fold
        filled[best] += counts[group]
        fold_of_group[group] = best
    return fold_of_group[groups]


def _all_numbered(what: str, names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct names, numbers in their order (2 before 10), and (N,) the number of each."""
    missing = sum(not name for name in names)
    got = f"{missing} of {len(names)} without"
    require(not missing, "the clips of a probe", f"have a {what} each, or none", got)
    numeric = all(name.isdecimal() for name in names)
    order = sorted(set(names), key=lambda name: (int(name), name) if numeric else name)
    numbers = {name: n for n, name in enumerate(order)}
    return tuple(order), np.array([numbers[name] for name in names], np.int64)


def _require_three(what: str, names: Sequence[str], remedy: str) -> None:
    rule = "be three or more: one to test on, and two to choose the classifier's setting by"
    got = f"{len(names)} ({', '.join(names)})"
    remedy += ", or leave that column out"
    require(len(names) > 2, f"the {what}s of a probe's clips", rule, got, remedy)
