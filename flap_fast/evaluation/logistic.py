"""Logistic regression as SentEval trains it, many problems at a time.

Adam, batches of 64, dev accuracy every 4 epochs, early stopping at the sixth that is no better than
the best so far, at most 200 epochs; the weights of the best dev accuracy are kept. First weights
and orders of rows are those of SentEval's seed 1111. SentEval trains one fit after the other;
here all fits with equally many rows, which see the same order, are one batch of problems.

    J fits   n rows of a batch   D features   C classes

Source: Conneau and Kiela, SentEval, arXiv 1803.05449, with the settings of Gao et al., SimCSE,
arXiv 2104.08821.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SEED = 1111
_BATCH = 64
_DEV_EPOCHS = 4
_PATIENCE = 5
_MAX_EPOCHS = 200


@dataclass(frozen=True)
class Fit:
    """The rows to train on, the rows for early stopping, and the weight of the L2 penalty."""

    train: np.ndarray
    dev: np.ndarray
    l2: float


@dataclass(frozen=True)
class Fitted:
    """J classifiers of D features into C classes."""

    weight: Tensor
    """(J, D + 1, C), the bias last."""
    dev_accuracy: Tensor
    """(J,) float64."""

    def accuracy(self, n: int, x: Tensor, y: Tensor) -> Tensor:
        """() float64: the fraction of rows that classifier n gets right."""
        weight = self.weight[n]
        return ((x @ weight[:-1] + weight[-1]).argmax(1) == y).double().mean()


def fit(
    x: Tensor, y: Tensor, fits: Sequence[Fit], random_state: np.random.RandomState | None = None
) -> Fitted:
    """Train all fits; those with equal numbers of rows share an order and are batched."""
    C = int(y.max()) + 1
    weight = x.new_empty(len(fits), x.shape[1] + 1, C)
    accuracy = torch.empty(len(fits), dtype=torch.float64, device=x.device)
    sizes = sorted({(len(fit.train), len(fit.dev)) for fit in fits})
    for size in sizes:
        some = [n for n, fit in enumerate(fits) if (len(fit.train), len(fit.dev)) == size]
        order = random_state or np.random.RandomState(SEED)
        weight[some], accuracy[some] = _fit_together(x, y, [fits[n] for n in some], C, order)
    return Fitted(weight, accuracy)


def _fit_together(
    x: Tensor, y: Tensor, fits: Sequence[Fit], C: int, random_state: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """(J, D + 1, C) best weights and (J,) their dev accuracies, of fits of one size."""
    train, dev = (
        torch.from_numpy(np.stack([getattr(f, part) for f in fits])).to(x.device)
        for part in ("train", "dev")
    )
    J, n = train.shape
    at = _Adam.start(_first_weights(x.shape[1], C).to(x).expand(J, -1, -1).clone())
    l2 = torch.tensor([fit.l2 for fit in fits]).to(x)[:, None, None]
    best, best_right = at.weight.clone(), torch.full((J,), -1, device=x.device)
    worse = torch.zeros(J, dtype=torch.int64, device=x.device)
    active = torch.arange(J, device=x.device)
    for _ in range(0, _MAX_EPOCHS + 1, _DEV_EPOCHS):
        rows, penalty = train[active], l2[active]
        for _ in range(_DEV_EPOCHS):
            order = torch.from_numpy(random_state.permutation(n)).to(x.device)
            for batch in order.split(_BATCH):
                at.step(_gradient(x, y, rows[:, batch], at.weight) + penalty * at.weight)
        right = torch.zeros(len(active), dtype=torch.int64, device=x.device)
        for rows in dev[active].split(_BATCH, 1):
            right += (_logits(x[rows], at.weight).argmax(-1) == y[rows]).sum(1)
        better = right > best_right[active]
        best[active[better]], best_right[active[better]] = at.weight[better], right[better]
        worse[active] += ~better
        going = worse[active] <= _PATIENCE
        active, at = active[going], at.only(going)
        if not len(active):
            break
    return best, best_right.double() / dev.shape[1]


def _first_weights(features: int, classes: int) -> Tensor:
    """(D + 1, C): initial weights of an `nn.Linear` under SentEval's seed, the bias last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        linear = nn.Linear(features, classes)
    return torch.cat([linear.weight.detach().T, linear.bias.detach()[None]])


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """(J, n, D) features -> (J, n, C)."""
    return torch.baddbmm(weight[:, -1:], x, weight[:, :-1])


def _gradient(x: Tensor, y: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """(J, D + 1, C) of the mean cross-entropy over (J, n) rows."""
    some = x[rows]
    error = _logits(some, weight).softmax(-1) - functional.one_hot(y[rows], weight.shape[2])
    error /= rows.shape[1]
    return torch.cat([some.transpose(1, 2) @ error, error.sum(1, keepdim=True)], 1)


@dataclass
class _Adam:
    """Adam on a stack of problems; finished problems are removed."""

    weight: Tensor
    mean: Tensor
    square: Tensor
    steps: int = 0

    @classmethod
    def start(cls, weight: Tensor) -> _Adam:
        return cls(weight, torch.zeros_like(weight), torch.zeros_like(weight))

    def step(self, grad: Tensor, lr: float = 1e-3) -> None:
        self.steps += 1
        self.mean.lerp_(grad, 0.1)
        self.square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        root = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.weight.addcdiv_(self.mean, root, value=-lr / (1 - 0.9**self.steps))

    def only(self, going: Tensor) -> _Adam:
        return _Adam(self.weight[going], self.mean[going], self.square[going], self.steps)


def stratified_folds(
    classes: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(train, test) indices of each fold, stratified by class and shuffled within a class.

    The folds of scikit-learn's `StratifiedKFold(folds, shuffle=True, random_state=seed)`, which
    SentEval uses.
    """
    _, first, which = np.unique(classes, return_index=True, return_inverse=True)
    which = np.argsort(np.argsort(first))[which]  # classes counted as they first appear
    spread = [np.bincount(np.sort(which)[n::folds], minlength=len(first)) for n in range(folds)]
    random_state = np.random.RandomState(seed)
    fold = np.empty(len(classes), np.int64)
    for k in range(len(first)):
        mine = np.arange(folds).repeat([counts[k] for counts in spread])
        random_state.shuffle(mine)
        fold[which == k] = mine
    for n in range(folds):
        yield np.flatnonzero(fold != n), np.flatnonzero(fold == n)
