"""Pairs of sketches nearby, exactly, without a matrix of all pairs, and their groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

_TILE = 2048


def near_pairs(sketches: np.ndarray, radius: float, most: int) -> np.ndarray:
    """(P, 2) int64 rows i < j of sketches (n, d) whose rms difference is at most `radius`.

    Of a row with more than `most` neighbours only the nearest are paired, so P is at most n * most.
    Rows are sorted along the direction in which they differ most: tiles further apart along it than
    the radius are left out, the others are multiplied one by one.
    """
    rows = torch.from_numpy(np.asarray(sketches, np.float32))
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    rows = rows - rows.mean(0)
    axis = torch.linalg.eigh(rows.T @ rows)[1][:, -1]
    along, order = (rows @ axis).sort(stable=True)
    rows = rows[order]
    reach = radius * rows.shape[1] ** 0.5
    tiles = list(range(0, len(rows), _TILE))
    found = []
    for at in tiles:
        own = rows[at : at + _TILE]
        low, high = along[at] - reach, along[min(at + _TILE, len(rows)) - 1] + reach
        near = [
            o for o in tiles if along[min(o + _TILE, len(rows)) - 1] >= low and along[o] <= high
        ]
        found.append(_nearest(own, at, rows, near, reach, most))
    pairs = order[torch.cat(found)].sort(1).values
    return torch.unique(pairs, dim=0).numpy()


def _nearest(
    own: torch.Tensor, at: int, rows: torch.Tensor, tiles: list[int], reach: float, most: int
) -> torch.Tensor:
    """(P, 2) numbers of a tile's rows and of their nearest others within reach."""
    best = torch.full((len(own), most), torch.inf)
    which = torch.zeros((len(own), most), dtype=torch.int64)
    size = own.square().sum(1)
    for start in tiles:
        others = rows[start : start + _TILE]
        far = torch.addmm(others.square().sum(1), own, others.T, alpha=-2).add_(size[:, None])
        if start == at:
            far.fill_diagonal_(torch.inf)
        near, column = far.topk(min(most, len(others)), dim=1, largest=False)
        both, index = torch.cat([best, near], 1), torch.cat([which, column + start], 1)
        best, kept = both.topk(most, dim=1, largest=False)
        which = index.gather(1, kept)
    # Rounding of differences of squares, where rows are alike.
    slack = 1e-5 * size.max()
    row, column = (best <= reach**2 + slack).nonzero(as_tuple=True)
    return torch.stack([row + at, which[row, column]], 1)


class Groups:
    """Which of n items belong together, by the pairs that were joined."""

    def __init__(self, count: int):
        self._parent = np.arange(count)

    def find(self, item: int) -> int:
        """The item that stands for an item's group."""
        root = item
        while self._parent[root] != root:
            root = int(self._parent[root])
        while self._parent[item] != root:
            self._parent[item], item = root, int(self._parent[item])
        return root

    def join(self, one: int, other: int) -> None:
        """Make two groups one."""
        one, other = self.find(one), self.find(other)
        self._parent[max(one, other)] = min(one, other)

    def members(self, items: Iterable[int]) -> Iterator[list[int]]:
        """Yield the groups with more than one of the items."""
        groups: dict[int, list[int]] = {}
        for item in items:
            groups.setdefault(self.find(item), []).append(item)
        yield from (group for group in groups.values() if len(group) > 1)
