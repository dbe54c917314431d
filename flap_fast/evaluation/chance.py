"""R@k of a random order: what a model that knows nothing scores.

chance_of_any      answers in any order, each by itself
chance_of_groups   equal answers, which have one score and so stand together: their groups are
                   in any order
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from torch import Tensor

TOP = (1, 5, 10)


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


def chance_of_groups(group_of_answer: Sequence[int], right: Sequence[set[int]]) -> dict[str, float]:
    """R@k of a random order of groups of equal answers.

    Args:
        right: of each query the groups that are right.
    """
    size_of = Counter(group_of_answer)
    sizes = Counter(size_of.values())

    @cache
    def found(own: tuple[int, ...]) -> list[float]:
        return _found(sizes - Counter(own), len(own))

    each = [found(tuple(sorted(size_of[group] for group in groups))) for groups in right]
    return {f"R@{k}": float(np.mean([one[n] for one in each])) for n, k in enumerate(TOP)}


def _found(others: Counter[int], right: int) -> list[float]:
    """Probability that fewer than k answers stand before the first of `right` groups, for each k.

    Let the groups stand at random places in [0, 1). Before a first right one at u stands each other
    group with probability u, by itself; the probability is its mean over u.
    """
    most = max(TOP)
    u, weight = _nodes()
    weight = weight * right * (1 - u) ** (right - 1)
    before = np.zeros((most, len(u)))  # of n answers, n < most
    before[0] = 1
    for size, groups in others.items():
        rest, before = before, np.zeros_like(before)
        for n in range(min(groups, (most - 1) // size) + 1):
            # A float: of an integer beyond 64 bits NumPy 1 makes an array of objects.
            some = float(math.comb(groups, n)) * u**n * (1 - u) ** (groups - n)
            before[n * size :] += rest[: most - n * size] * some
    return [float((before[:k].sum(0) * weight).sum()) for k in TOP]


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Where [0, 1] is looked at, and weights: finely near 0, where many groups leave a chance."""
    ends = np.concatenate([[0.0], 2.0 ** np.arange(-30, 1)])
    x, weight = np.polynomial.legendre.leggauss(24)
    half = np.diff(ends)[:, None] / 2
    return (ends[:-1, None] + half * (x + 1)).ravel(), (half * weight).ravel()
