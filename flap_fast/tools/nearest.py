"""The rows of an array that are nearest to queries, with FAISS if it is installed; exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def nearest_rows(embeddings: Tensor, queries: Tensor, most: int) -> list[tuple[Tensor, Tensor]]:
    """Return for each query (Q, d) the rows with the highest cosines, best first, and these.

    Sorted by the cosine in float64, then by number.
    """
    found = []
    for query, rows in zip(queries, _candidates(embeddings, queries, most), strict=True):
        # Row by row: a product of matrices may give equal rows unequal last bits.
        cosines = (embeddings[rows].double() * query.double()).sum(1)
        best = np.lexsort((rows.numpy(), -cosines.numpy()))[:most].copy()
        found.append((rows[best], cosines[best]))
    return found


# Largest error of a float32 cosine, for queries of length one.
_SLACK = 1e-5


def _candidates(embeddings: Tensor, queries: Tensor, most: int) -> Tensor:
    """Return (Q, C) int64 rows that include the `most` highest cosines and all ties."""
    count, search = 2 * most + 16, _by_cosine(embeddings, queries)
    while True:
        count = min(count, len(embeddings))
        cosines, rows = search(count)
        behind = cosines[:, -1] < cosines[:, min(most, count) - 1] - _SLACK * queries.norm(dim=1)
        if count == len(embeddings) or behind.all():
            return rows
        count *= 4


def _by_cosine(embeddings: Tensor, queries: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a function of n that gives the n highest cosines (Q, n) float32 and their rows."""
    try:
        import faiss
    except ImportError:
        cosines = queries @ embeddings.T
        return lambda count: cosines.topk(count, dim=1)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())

    def search(count: int) -> tuple[Tensor, Tensor]:
        cosines, rows = index.search(queries.numpy(), count)
        return torch.from_numpy(cosines), torch.from_numpy(rows)

    return search
