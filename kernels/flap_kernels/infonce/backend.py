"""The interface of InfoNCE's backends: sums and gradients over a block of logits.

    S[i, j] = scale * log2(e) * x[i] . y[j]            positive of row i: column i + offset
    lse_negatives[i] = log2 sum_j 2^S[i, j]            over all j but the positive
    1 - p[i] = 1 / (1 + 2^(positive_logit[i] - lse_negatives[i]))

    M rows x   N columns y   D width   logits and logarithms to base 2, in float32 (or float64)

The log-sum-exp *without* the positive is all that loss and gradient need, and it keeps both exact
where the positive wins: with p = 0.9999999 the loss is log(1 + 2^(lse_negatives - positive_logit))
and the gradient of the positive's logit is -(1 - p), neither a difference of nearly equal numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)

Direction = Literal["symmetric", "a2t", "t2a"]
Precision = Literal["ieee", "tf32", "bf16"]
Duplicates = Literal["mask", "positive"]


@dataclass(frozen=True)
class Targets:
    """The column of each row's positive in a block, and the columns excluded from its negatives."""

    offset: int = 0
    """The positive of row i is column i + offset, if the block has it."""
    x_ids: Tensor | None = None
    """(M, K): rows and columns equal in one of K ids are not negatives of each other; None with
    `y_ids`."""
    y_ids: Tensor | None = None
    """(N, K)."""


@dataclass(frozen=True)
class BlockSums:
    """Result of a forward pass over a block of logits."""

    row_lse_negatives: Tensor | None
    """Log-sum-exp of each row over its negatives, (M,); None if not requested."""
    column_lse_negatives: Tensor | None
    """The same of each column over the rows, (N,)."""
    positive_logits: Tensor
    """(M,)."""


@dataclass(frozen=True)
class DirectionSums:
    """Sums that the gradient of one direction needs: rows over columns, or the reverse."""

    lse_negatives: Tensor
    """Log-sum-exp of the negatives' logits, to base 2, (M,)."""
    one_minus_p: Tensor
    """1 - p, p the softmax of the positive, (M,)."""

    def __getitem__(self, rows: slice) -> DirectionSums:
        """The sums of some rows."""
        return DirectionSums(self.lse_negatives[rows], self.one_minus_p[rows])

    def contiguous(self) -> DirectionSums:
        """The sums as contiguous vectors, which the kernels require."""
        return DirectionSums(self.lse_negatives.contiguous(), self.one_minus_p.contiguous())


class BlockGradients(NamedTuple):
    """Result of a backward pass over a block of logits."""

    x: Tensor | None
    """(M, D) in x's dtype; None if not requested."""
    y: Tensor | None
    """(N, D) in the accumulator's dtype; None if not requested."""
    scale: Tensor
    """() in the accumulator's dtype."""


class SigmoidSums(NamedTuple):
    """Sum of a block's sigmoid losses, and its gradients, which one pass gives."""

    loss: Tensor
    """() in the accumulator's dtype."""
    x: Tensor | None
    """(M, D) in the accumulator's dtype, factor * scale * dlogits y; None if not requested."""
    y: Tensor | None
    """(N, D) in the accumulator's dtype, factor * scale * dlogits^T x; None if not requested."""
    scale: Tensor
    """() factor * sum(dlogits * (x y^T)); 0 where neither x nor y is requested."""
    bias: Tensor
    """() factor * sum(dlogits); 0 where neither x nor y is requested."""


class Backend(Protocol):
    """Computes a block's sums and gradients; no backend stores the logits.

    A backend of several prefixes (`prefixes`) has a last axis for them in all sums and logits.
    """

    @property
    def weights(self) -> Tensor | None:
        """Weights of the prefixes' losses (K,); None without prefixes."""
        ...

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
        """The sums of the forward pass; `rows` and `columns` select which are computed."""
        ...

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
        """The gradients of `factor` times the block's sum of -log p.

        With dlogits[i, j] = (1 - p)[i] 2^(S - lse_negatives[i]) by row, plus the same by column,
        and -(1 - p) of both at the positive (a direction that is None leaves its terms out):
        x: factor * scale * dlogits y. y: factor * scale * dlogits^T x.
        scale: factor * sum(dlogits * (x y^T)).
        """
        ...


class TileBackend(Backend, Protocol):
    """A backend of whole embeddings, which has more uses for a tile of logits."""

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
        values: tuple[Tensor, Tensor] | None = None,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """As `Backend.gradients`.

        `values`, (M, E) and (N, E) in x's dtype, stand for x and y in the products with dlogits.
        The results are then weighted sums of other embeddings, both in the accumulator's dtype,
        x: factor * dlogits y_values, y: factor * dlogits^T x_values. The scale's is of no use.
        """
        ...

    def sigmoid(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        factor: Tensor,
        targets: Targets,
        *,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> SigmoidSums:
        """The sum of the sigmoid losses of a block, and the gradients of `factor` times it.

        With l[i, j] = scale * x[i] . y[j] + bias: softplus(-l) at a row's positive, softplus(l)
        elsewhere. dlogits = sigmoid(l), less 1 at the positive. Where ids are equal and it is not
        the positive, neither.
        """
        ...


def losses_and_sums(
    lse_negatives: Tensor, positive_logits: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, DirectionSums]:
    """-log p in natural units (M,), and the sums for the gradient; precise for p from 0 to 1.

    Of (M, K) logits with K weights, the losses are weighted sums, and 1 - p is weighted.
    """
    ahead = (lse_negatives - positive_logits) / LOG2E
    # PyTorch's threshold of 20 would drop e^-20, which is not negligible in float64.
    losses = F.softplus(ahead, threshold=40)
    one_minus_p = torch.sigmoid(ahead)
    if weights is not None:
        losses, one_minus_p = (losses * weights).sum(1), one_minus_p * weights
    return losses, DirectionSums(lse_negatives, one_minus_p)
