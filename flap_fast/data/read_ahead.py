"""Fetches shards by URL before they are read, in the order in which a reader will come to them.

    plan: (position, shard), ascending      the reader's position
         |------ read ------|--- wanted soon: at most the cache's size ---|-- later --|

What is wanted soon is kept in the cache, what was read goes first. Ranks of one machine follow the
same plan and share its work: each fetches what no other does. A fetch that fails here is tried
again by the reader who comes to it, and is an error then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.data.mixing import samples_by_shard
from flap_fast.data.shard_cache import RemoteFile, ShardCache
from flap_fast.data.shards import ShardError, Shards

Plan = Iterable[tuple[int, RemoteFile]]

# Shards fetched at a time, by each process.
_FETCHES = 4
# Positions for which a shard is kept after it was read: another rank may be behind.
_BEHIND = 4
_POLL_S = 0.2


class ReadAhead:
    """Fetches the shards of a plan on threads while it is entered.

    Args:
        plan: position and shard, positions ascending; it is walked on other threads.
    """

    def __init__(self, cache: ShardCache, plan: Plan):
        self._cache, self._plan = cache, iter(plan)
        self._wanted: dict[RemoteFile, int] = {}
        self._at, self._bytes = 0, 0
        self._stop, self._moved = threading.Event(), threading.Condition()
        self._turn = threading.Lock()  # of the thread that walks the plan
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_FETCHES)]

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with self._moved:
            self._moved.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)  # one that waits for a server ends with the process
        self._cache.wanted_soon.pop(id(self), None)

    def reached(self, position: int) -> None:
        """Say how far the reader is."""
        with self._moved:
            self._at = position
            self._moved.notify_all()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._turn:
                shard = self._next()
            if shard is None:
                return
            try:
                while not self._cache.fetch(shard, self._stop) and not self._stop.wait(_POLL_S):
                    pass  # what fills the cache is being fetched, or read by others
            except ShardError:
                continue  # the reader tries again, and says it

    def _next(self) -> RemoteFile | None:
        """The next shard of the plan, once there is room for it; None at the end."""
        for position, shard in self._plan:
            known = shard in self._wanted
            self._wanted[shard] = position
            if not known:
                self._bytes += shard.stamp.size
                self._wait_for_room()
                names = frozenset(shard.cached_name for shard in self._wanted)
                self._cache.wanted_soon |= {id(self): names}
                return None if self._stop.is_set() else shard
            if self._stop.is_set():
                return None
        return None

    def _wait_for_room(self) -> None:
        """Wait until what is wanted fits into the cache, without what was read."""
        with self._moved:
            while self._bytes > self._cache.most and not self._stop.is_set():
                read = [s for s, last in self._wanted.items() if last < self._at - _BEHIND]
                for shard in read:
                    del self._wanted[shard]
                    self._bytes -= shard.stamp.size
                if not read:
                    self._moved.wait()


def in_order_of_steps(
    shards: Shards, clips: Callable[[int], np.ndarray], steps: Iterable[int]
) -> Iterator[tuple[int, RemoteFile]]:
    """The plan of training: the shards by URL of each step's clips.

    It ends where all shards have come up once and fit into the cache: all have been fetched.
    """
    assert shards.remote is not None
    files = [shards.remote_file(number) for number in range(len(shards.files))]
    total = sum(file.stamp.size for file in set(files) if file)
    rest = {file for file in files if file} if total <= shards.remote.cache.most else None
    for step in steps:
        numbers, first = np.unique(shards.locations[clips(step), 0], return_index=True)
        for number in numbers[np.argsort(first)].tolist():
            file = files[number]
            if file is not None:
                yield step, file
                if rest is not None:
                    rest.discard(file)
        if rest is not None and not rest:
            return


@contextmanager
def reading_in_order(shards: Shards, clips: np.ndarray) -> Iterator[Callable[[int], None]]:
    """A context for reading (N,) clips, ascending; gives a function that is told each clip."""
    if shards.remote is None:
        yield lambda clip: None
        return
    numbers = shards.locations[:, 0]
    files = ((n, shards.remote_file(n)) for n in np.unique(numbers[clips]).tolist())
    plan = ((number, file) for number, file in files if file is not None)
    with ReadAhead(shards.remote.cache, plan) as ahead:
        yield lambda clip: ahead.reached(int(numbers[clip]))


def check_room(config: Config, shards: Shards) -> None:
    """Raise `ConfigError` where the cache is smaller than what batches read from at one time."""
    if shards.remote is None:
        return
    files = {shards.remote_file(number) for number in range(len(shards.files))}
    sizes = np.sort([file.stamp.size for file in files if file is not None])[::-1]
    clips = np.bincount(shards.locations[:, 0], minlength=len(shards.files))
    clips = np.sort(samples_by_shard(shards.sets, clips) if shards.sets else clips)
    window, most = config.data.shuffle_shards, shards.remote.cache.most

    def bytes_of(window: int) -> int:
        """The largest shards that the batches read at one time may need."""
        if not window:
            return int(sizes.sum())
        fewest = max(1, int(clips[:window].sum()))
        steps = config.frontend.prefetch + 2  # of which batches are read at a time
        windows = 1 + -(-steps * config.train.global_batch // fewest)
        return int(sizes[: window * windows].sum())

    needed = bytes_of(window)
    fits = next((n for n in (64, 32, 16, 8, 4, 2, 1) if bytes_of(n) <= most), 0)
    remedy = f"set data.shuffle_shards={fits}, or data.cache_gib higher" if fits else ""
    what = "all shards of data.train" if not window else f"the {window} shards mixed at a time"
    require(
        needed <= most,
        "data.cache_gib",
        f"be at least {needed / 2**30 * 1.0005:.3g} with data.shuffle_shards = "
        f"{window}, whose batches read from {what}",
        config.data.cache_gib,
        remedy or "set it higher",
    )
