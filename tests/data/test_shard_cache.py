"""The cache of shards: bounded, shared by processes, whole after any of them was killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.data import shard_cache, store
from flap_fast.data.read_ahead import ReadAhead
from flap_fast.data.shard_cache import RemoteFile, ShardCache, remote_file
from flap_fast.data.shards import ShardError
from tests.serving import Served, busy, serving, slow

SIZE = 1000


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Ten files of a thousand bytes, each of its number."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    with serving(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(shard_cache, "_USED_S", 0.0)


def files_of(served: Served) -> list[RemoteFile]:
    found = []
    for number in range(10):
        url = served.url / f"{number}.tar"
        stamp = store.stamp(url, 1.0)
        assert stamp is not None
        found.append(remote_file(url, stamp))
    return found


def cache_of(served: Served, shards: int, retry_s: float = 5.0) -> ShardCache:
    return ShardCache(served.folder.parent / "cache", shards * SIZE, retry_s)


def held(cache: ShardCache) -> list[int]:
    """The numbers of the shards that it holds, and -1 for each that is being fetched."""
    names = [file.name for file in cache.shards.glob("*")]  # before the first fetch there is none
    return sorted(-1 if n.endswith(".part") else int(n.split("-")[2][:-4]) for n in names)


def test_what_was_read_longest_ago_goes_first_and_the_bound_holds(served):
    cache, files = cache_of(served, 3), files_of(served)
    for number in (0, 1, 2, 0, 3):
        assert cache.read(files[number], 0, 3) == bytes([number]) * 3
        time.sleep(0.01)
    assert held(cache) == [0, 2, 3]
    cache.read(files[1], 0, 1)
    assert held(cache) == [0, 1, 3]


def test_a_shard_larger_than_the_cache_is_refused(served):
    cache = ShardCache(served.folder.parent / "cache", SIZE - 1, 1.0)
    with pytest.raises(ShardError, match=r"0\.tar must fit into data.cache_gib = .* set .* higher"):
        cache.read(files_of(served)[0], 0, 1)
    assert served.fetched(".tar") == 0


def test_a_shard_that_goes_while_it_is_read_is_fetched_again(served):
    cache, files = cache_of(served, 1), files_of(served)
    threads = [
        threading.Thread(target=lambda n=n: [cache.read(files[n], 5, 5) for _ in range(20)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held(cache)) == 1


def test_many_readers_fetch_a_shard_once(served):
    cache, file = cache_of(served, 3), files_of(served)[4]
    served.faults["4.tar"] = [slow(0.2)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(cache.read(file, 0, 2))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"\4\4"] * 8
    assert served.fetched(".tar") == 1


def test_what_is_deleted_while_it_is_fetched_is_fetched_again(served):
    cache, file = cache_of(served, 3), files_of(served)[4]
    served.faults["4.tar"] = [slow(0.2), slow(0.2)]
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(cache.read(file, 0, 2)))
    reader.start()
    for fetch in (1, 2):
        while reader.is_alive() and len(served.ranges.get("4.tar", ())) < fetch:
            time.sleep(0.01)
        shutil.rmtree(cache.shards)
    reader.join(5)
    assert (found, held(cache), served.fetched(".tar")) == ([b"\4\4"], [4], 3)


def test_the_copy_of_a_small_file_that_was_cut_is_fetched_again(served):
    cache, file = cache_of(served, 3), files_of(served)[4]
    for size in (SIZE - 1, 0):
        os.truncate(cache.small(file), size)
        assert cache.small(file).read_bytes() == b"\4" * SIZE


KILLED = """
import sys
from pathlib import Path
from flap_fast.data import store
from flap_fast.data.shard_cache import ShardCache, remote_file
from flap_fast.places import Url
url = Url(sys.argv[1])
cache = ShardCache(Path(sys.argv[2]), 1000, 60.0)
cache.read(remote_file(url, store.stamp(url, 1.0)), 0, 1)
"""


def test_a_process_that_is_killed_while_it_fetches_leaves_no_lock_and_no_half(served):
    """The other one waits for it, and takes over."""
    cache, file = cache_of(served, 1), files_of(served)[0]
    served.faults["0.tar"] = [slow(30)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, file.url, cache.folder])
    while not served.ranges.get("0.tar"):
        time.sleep(0.01)
    assert held(cache) == [-1]
    reader = threading.Thread(target=cache.read, args=(file, 0, 1))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert served.fetched("0.tar") == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader.join(5)
    assert held(cache) == [0]
    assert cache.read(file, SIZE - 1, 1) == b"\0"


def test_what_a_killed_process_left_makes_room_for_others(served):
    cache, files = cache_of(served, 1), files_of(served)
    cache.read(files[0], 0, 1)
    for name in (f"{files[1].cached_name}.part", "mine.txt"):
        (cache.shards / name).write_bytes(b"")
    cache.read(files[2], 0, 1)
    assert sorted(file.name for file in cache.shards.iterdir()) == [
        files[2].cached_name,
        "mine.txt",
    ]


def test_a_shard_that_was_cut_in_the_cache_is_fetched_again(served):
    cache, file = cache_of(served, 1), files_of(served)[3]
    os.truncate(cache.path(file), 10)
    assert cache.read(file, 900, 2) == b"\3\3"


def test_a_disk_that_fills_is_named_with_the_remedy_and_not_waited_for(served, monkeypatch):
    cache, file = cache_of(served, 3), files_of(served)[0]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    message = (
        r"^data\.cache, .*/cache, has no room for .*0\.tar .*disk is full; make room, set data"
    )
    with pytest.raises(ShardError, match=message):
        cache.read(file, 0, 1)
    assert held(cache) == []
    assert served.fetched(".tar") == 1


def test_a_cache_that_cannot_be_written_is_named(served):
    (served.folder.parent / "cache").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^data\.cache must be a folder that can be written"):
        cache_of(served, 3).read(files_of(served)[0], 0, 1)


def test_a_full_cache_is_waited_for_and_then_named(served):
    cache, files = cache_of(served, 1, retry_s=0.1), files_of(served)
    served.faults["0.tar"] = [slow(8)]
    threading.Thread(target=cache.read, args=(files[0], 0, 1), daemon=True).start()
    while not served.ranges.get("0.tar"):
        time.sleep(0.01)
    shard_cache_said, shard_cache._SAID_S = shard_cache._SAID_S, 0.1
    try:
        with pytest.raises(ShardError, match=r"1\.tar found no room of 0 MiB in .*: other proc"):
            cache.read(files[1], 0, 1)
    finally:
        shard_cache._SAID_S = shard_cache_said


def test_what_is_wanted_soon_goes_only_for_a_shard_that_is_needed_now(served):
    cache, files = cache_of(served, 2), files_of(served)
    for number in (0, 1):
        cache.read(files[number], 0, 1)
    cache.wanted_soon = {1: frozenset({files[0].cached_name, files[1].cached_name})}
    assert not cache.fetch(files[2], threading.Event())
    assert held(cache) == [0, 1]
    cache.wanted_soon = {1: frozenset({files[0].cached_name})}
    assert cache.fetch(files[2], threading.Event())
    assert held(cache) == [0, 2]
    cache.wanted_soon = {1: frozenset(file.cached_name for file in files)}
    assert cache.read(files[3], 0, 1) == b"\3"


def ahead_of(cache: ShardCache, files: list[RemoteFile], order: list[int]) -> ReadAhead:
    return ReadAhead(cache, [(step, files[number]) for step, number in enumerate(order)])


def settled(cache: ShardCache, wanted: list[int]) -> list[int]:
    """What the cache holds once it is what is wanted, or after a while."""
    until = time.monotonic() + 20.0
    while time.monotonic() < until and held(cache)[-len(wanted) :] != wanted:
        time.sleep(0.01)
    time.sleep(0.05)
    return held(cache)


def test_shards_are_fetched_ahead_of_the_reader_and_no_more_than_fit(served):
    cache, files = cache_of(served, 6), files_of(served)
    with ahead_of(cache, files, [*range(10)]) as ahead:
        assert settled(cache, [0, 1, 2, 3, 4, 5]) == [0, 1, 2, 3, 4, 5]
        ahead.reached(5)  # those of the last 4 positions may be read by another rank
        assert settled(cache, [1, 2, 3, 4, 5, 6]) == [1, 2, 3, 4, 5, 6]
        ahead.reached(10)
        assert settled(cache, [6, 7, 8, 9])[-4:] == [6, 7, 8, 9]
        assert len(held(cache)) <= 6
    assert cache.wanted_soon == {}
    assert served.fetched(".tar") == 10


def test_ranks_share_the_fetching(served):
    caches, files = [cache_of(served, 10) for _ in range(3)], files_of(served)
    for number in range(10):
        served.faults[f"{number}.tar"] = [slow(0.05)]
    aheads = [ahead_of(cache, files, [*range(10)]) for cache in caches]
    for ahead in aheads:
        ahead.__enter__()
    assert settled(caches[0], [*range(10)]) == [*range(10)]
    for ahead in aheads:
        ahead.__exit__()
    assert served.fetched(".tar") == 10


def test_a_fetch_that_fails_ahead_is_the_readers_error(served):
    cache, files = cache_of(served, 10, retry_s=0.05), files_of(served)
    served.faults["1.tar"] = [busy] * 1000
    with ahead_of(cache, files, [0, 1, 2]):
        assert settled(cache, [0, 2]) == [0, 2]
        with pytest.raises(ShardError, match=r"1\.tar cannot be read, tried for .* 503"):
            cache.read(files[1], 0, 1)


def test_leaving_stops_a_fetch_that_waits_for_a_server(served):
    cache, files = cache_of(served, 10, retry_s=60), files_of(served)
    served.faults["0.tar"] = [busy] * 1000
    ahead = ahead_of(cache, files, [0])
    with ahead:
        while not served.ranges.get("0.tar"):
            time.sleep(0.01)
    assert not any(thread.is_alive() for thread in ahead._threads)
    assert held(cache) == []
