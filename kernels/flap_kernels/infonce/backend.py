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


@dataclass(frozen=True)
class Targets:
    """Which column of a block is a row's positive, and which are no negatives of it."""

    offset: int = 0
    """The positive of row i is column i + offset, if the block has it."""
    x_ids: Tensor | None = None
    """(M,): a row and a column of one id are no negatives of each other; None with `y_ids`."""
    y_ids: Tensor | None = None
    """(N,)."""


@dataclass(frozen=True)
class BlockSums:
    """What a forward pass over a block of logits gives."""

    row_lse_negatives: Tensor | None
    """Log-sum-exp of each row over its negatives, (M,); None where it was not wanted."""
    column_lse_negatives: Tensor | None
    """The same of each column over the rows, (N,)."""
    positive_logits: Tensor
    """(M,)."""


@dataclass(frozen=True)
class DirectionSums:
    """What the gradient needs of one direction: of rows over columns, or of columns over rows."""

    lse_negatives: Tensor
    """Log-sum-exp of the negatives' logits, to base 2, (M,)."""
    one_minus_p: Tensor
    """1 - p, p the softmax of the positive, (M,)."""

    def __getitem__(self, rows: slice) -> DirectionSums:
        """Those of some rows."""
        return DirectionSums(self.lse_negatives[rows], self.one_minus_p[rows])

    def contiguous(self) -> DirectionSums:
        """As the kernels read a vector: without a stride."""
        return DirectionSums(self.lse_negatives.contiguous(), self.one_minus_p.contiguous())


class BlockGradients(NamedTuple):
    """What a backward pass over a block of logits gives."""

    x: Tensor | None
    """(M, D) in x's type; None where it was not wanted."""
    y: Tensor | None
    """(N, D) in the accumulator's type; None where it was not wanted."""
    scale: Tensor
    """() in the accumulator's type."""


class Backend(Protocol):
    """Computes a block's sums and gradients; no backend stores the logits."""

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
        """The sums of the forward pass; `rows` and `columns` say which of them are wanted."""
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


def losses_and_sums(lse_negatives: Tensor, positive_logits: Tensor) -> tuple[Tensor, DirectionSums]:
    """-log p in natural units (M,), and what the gradient needs: precise for p from 0 to 1."""
    ahead = (lse_negatives - positive_logits) / LOG2E
    # PyTorch's threshold of 20 would leave e^-20 out, which float64 sees.
    losses = F.softplus(ahead, threshold=40)
    return losses, DirectionSums(lse_negatives, torch.sigmoid(ahead))
