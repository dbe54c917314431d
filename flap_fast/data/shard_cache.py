"""A bounded folder of shards that were fetched by URL, shared by all processes of a machine.

    FOLDER/lock                       held while a process looks for room
    FOLDER/shards/ID-SIZE-0.tar       a whole shard; its time is that of its last use
    FOLDER/shards/ID-SIZE-0.tar.part  one being fetched, locked by the process that does
    FOLDER/index/ID-SIZE-0.idx        small files: indices, sizes.json, captions.jsonl; all are kept

ID is a hash of URL, size and ETag: a file that changed has another. A name counts with its SIZE, so
what is being fetched has its room from the start. A shard is read from an open file: one that is
deleted meanwhile stays readable to its reader. Locks go with their process, killed or not.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flap_fast.checks import ConfigError
from flap_fast.config import Data
from flap_fast.data.store import Stamp, pieces, retried
from flap_fast.data.tar_members import ShardError
from flap_fast.files import is_full, say, write_atomically
from flap_fast.places import Url

_POLL_S = 0.05
# A fetch that training waits for is told after so long.
_SAID_S = 5.0
# A shard's time of last use is written at most this often.
_USED_S = 30.0
_NAME = re.compile(r"[0-9a-f]{24}-(\d+)-.*?(\.part)?")


class RemoteFile(NamedTuple):
    """A file by URL, as it was when the run began."""

    url: Url
    stamp: Stamp
    cached_name: str
    """Its name in the cache."""


def remote_file(url: Url, stamp: Stamp) -> RemoteFile:
    """The file of a URL with this stamp."""
    text = f"{url.shown}\n{stamp.size}\n{stamp.mark}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    return RemoteFile(url, stamp, f"{digest}-{stamp.size}-{url.name[-100:]}")


class ShardCache:
    """Reads files by URL from a folder, into which it fetches them first. Safe in threads.

    Args:
        most: bytes of shards in the folder.
        retry_s: how long a failing read is tried again.
    """

    def __init__(self, folder: Path, most: int, retry_s: float):
        self.folder, self.most, self.retry_s = folder, most, retry_s
        self.wanted_soon: dict[int, frozenset[str]] = {}
        """Names of shards that each reader of this process comes to: they are deleted last."""
        self.shards, self.small_files = folder / "shards", folder / "index"
        self._prefix = f"{self.shards}/"
        self._used: dict[str, float] = {}

    def read(self, file: RemoteFile, offset: int, size: int) -> bytes:
        """Bytes `offset` to `offset + size` of a shard, which is fetched if it is not there.

        Raises:
            ShardError: it cannot be fetched, changed, or ends before that.
        """
        descriptor = self._open(file)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise ShardError(f"{file.url.shown} ends before byte {offset + size}, inside a clip")
        return data

    def path(self, file: RemoteFile) -> Path:
        """Where a shard lies once it is fetched, until another one needs its room."""
        os.close(self._open(file))
        return self.shards / file.cached_name

    def small(self, file: RemoteFile) -> Path:
        """The copy of a small file, fetched once."""
        copy = self.small_files / file.cached_name
        if not copy.is_file() or copy.stat().st_size != file.stamp.size:  # cut by a disk, say
            data = retried(file.url, lambda: _whole(file), self.retry_s)
            with self._named_if_full(file):
                self.keep(copy, data)
        return copy

    def keep(self, path: Path, data: bytes) -> None:
        """Write a small file, which may hold what was found out of shards."""
        with self._locked():
            self.small_files.mkdir(exist_ok=True)
        write_atomically(path, data)

    def fetch(self, file: RemoteFile, stop: threading.Event) -> bool:
        """Fetch a shard ahead, unless another process does; False where it has no room yet."""
        path = self.shards / file.cached_name
        if path.is_file():
            return True
        part = self._reserved(file, ahead=True)
        if part is None:
            return path.is_file() or not self._is_dead(self._part(file))
        self._fill(file, part, stop)
        return True

    def _open(self, file: RemoteFile) -> int:
        """A descriptor of a shard, which is waited for."""
        path = f"{self._prefix}{file.cached_name}"  # a Path would cost as much as the rest
        started = time.monotonic()
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                pass
            else:
                if os.fstat(descriptor).st_size == file.stamp.size:
                    self._note_use(path)
                    return descriptor
                os.close(descriptor)  # cut by a disk or by somebody
                Path(path).unlink(missing_ok=True)
            part = self._reserved(file, ahead=False)
            if part is not None:
                with _said_if_slow(file):
                    self._fill(file, part, None)
                continue
            # Another process or thread fetches it, or others that fill the cache.
            if not self._is_dead(self._part(file)):
                started = time.monotonic()
            time.sleep(_POLL_S)
            if time.monotonic() - started > self.retry_s + _SAID_S:
                raise ShardError(
                    f"{file.url.shown} found no room of {file.stamp.size >> 20} MiB in "
                    f"{self.folder} for {self.retry_s:g} s: other processes fill it; set "
                    "data.cache_gib higher, or data.cache to a folder of this run's own"
                )

    def _note_use(self, path: str) -> None:
        now = time.monotonic()
        if now - self._used.get(path, -_USED_S) >= _USED_S:
            self._used[path] = now
            with suppress(FileNotFoundError):  # deleted since it was opened
                os.utime(path)

    def _reserved(self, file: RemoteFile, *, ahead: bool) -> BinaryIO | None:
        """The locked, empty .part of a shard; None if it is there, being fetched, or has no room.

        Raises:
            ShardError: it is larger than the whole cache.
        """
        if file.stamp.size > self.most:
            raise ShardError(
                f"{file.url.shown} must fit into data.cache_gib = {self.most / 2**30:g}, got a "
                f"shard of {file.stamp.size / 2**30:.3g} GiB; set data.cache_gib higher"
            )
        with self._named_if_full(file), self._locked():
            part = self._part(file)
            if (self.shards / file.cached_name).is_file() or not self._is_dead(part):
                return None
            if not self._make_room(file, ahead=ahead):
                return None
            opened = part.open("w+b")
            fcntl.flock(opened, fcntl.LOCK_EX)
            return opened

    def _make_room(self, file: RemoteFile, *, ahead: bool) -> bool:
        """Delete what was read longest ago until a shard fits; False if it cannot."""
        used, shards = file.stamp.size, []
        wanted = frozenset().union(*self.wanted_soon.values())
        for path in self.shards.iterdir():
            named = _NAME.fullmatch(path.name)
            if named is None:
                continue  # not ours
            if named[2] and self._is_dead(path):
                path.unlink(missing_ok=True)
                continue
            used += int(named[1])
            if not named[2]:
                with suppress(FileNotFoundError):
                    used_at = path.stat().st_mtime
                    shards.append((path.name in wanted, used_at, path, int(named[1])))
        for soon, _, path, size in sorted(shards):
            if used <= self.most or (ahead and soon):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used <= self.most

    def _part(self, file: RemoteFile) -> Path:
        return self.shards / f"{file.cached_name}.part"

    def _is_dead(self, part: Path) -> bool:
        """Whether no process is fetching a .part: there is none, or its process ended."""
        try:
            with part.open("rb") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("wb")
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"data.cache must be a folder that can be written, got '{self.folder}': "
                f"{error.strerror}; name another one"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fill(self, file: RemoteFile, part: BinaryIO, stop: threading.Event | None) -> None:
        """Fetch a shard into its .part, and rename that when it is whole, if it is still there."""
        path = Path(part.name)
        at = 0

        def rest() -> None:
            nonlocal at
            for offset, data in pieces(file.url, file.stamp, at):
                os.pwrite(part.fileno(), data, offset)
                at = offset + len(data)
                if stop is not None and stop.is_set():
                    raise ShardError(f"{file.url.shown} is not wanted any more")
            if at != file.stamp.size:
                raise OSError(f"got {at} of {file.stamp.size} bytes")

        with part, self._named_if_full(file):
            try:
                stopped = stop.wait if stop else None
                retried(file.url, rest, self.retry_s, reached=lambda: at, stopped=stopped)
                os.fsync(part.fileno())
                with self._locked(), suppress(FileNotFoundError):  # somebody deleted it
                    if os.path.samestat(path.stat(), os.fstat(part.fileno())):
                        path.replace(self.shards / file.cached_name)
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    @contextmanager
    def _named_if_full(self, file: RemoteFile) -> Iterator[None]:
        try:
            yield
        except (OSError, ShardError) as error:
            cause = error.__cause__ if isinstance(error, ShardError) else error
            if isinstance(cause, OSError) and is_full(cause):
                raise ShardError(
                    f"data.cache, {self.folder}, has no room for {file.url.shown} "
                    f"({file.stamp.size / 2**20:.0f} MiB): the disk is full; make room, set "
                    "data.cache_gib lower, or data.cache to a folder on another disk"
                ) from error
            raise


def shard_cache(settings: Data) -> ShardCache:
    """The cache that the settings name."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = settings.cache or Path(home).expanduser() / "flap_fast"
    return _cache(folder, int(settings.cache_gib * 2**30), settings.retry_s)


@functools.cache  # one a process: its readers know of each other
def _cache(folder: Path, most: int, retry_s: float) -> ShardCache:
    return ShardCache(folder, most, retry_s)


def _whole(file: RemoteFile) -> bytes:
    data = bytearray(file.stamp.size)
    at = 0
    for offset, piece in pieces(file.url, file.stamp, 0):
        data[offset : offset + len(piece)] = piece
        at = offset + len(piece)
    if at != file.stamp.size:
        raise OSError(f"got {at} of {file.stamp.size} bytes")
    return bytes(data)


@contextmanager
def _said_if_slow(file: RemoteFile) -> Iterator[None]:
    """Say after some seconds that a shard is waited for."""
    text = f"waiting for {file.url.shown} ({file.stamp.size / 2**20:.0f} MiB)"
    timer = threading.Timer(_SAID_S, say, [text], {"error": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
