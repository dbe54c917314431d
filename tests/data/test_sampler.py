"""The order of samples: each once an epoch, whatever came before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Train
from flap_fast.data.dealing import dealt_in_order
from flap_fast.data.sampler import Sampler
from flap_fast.ranks import Ranks

# Seven shards of 1 to 7 clips, one of them empty.
FILES = np.repeat([0, 1, 2, 4, 5, 6, 7], range(1, 8))


def epoch_of(order: Sampler, epoch: int) -> np.ndarray:
    """(steps, global_batch) clips."""
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.stack([order.samples(step) for step in steps])


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("batch", [1, 4, 5, 28])
def test_an_epoch_has_no_clip_twice_and_drops_less_than_a_batch(batch, window):
    order = Sampler(FILES, batch, 3407, window)
    assert order.steps_per_epoch == 28 // batch
    for epoch in range(3):
        clips = epoch_of(order, epoch).flatten()
        assert len(clips) == len(set(clips)) == 28 // batch * batch
        assert set(clips) <= set(range(28))


def test_another_epoch_has_another_order_and_drops_other_clips():
    order = Sampler(FILES, 5, 3407)
    epochs = [epoch_of(order, epoch).flatten() for epoch in range(6)]
    assert len({tuple(clips) for clips in epochs}) == 6
    dropped = [set(range(28)) - set(clips) for clips in epochs]
    assert len(set.union(*dropped)) > 3


def test_epochs_are_counted_from_the_first_step():
    order = Sampler(FILES, 10, 0)
    assert [order.epoch(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("window", [0, 2])
def test_a_step_has_the_same_clips_for_whoever_comes_at_once(window):
    through = Sampler(FILES, 5, 3407, window)
    wanted = [through.samples(step).tolist() for step in range(20)]
    for step in (19, 3, 11, 0):
        assert Sampler(FILES, 5, 3407, window).samples(step).tolist() == wanted[step]
    assert Sampler(FILES, 5, 3408, window).samples(0).tolist() != wanted[0]


def test_shards_come_in_a_random_order_each_shuffled_in_a_way_of_its_own():
    files = np.repeat(np.arange(6), 10)
    clips = epoch_of(Sampler(files, 10, 1, shuffle_shards=1), 0)
    assert files[clips[:, 0]].tolist() != list(range(6))
    assert len({tuple(row) for row in clips % 10}) == 6


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_mixes_so_many_shards_and_finishes_them_first(window):
    """Where random reads are slow: no more shards are open than are mixed."""
    files = np.repeat(np.arange(6), 10)
    order = Sampler(files, 10, 1, window)
    for epoch in range(2):
        shards = files[epoch_of(order, epoch)].reshape(6 // window, -1)
        assert all(len(set(row)) == window for row in shards)
        assert len(set(map(frozenset, shards))) == 6 // window
    assert (epoch_of(order, 0) != epoch_of(order, 1)).any()


def test_a_batch_larger_than_the_data_is_refused():
    rule = "train.global_batch must be at most the 28 clips .* 29; set train.global_batch=16, or"
    with pytest.raises(ConfigError, match=rule):
        Sampler(FILES, 29, 0)


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 2), (2, 3), (3, 2)])
def test_the_micro_batches_of_all_ranks_are_the_rows_of_the_global_batch(world, micro):
    train = Train(global_batch=12, micro_batch=micro)
    rows = [
        some
        for rank in range(world)
        for some in dealt_in_order(train, Ranks(rank, world)).micro_batches
    ]
    assert {len(some) for some in rows} == {micro or 12}
    assert np.concatenate(rows).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("window", "wanted", "digest"),
    [(0, [5, 4, 10, 3, 12], "af0391ea2afdc780"), (3, [10, 9, 8, 13, 7], "b7ce1c248f8428b5")],
)
def test_the_order_is_that_of_earlier_versions(window, wanted, digest):
    """A run that is resumed goes on with the samples that it would have had."""
    order = Sampler(FILES, 5, 3407, window)
    samples = np.stack([order.samples(step) for step in range(20)])
    assert samples[7].tolist() == wanted
    assert hashlib.sha256(samples.tobytes()).hexdigest()[:16] == digest
