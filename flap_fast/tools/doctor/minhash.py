"""Texts that are nearly equal, by MinHash: which of a million share most of their pieces.

A text is the set of its pieces of five bytes. Two texts whose sets overlap by J (Jaccard) have
equal minima of a hash with probability J; of 40 minima, 10 groups of 4 are looked up, which finds a
pair of J = 0.8 with probability 0.995, of 0.9 with 0.99998. Candidates are compared by their sets.

Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PIECE = 5
_GROUPS, _EACH = 10, 4
_CHUNK = 4096
# Of a bucket with more texts, each is compared with as many behind it.
_BEHIND = 8


def near_texts(texts: Sequence[str], least: float) -> np.ndarray:
    """(P, 2) int64, pairs i < j of distinct texts that share at least `least` of their pieces."""
    minima = np.concatenate(
        [_minima(texts[at : at + _CHUNK]) for at in range(0, len(texts), _CHUNK)]
        or [np.empty((0, _GROUPS * _EACH), np.uint64)]
    )
    found: set[tuple[int, int]] = set()
    for group in range(_GROUPS):
        keys = np.zeros(len(texts), np.uint64)
        for column in minima[:, group * _EACH : (group + 1) * _EACH].T:
            keys = _mixed(keys ^ column)
        order = np.argsort(keys, kind="stable")
        for step in range(1, _BEHIND + 1):
            equal = keys[order[:-step]] == keys[order[step:]]
            if not equal.any():
                break
            pairs = np.sort(np.stack([order[:-step][equal], order[step:][equal]], 1), 1)
            # The fraction of equal minima has a standard deviation of 0.08 at most.
            alike = (minima[pairs[:, 0]] == minima[pairs[:, 1]]).mean(1)
            found.update(map(tuple, pairs[alike > least - 0.2].tolist()))
    near = [pair for pair in sorted(found) if overlap(*(texts[n] for n in pair)) >= least]
    return np.array(near, np.int64).reshape(-1, 2)


def overlap(one: str, other: str) -> float:
    """The Jaccard index of two texts' sets of pieces, in [0, 1]."""
    first, second = _pieces(one), _pieces(other)
    return len(first & second) / len(first | second)


def _pieces(text: str) -> set[bytes]:
    padded = _padded(text)
    return {padded[at : at + _PIECE] for at in range(len(padded) - _PIECE + 1)}


def _padded(text: str) -> bytes:
    return f" {text} ".encode().ljust(_PIECE)


def _minima(texts: Sequence[str]) -> np.ndarray:
    """(n, 40) uint64 minima of the hashes of each text's pieces."""
    encoded = [_padded(text) for text in texts]
    joined = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
    lengths = np.array([len(text) for text in encoded])
    ends = np.cumsum(lengths)
    hashes = np.zeros(len(joined) - _PIECE + 1, np.uint64)
    for shift in range(_PIECE):
        hashes = (hashes << np.uint64(8)) | joined[shift : len(joined) - _PIECE + 1 + shift]
    inside = np.ones(len(joined), bool)  # pieces that reach into the next text are none
    for shift in range(1, _PIECE):
        inside[ends - shift] = False
    hashes = _mixed(hashes[inside[: len(hashes)]])
    starts = np.concatenate([[0], np.cumsum(lengths - _PIECE + 1)[:-1]])
    seeds = np.random.default_rng(0).integers(2**63, size=_GROUPS * _EACH, dtype=np.uint64)
    return np.stack([np.minimum.reduceat(_mixed(hashes ^ seed), starts) for seed in seeds], 1)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that leaves no pattern. Source: Steele et al. 2014, SplitMix64."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
