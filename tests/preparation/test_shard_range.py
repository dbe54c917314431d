"""Shards shared among machines: the bytes of one, whoever is last, and no half for a whole."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from flap_fast.checks import ConfigError
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared, ShardRange, shard_range
from tests.preparation.test_prepare import contents
from tests.sounds import write_manifest


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_of_several_machines_are_the_bytes_of_one(corpus, prepared, tmp_path, order):
    """Whoever is last completes the folder; before, nobody takes it for whole."""
    done, left = None, []
    for number in order:
        done = prepare(
            corpus, tmp_path, shard_clips=7, shard_range=ShardRange(number, 3), show=False
        )
        left.append(done.unfinished)
        if done.unfinished:
            assert not list(tmp_path.rglob("sizes.json"))
            with pytest.raises(ShardError, match=r"to its end.* without --shard-range"):
                open_shards([next(tmp_path.rglob("*.tar")).parent])
    assert sorted(left, reverse=True) == left
    assert left[-1] == 0
    assert done == Prepared(30, 5, 30, 0)
    assert contents(tmp_path) == contents(prepared)


def test_a_shard_range_is_taken_under_its_former_name(corpus, tmp_path):
    second = ShardRange(2, 5)
    with pytest.warns(FutureWarning, match="part is now called shard_range"):
        done = prepare(corpus, tmp_path, shard_clips=7, part=second, show=False)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ConfigError, match=r"part must be left out with shard_range, got '2/5'"),
    ):
        prepare(corpus, tmp_path, shard_range=ShardRange(1, 5), part=second, show=False)
    assert (done.shards, done.unfinished) == (1, 4)
    assert [file.name for file in tmp_path.rglob("*.tar")] == ["1.tar"]


def test_every_shard_is_one_parts_and_one_call_does_what_parts_left(corpus, prepared, tmp_path):
    written: set[str] = set()
    for number in (2, 4):
        prepare(corpus, tmp_path, shard_clips=7, shard_range=ShardRange(number, 4), show=False)
        tars = {name for name in contents(tmp_path) if name.endswith(".tar")}
        assert len(tars - written) == 1
        written |= tars
    assert prepare(corpus, tmp_path, shard_clips=7, show=False) == Prepared(30, 5, 30, 0)
    assert contents(tmp_path) == contents(prepared)


def test_more_parts_than_shards_leave_some_with_nothing_to_do(corpus, prepared, tmp_path):
    for number in range(1, 10):
        done = prepare(
            corpus, tmp_path, shard_clips=7, shard_range=ShardRange(number, 9), show=False
        )
        assert done.unfinished == max(0, 5 - number)
    assert contents(tmp_path) == contents(prepared)


def test_parts_that_run_at_once_write_one_whole(corpus, prepared, tmp_path):
    """Two of them the same shard_range, as a scheduler may restart one that still runs."""

    def run(number: int) -> Prepared:
        return prepare(
            corpus, tmp_path, shard_clips=7, shard_range=ShardRange(number, 2), show=False
        )

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(run, (1, 2, 2, 1)))
    assert min(call.unfinished for call in done) == 0
    assert contents(tmp_path) == contents(prepared)


def test_parts_of_different_manifests_are_not_mixed(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", shard_clips=7, shard_range=ShardRange(1, 2), show=False)
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows[9]["captions"] = ["another"]  # of shard 1, which is shard_range 2's
    other = write_manifest(corpus.with_name("other.jsonl"), rows)
    prepare(other, tmp_path / "out", shard_clips=7, shard_range=ShardRange(2, 2), show=False)
    with pytest.raises(ManifestError, match="OUT must be new or hold this manifest's shards"):
        prepare(corpus, tmp_path / "out", shard_clips=7, show=False)


@pytest.mark.parametrize("text", ["0/8", "9/8", "8", "1/0", "-1/2", "1/2/3", "a/b", ""])
def test_a_part_that_is_none_is_refused_with_slurms_words(text):
    with pytest.raises(ConfigError, match=r"--shard-range must be A/B, .* got '.*sbatch --array"):
        shard_range(text)
    assert shard_range("3/8") == ShardRange(3, 8)
