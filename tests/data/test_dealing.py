"""Dealing clips of different lengths: equal work for ranks, micro-batches that fit."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from flap_fast.data.dealing import deal, pack


def tokens_of(seconds: np.ndarray) -> np.ndarray:
    """Patches of 16 frames of 10 ms, eight rows of them, of which 40 % are kept; and [CLS]."""
    return (np.ceil(seconds * 100 / 16) * 8 * 0.4 + 1).astype(np.int64)


def lognormal(clips: int, rng: np.random.Generator) -> np.ndarray:
    return tokens_of(np.clip(rng.lognormal(1.5, 1.0, clips), 0.3, 30.0))


def uniform(clips: int, rng: np.random.Generator) -> np.ndarray:
    return tokens_of(rng.uniform(0.3, 30.0, clips))


def equal(clips: int, rng: np.random.Generator) -> np.ndarray:
    return tokens_of(np.full(clips, 10.0))


def bimodal(clips: int, rng: np.random.Generator) -> np.ndarray:
    """An eighth of 30 s, the others of a second: some for each rank."""
    return tokens_of(np.where(rng.permutation(clips) < clips // 8, 30.0, 1.0))


def one_giant(clips: int, rng: np.random.Generator) -> np.ndarray:
    """A clip longer than any other, but not than what a rank has."""
    seconds = rng.uniform(0.3, 3.0, clips)
    seconds[rng.integers(clips)] = 30.0
    return tokens_of(seconds)


MIXES = pytest.mark.parametrize("mix", [lognormal, uniform, equal, bimodal, one_giant])


@MIXES
@pytest.mark.parametrize(("clips", "world"), [(4608, 64), (4608, 3), (2304, 16), (512, 8)])
def test_ranks_get_as_many_clips_and_tokens_within_two_percent(
    mix: Callable, clips: int, world: int
):
    for seed in range(5):
        tokens = mix(clips, np.random.default_rng(seed))
        rows = deal(tokens, world)
        assert rows.shape == (world, clips // world)
        assert np.sort(rows, axis=None).tolist() == list(range(clips))
        assert (np.diff(rows, axis=1) > 0).all()
        load = tokens[rows].sum(1)
        assert np.ptp(load) <= 0.02 * load.mean()


def test_a_giant_that_is_more_than_a_ranks_share_is_dealt_with_the_shortest():
    tokens = np.array([1000, *range(1, 16)])
    assert tokens[deal(tokens, 4)[0]].tolist() == [1000, 1, 2, 3]


def test_swaps_do_what_dealing_in_turn_does_not():
    """In turn: 9 + 6 + 5 = 20 and 8 + 7 + 1 = 16; 9 for 7 makes them equal."""
    tokens = np.array([9, 8, 7, 6, 5, 1])
    assert tokens[deal(tokens, 2)].sum(1).tolist() == [18, 18]


def test_dealing_depends_on_the_tokens_alone_and_takes_little_of_a_step():
    tokens = lognormal(4608, np.random.default_rng(0))
    first, taken_s = deal(tokens, 64), []
    for _ in range(5):
        started = time.perf_counter()
        assert (deal(tokens.copy(), 64) == first).all()
        taken_s.append(time.perf_counter() - started)
    assert min(taken_s) < 0.02


@MIXES
@pytest.mark.parametrize(("clips", "world"), [(4608, 64), (512, 1), (96, 4)])
@pytest.mark.parametrize(("budget", "most_clips"), [(700, None), (4000, None), (4000, 20)])
def test_micro_batches_fit_are_as_many_on_every_rank_and_hold_every_clip_once(
    mix: Callable, clips: int, world: int, budget: int, most_clips: int | None
):
    tokens = mix(clips, np.random.default_rng(0)).reshape(world, -1)
    packed = pack(tokens, budget, most_clips)
    assert len({len(of_rank) for of_rank in packed}) == 1
    for of_rank, row in zip(packed, tokens, strict=True):
        assert np.sort(np.concatenate(of_rank)).tolist() == list(range(clips // world))
        assert max(row[some].sum() for some in of_rank) <= budget
        assert 0 < min(map(len, of_rank)) <= max(map(len, of_rank)) <= (most_clips or clips)
    fewest = max(row.sum() / budget for row in tokens)
    assert len(packed[0]) <= max(fewest * 1.25, clips / world / (most_clips or clips)) + 1


def test_a_rank_with_less_has_as_many_micro_batches_as_the_one_with_most():
    tokens = np.array([[5, 5, 5, 5], [1, 1, 1, 1]])
    packed = pack(tokens, 10, None)
    assert [[some.tolist() for some in of_rank] for of_rank in packed] == [[[0, 2], [1, 3]]] * 2


def test_a_micro_batch_is_one_where_all_fits():
    assert [some.tolist() for some in pack(np.array([[3, 1, 2]]), 6, None)[0]] == [[0, 1, 2]]
