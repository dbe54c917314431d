"""InfoNCE of prefixes of the embeddings, each with its own softmax: Matryoshka learning.

    S_k[i, j] = scale * log2(e) * x[i, :d_k] . y[j, :d_k] / (|x[i, :d_k]| |y[j, :d_k]|)

The whole width is taken as it is, without the norms. Sums and logits of backends of prefixes have a
last axis for the K prefixes; the rest is as in `backend`. `ByPrefix` takes one prefix after another
through another backend, on a GPU its kernels; `torch_prefixes` has all in one pass.

Source: Matryoshka Representation Learning, arXiv 2205.13147, Eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from flap_kernels.infonce.backend import (
    Backend,
    BlockGradients,
    BlockSums,
    Direction,
    DirectionSums,
    Targets,
)
from flap_kernels.infonce.positives import positive_term
from flap_kernels.infonce.rank_sizes import RankSizes
from flap_kernels.precision import accumulator_dtype

# As long as the shortest vector that F.normalize divides by its own length.
_SHORTEST = 1e-12


@dataclass(frozen=True)
class ByPrefix:
    """A backend of prefixes that gives each to another backend."""

    inner: Backend
    prefixes: tuple[int, ...]
    weights: Tensor | None

    def sums(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        targets: Targets,
        *,
        rows: bool = True,
        columns: bool = True,
    ) -> BlockSums:
        """See `Backend.sums`."""
        found = [
            self.inner.sums(
                Unit.of(x, d).rows, Unit.of(y, d).rows, scale, targets, rows=rows, columns=columns
            )
            for d in self.prefixes
        ]
        return BlockSums(
            _stack([each.row_lse_negatives for each in found]),
            _stack([each.column_lse_negatives for each in found]),
            torch.stack([each.positive_logits for each in found], 1),
        )

    def gradients(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_sums: DirectionSums | None,
        column_sums: DirectionSums | None,
        factor: Tensor,
        targets: Targets,
        *,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """See `Backend.gradients`."""
        dtype = accumulator_dtype(x.dtype)
        x_grad, y_grad = (
            v.new_zeros(v.shape, dtype=dtype) if wanted else None
            for v, wanted in ((x, x_wanted), (y, y_wanted))
        )
        scale_grad = x.new_zeros((), dtype=dtype)
        for k, d in enumerate(self.prefixes):
            of_x, of_y = Unit.of(x, d), Unit.of(y, d)
            found = self.inner.gradients(
                of_x.rows,
                of_y.rows,
                scale,
                of_prefix(row_sums, k),
                of_prefix(column_sums, k),
                factor,
                targets,
                x_wanted=x_wanted,
                y_wanted=y_wanted,
            )
            for total, unit, grad in ((x_grad, of_x, found.x), (y_grad, of_y, found.y)):
                if total is not None and grad is not None:
                    total[:, :d] += unit.gradient(grad.to(dtype))
            scale_grad += found.scale
        return BlockGradients(None if x_grad is None else x_grad.to(x.dtype), y_grad, scale_grad)


@dataclass(frozen=True)
class Unit:
    """Rows brought to length 1 from a prefix of them; the whole width stays as it is."""

    rows: Tensor
    """(M, d)."""
    norms: Tensor
    """(M, 1), reciprocals of the prefixes' lengths; 1 of the whole width."""
    whole: bool

    @classmethod
    def of(cls, x: Tensor, d: int) -> Unit:
        dtype = accumulator_dtype(x.dtype)
        if d == x.shape[1]:
            return cls(x, x.new_ones(len(x), 1, dtype=dtype), True)
        rows = x[:, :d].to(dtype)
        norms = 1 / rows.norm(dim=1, keepdim=True).clamp(min=_SHORTEST)
        return cls((rows * norms).to(x.dtype), norms, False)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the prefix from that of its unit rows."""
        if self.whole:
            return grad
        rows = self.rows.to(grad.dtype)
        return self.norms * (grad - rows * (rows * grad).sum(1, keepdim=True))


def check_prefixes(
    prefixes: Sequence[int], weights: Sequence[float] | None, D: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The prefixes and their weights, checked."""
    try:
        prefixes = tuple(index(d) for d in prefixes)
    except TypeError:
        raise TypeError(f"prefixes must be whole numbers, got {prefixes}") from None
    ascending = all(a < b for a, b in pairwise(prefixes))
    if prefixes and not (prefixes[0] > 0 and ascending and prefixes[-1] <= D):
        raise ValueError(f"prefixes must be ascending and in [1, {D}], got {prefixes}")
    weights = (1.0,) * len(prefixes) if weights is None else tuple(weights)
    if len(weights) != len(prefixes):
        raise ValueError(
            f"prefix_weights must be one for each of {len(prefixes)} prefixes, got {len(weights)}"
        )
    if not all(isinstance(w, Real) and 0 <= w < math.inf for w in weights):
        raise ValueError(f"prefix_weights must be numbers of at least 0, got {weights}")
    return prefixes, weights


def positive_terms(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: Tensor,
    direction: Direction,
    prefixes: Sequence[int],
    weights: Sequence[float],
    sizes: RankSizes | None = None,
) -> Tensor:
    """The sum of the prefixes' `positive_term`; without prefixes that of the embeddings."""
    if not prefixes:
        return positive_term(audio, text, scale, ids, direction, sizes)
    terms, dtype = [], accumulator_dtype(audio.dtype)
    for d, weight in zip(prefixes, weights, strict=True):
        # In the accumulator's type: in float16 the shortest length would be 0.
        x, y = (
            v if d == v.shape[1] else F.normalize(v[:, :d].to(dtype), dim=1, eps=_SHORTEST)
            for v in (audio, text)
        )
        terms.append(weight * positive_term(x, y, scale, ids, direction, sizes))
    return torch.stack(terms).sum()


def of_prefix(sums: DirectionSums | None, k: int) -> DirectionSums | None:
    if sums is None:
        return None
    return DirectionSums(sums.lse_negatives[:, k], sums.one_minus_p[:, k])


def _stack(found: Sequence[Tensor | None]) -> Tensor | None:
    given = [each for each in found if each is not None]
    return torch.stack(given, 1) if given else None
