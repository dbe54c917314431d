"""Classifiers on frozen features: multinomial logistic regression, and nearest neighbours.

    linear   min over W, b of  mean_i -log softmax(W z_i + b)[y_i] + l2/2 |W|^2
    knn      the most frequent class of the k training clips of the largest cosines

    z: features at mean 0 and variance 1 over the training clips; the bias has no penalty. The
    minimum is one point for l2 > 0: L-BFGS in float64 from zeros finds it, whatever the machine.
    It is scikit-learn's LogisticRegression with C = 1 / (n l2) on StandardScaler's features.

Each is trained with a list of settings, in order of preference among equals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Predict = Callable[[Tensor], Tensor]
"""(n, D) features -> (S, n) int64 classes, with each of the S settings."""

# The largest gradient, over the scaled weights, at which a fit ends; one with ten times as much has
# failed. What less would change, and cost: bench/LOG.md.
_TOLERANCE = 1e-6
_MAX_STEPS = 2000
# Rows whose cosines with the training clips are in memory at a time.
_TILE = 1024


@dataclass(frozen=True)
class Classifier:
    """A kind of classifier with one setting."""

    setting: str
    """The setting's name."""
    settings: tuple[float, ...]
    """Its S values, the preferred of equals first."""
    train: Callable[[Tensor, Tensor, Sequence[float]], Predict]
    """(n, D) float64 features, (n,) classes and settings -> the classes of others."""


def train_linear(x: Tensor, y: Tensor, settings: Sequence[float]) -> Predict:
    """Logistic regressions with each weight of the L2 penalty.

    Raises:
        ArithmeticError: one that does not converge.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std <= 1e-12 * mean.abs()] = 1.0  # a feature that never changes
    classes, own = y.unique(return_inverse=True)
    weights = logistic_regressions((x - mean) / std, own, settings)

    def predict(x: Tensor) -> Tensor:
        z = (x - mean) / std
        return torch.stack([classes[(z @ w[:-1] + w[-1]).argmax(1)] for w in weights])

    return predict


def logistic_regressions(
    x: Tensor, y: Tensor, l2s: Sequence[float], tolerance: float = _TOLERANCE
) -> list[Tensor]:
    """(D + 1, C) float64 for each weight of the penalty: the minimum, the bias last.

    Each starts from the one before. L-BFGS works in the principal axes of x, where the penalty is
    the same and all directions can be brought to one curvature: |W| does not see a rotation.

    Args:
        x: (n, D) float64.
        y: (n,) int64 in [0, C), each class there.
        tolerance: of the largest gradient over the weights that L-BFGS sees.

    Raises:
        ArithmeticError: one whose gradient stays large.
    """
    u, s, axes = torch.linalg.svd(x, full_matrices=False)
    kept = s > 1e-12 * s[:1]
    scores, axes, C = (u * s)[:, kept], axes[kept], int(y.max()) + 1
    curvature = functional.pad(s[kept].square() / len(x), (0, 1), value=1.0)[:, None] / C
    weights, weight = [], x.new_zeros(len(axes) + 1, C)
    for l2 in l2s:
        penalty = torch.full_like(curvature, l2)
        penalty[-1] = 0.0
        scale = (curvature + penalty).rsqrt()
        weight = _minimum(scores, y, penalty, weight, scale, tolerance)
        weights.append(torch.cat([axes.T @ weight[:-1], weight[-1:]]))
    return weights


def _minimum(
    x: Tensor, y: Tensor, penalty: Tensor, first: Tensor, scale: Tensor, tolerance: float
) -> Tensor:
    """(D + 1, C) of the smallest loss.

    Args:
        penalty: (D + 1, 1), l2 of each feature's weights and of the bias.
        first: (D + 1, C), where to start.
        scale: (D + 1, 1): weights divided by it are what L-BFGS sees.
    """
    scaled = (first / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled],
        max_iter=_MAX_STEPS,
        max_eval=2 * _MAX_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            weight = scaled * scale
            error = functional.cross_entropy(x @ weight[:-1] + weight[-1], y)
            total = error + (penalty * weight.square()).sum() / 2
            total.backward()
        return total.detach()

    optimizer.step(loss)  # type: ignore[arg-type]
    loss()
    assert scaled.grad is not None
    largest = scaled.grad.abs().max().item()
    if not largest <= 10 * tolerance:  # NaN too
        raise ArithmeticError(
            f"a logistic regression of {len(x)} clips must converge to a gradient of "
            f"{tolerance:g}, got {largest:.1e} with l2 = {penalty[0].item():g}"
        )
    return scaled.detach() * scale


def train_nearest(x: Tensor, y: Tensor, settings: Sequence[float]) -> Predict:
    """k-nearest neighbours by cosine; classes with equally many are told by their mean cosine."""
    known, C = functional.normalize(x, dim=1), int(y.max()) + 1
    counts = [min(int(k), len(x)) for k in settings]

    def predict(x: Tensor) -> Tensor:
        tiles = functional.normalize(x, dim=1).split(_TILE)
        return torch.cat([_votes(tile) for tile in tiles], 1)

    def _votes(rows: Tensor) -> Tensor:
        cosines, nearest = (rows @ known.T).topk(max(counts), dim=1)
        one_hot = functional.one_hot(y[nearest], C)
        # The cosines of a class sum to less than one vote.
        return torch.stack(
            [
                (one_hot[:, :k] * (1 + cosines[:, :k, None] / (4 * k))).sum(1).argmax(1)
                for k in counts
            ]
        )

    return predict


LINEAR = Classifier("l2", (10.0, 1.0, 1e-1, 1e-2, 1e-3), train_linear)
NEAREST = Classifier("k", (1, 3, 5, 10, 20), train_nearest)
