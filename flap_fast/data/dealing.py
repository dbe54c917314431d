"""Equal work: dealing clips of different lengths to ranks and to micro-batches.

    a step's global batch -> ranks, equally many clips each -> micro-batches

Pure functions of the clips' tokens, which every rank computes for all: nothing is communicated.
Random numbers are keyed by a row's number in the global batch: dealing changes none of them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flap_fast.config import Train
from flap_fast.ranks import Ranks

# Loads within this fraction of the mean are equal.
_EQUAL = 0.002
_MOST_SWAPS = 400


class ClipTokens(NamedTuple):
    """(N,) int64 tokens of each clip of the shards, known before it is decoded."""

    masked: np.ndarray
    """In the epochs in which masking drops patches."""
    whole: np.ndarray
    """In the others."""


@dataclass(frozen=True)
class Dealt:
    """A rank's clips of a step."""

    micro_batches: list[np.ndarray]
    """Rows of the global batch, ascending; as many micro-batches on every rank."""
    tokens: int = 0
    """Of all ranks' clips, where clips have lengths of their own."""
    balance: float = 1.0
    """Tokens of the mean rank over those of the one with most: the fraction of ranks at work."""


def dealt_in_order(train: Train, ranks: Ranks) -> Dealt:
    """Clips that cost the same: a rank's are neighbours in the global batch."""
    shape = ranks.world, train.micro_batches(ranks.world), -1
    return Dealt(list(np.arange(train.global_batch).reshape(shape)[ranks.rank]))


def dealt_equally(train: Train, ranks: Ranks, tokens: np.ndarray) -> Dealt:
    """Clips of (global_batch,) `tokens`: equal work for ranks, micro-batches of equal work."""
    rows = deal(tokens, ranks.world)
    if train.micro_tokens:
        sets = pack(tokens[rows], train.micro_tokens, train.micro_batch)[ranks.rank]
    else:
        sets = list(deal(tokens[rows[ranks.rank]], train.micro_batches(ranks.world)))
    load = tokens[rows].sum(1)
    micro_batches = [rows[ranks.rank][some] for some in sets]
    return Dealt(micro_batches, int(load.sum()), float(load.mean() / load.max()))


def deal(tokens: np.ndarray, hands: int) -> np.ndarray:
    """(hands, G / hands) int64 rows, ascending: equally many clips each, tokens as equal as can be.

    The longest clips come first, one to each hand, the longest to the hand with the least so far.
    Then the fullest hand swaps a clip with an emptier one, until loads are equal or none helps.

    Args:
        tokens: (G,) int64, G a multiple of `hands`.
    """
    dealt, load = np.empty((hands, len(tokens) // hands), np.int64), np.zeros(hands, np.int64)
    longest_first = np.argsort(-tokens, kind="stable").reshape(-1, hands)
    for turn, rows in enumerate(longest_first):
        emptiest_first = np.argsort(load, kind="stable")
        dealt[emptiest_first, turn] = rows
        load[emptiest_first] += tokens[rows]
    for _ in range(_MOST_SWAPS):
        if np.ptp(load) <= _EQUAL * load.mean() or not _swap(tokens, dealt, load):
            break
    return np.sort(dealt, axis=1)


def _swap(tokens: np.ndarray, dealt: np.ndarray, load: np.ndarray) -> bool:
    """Swap a clip of the fullest hand with one of the emptiest hand that it helps most, if any."""
    fullest = int(load.argmax())
    given = tokens[dealt[fullest]]
    for hand in np.argsort(load, kind="stable")[:-1].tolist():
        gap = load[fullest] - load[hand]
        if gap <= 1:
            return False
        order = np.argsort(tokens[dealt[hand]], kind="stable")
        taken = tokens[dealt[hand]][order]
        # The best clip to take for each one given is half the gap shorter, or next to it.
        at = np.searchsorted(taken, given - gap / 2)
        near = np.stack([np.maximum(at - 1, 0), np.minimum(at, len(taken) - 1)])
        left = np.abs(gap - 2 * (given - taken[near]))
        which, clip = np.unravel_index(left.argmin(), left.shape)
        if left[which, clip] < gap:
            other = order[near[which, clip]]
            moved = given[clip] - tokens[dealt[hand, other]]
            load[fullest] -= moved
            load[hand] += moved
            dealt[fullest, clip], dealt[hand, other] = dealt[hand, other], dealt[fullest, clip]
            return True
    return False


def pack(tokens: np.ndarray, budget: int, most_clips: int | None) -> list[list[np.ndarray]]:
    """Each rank's micro-batches, as columns of `tokens`, ascending: as few as fit, none empty.

    Every rank gets as many as the others, since they meet in each; a rank's own are about equal.

    Args:
        tokens: (W, n) int64, of the clips of each rank, each between 1 and `budget`.
        budget: the most tokens of a micro-batch.
        most_clips: the most clips of a micro-batch, or None.
    """
    ranks, clips = tokens.shape
    most = min(most_clips or clips, clips)
    fewest = max(-(-int(tokens.sum(1).max()) // budget), -(-clips // most))
    fullest_first = np.argsort(-tokens.sum(1), kind="stable").tolist()
    for count in range(fewest, clips + 1):
        packed: dict[int, list[np.ndarray]] = {}
        for rank in fullest_first:  # where a count is too low, it is soonest so there
            packed[rank] = _balanced(tokens[rank], count, most)
            if max(tokens[rank, some].sum() for some in packed[rank]) > budget:
                break
        else:
            return [packed[rank] for rank in range(ranks)]
    raise AssertionError(f"a clip of {tokens.max()} tokens over the budget of {budget}")


def _balanced(tokens: np.ndarray, count: int, most_clips: int) -> list[np.ndarray]:
    """`count` sets of clips, about equally long: the longest clip first, each to the emptiest."""
    sets: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for clip in np.argsort(-tokens, kind="stable").tolist():
        load, number = emptiest[0]
        sets[number].append(clip)
        if len(sets[number]) == most_clips:
            heapq.heappop(emptiest)
        else:
            heapq.heapreplace(emptiest, (load + int(tokens[clip]), number))
    return [np.sort(np.array(some, np.int64)) for some in sets]
