"""The columns of a block of logits: captions that are a row's positive, and captions that are none.

Extra captions, such as hard negatives, are columns of every row and no rows of the other direction:
a block of their own, whose sums by row are added to those of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flap_kernels.infonce.backend import (
    Backend,
    BlockGradients,
    BlockSums,
    DirectionSums,
    Targets,
)


@dataclass(frozen=True)
class Columns:
    """Captions as columns, and how to take them with rows of clips."""

    pairs: Tensor
    """(N, D), among them the positive of each row."""
    targets: Targets
    extra: Tensor
    """(E, D), negatives of every row."""
    extra_targets: Targets

    @classmethod
    def of(
        cls,
        pairs: Tensor,
        extra: Tensor,
        offset: int = 0,
        x_ids: Tensor | None = None,
        pair_ids: Tensor | None = None,
        extra_ids: Tensor | None = None,
    ) -> Columns:
        """The positive of row i is pair i + offset; ids are those of rows, pairs and extra."""
        targets = Targets(offset, x_ids, pair_ids)
        return cls(pairs, targets, extra, without_positives(len(extra), x_ids, extra_ids))

    def sums(
        self, backend: Backend, x: Tensor, scale: Tensor, *, rows: bool, columns: bool
    ) -> BlockSums:
        """The sums of the forward pass; those by column are the pairs'."""
        found = backend.sums(x, self.pairs, scale, self.targets, rows=rows, columns=columns)
        if found.row_lse_negatives is None or not len(self.extra):
            return found
        more = backend.sums(x, self.extra, scale, self.extra_targets, columns=False)
        assert more.row_lse_negatives is not None
        lse = torch.logaddexp2(found.row_lse_negatives, more.row_lse_negatives)
        return replace(found, row_lse_negatives=lse)

    def gradients(
        self,
        backend: Backend,
        x: Tensor,
        scale: Tensor,
        row_sums: DirectionSums | None,
        column_sums: DirectionSums | None,
        factor: Tensor,
        *,
        x_wanted: bool = True,
        y_wanted: bool = True,
    ) -> BlockGradients:
        """The gradients of the rows, of the pairs and then the extra (N + E, D), of the scale."""
        wanted: Any = {"x_wanted": x_wanted, "y_wanted": y_wanted}
        found = backend.gradients(
            x, self.pairs, scale, row_sums, column_sums, factor, self.targets, **wanted
        )
        if not len(self.extra):
            return found
        if row_sums is None:  # no direction has the extra captions
            return found._replace(y=_cat(found.y, self.extra.new_zeros(self.extra.shape)))
        more = backend.gradients(
            x, self.extra, scale, row_sums, None, factor, self.extra_targets, **wanted
        )
        return BlockGradients(
            None if found.x is None or more.x is None else found.x + more.x,
            _cat(found.y, more.y),
            found.scale + more.scale,
        )


def without_positives(N: int, x_ids: Tensor | None = None, y_ids: Tensor | None = None) -> Targets:
    """The targets of a block of N columns none of which is a row's positive."""
    return Targets(N, x_ids, y_ids)


def _cat(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return None if one is None or two is None else torch.cat([one, two.to(one.dtype)])
