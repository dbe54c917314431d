"""The shards that places stand for: folders, single tars and patterns, on disk or by URL."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from flap_fast.data.shard_cache import RemoteFile, ShardCache, remote_file
from flap_fast.data.store import forbidden, listing, stamp
from flap_fast.data.tar_members import COMPRESSED, ShardError, tars_of
from flap_fast.files import parsed_json, say
from flap_fast.launcher import is_first_rank
from flap_fast.places import Place, Url, expanded, is_glob, is_pattern, shown

SIZES = "sizes.json"
# Requests at a time for stamps and small files.
_REQUESTS = 16


class ShardSet(NamedTuple):
    """Shards of one folder, in natural order: 2.tar before 10.tar."""

    folder: Place
    files: list[Place]
    whole: bool
    """All of the folder's; its sizes.json says which these must be."""
    left_out: list[str]
    """Files that look like shards and are none."""


class ShardsOfSet(NamedTuple):
    """One entry of data.train: the number of its shards, and its weight."""

    shards: int
    weight: float
    name: str


class Remote:
    """What lies at URLs, each asked for once."""

    def __init__(self, cache: ShardCache):
        self.cache = cache
        self._files: dict[Url, RemoteFile | None] = {}
        self._listed: dict[Url, list[str]] = {}
        self._folders: dict[Url, list[str]] = {}

    def file(self, url: Url) -> RemoteFile | None:
        """A file; None where there is none."""
        if url not in self._files and url.parent in self._listed:
            return None
        if url not in self._files:
            found = stamp(url, self.cache.retry_s)
            self._files[url] = found and remote_file(url, found)
        return self._files[url]

    def shard(self, url: Url) -> RemoteFile:
        """A shard, which must be there."""
        found = self.file(url)
        if found is None:
            raise ShardError(f"{url.shown} must be a shard, got no such file")
        return found

    def look_up(self, urls: Iterable[Url]) -> None:
        """Ask for many files at once."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(self._asked, urls))

    def _asked(self, url: Url) -> None:
        with suppress(ShardError):  # said when the file is wanted
            self.file(url)

    def names(self, folder: Url) -> list[str]:
        """The names of a folder's files; over HTTP those of its sizes.json.

        Raises:
            ShardError: over HTTP, no sizes.json.
        """
        if folder.on_web:
            found = self.beside(folder, SIZES)
            if found is None:
                raise ShardError(
                    f"{folder.shown} must hold a {SIZES}, as HTTP lists no folder, got none; write "
                    f"a pattern, as {folder.shown.rstrip('/')}/{{0..127}}.tar"
                )
            return sorted(parsed_sizes(found.read_bytes(), folder / SIZES))
        if folder not in self._listed:
            found = listing(folder, self.cache.retry_s)
            self._files |= {folder / n: remote_file(folder / n, s) for n, s in found.files.items()}
            self._listed[folder], self._folders[folder] = list(found.files), found.folders
        return self._listed[folder]

    def folders(self, folder: Url) -> list[str]:
        """The names of a folder's folders; over HTTP they cannot be listed."""
        if folder.on_web:
            return []
        self.names(folder)
        return self._folders[folder]

    def beside(self, folder: Url, name: str) -> Path | None:
        """The copy of a small file of a folder; None where there is none."""
        try:
            found = self.file(folder / name)
        except ShardError as error:
            # Of what is not there S3 says "forbidden" to who may not list the folder.
            if forbidden(error.__cause__):
                return None
            raise
        return found and self.cache.small(found)


def parsed_sizes(data: bytes, file: Place) -> dict[str, int]:
    """The clips of each shard, by a sizes.json.

    Raises:
        ShardError: no JSON object.
    """
    try:
        return dict(parsed_json(data))
    except (ValueError, TypeError) as error:
        what = f"{shown(file)} must be a JSON object: {error}; fetch it again"
        raise ShardError(what) from None


def shard_sets(place: Place, remote: Remote) -> list[ShardSet]:
    """The shards that a place stands for, in natural order.

    Raises:
        ShardError: there are none, or one is compressed.
    """
    if isinstance(place, Url):
        return _remote_sets(place, remote)
    if place.is_dir():
        tars, left_out = tars_of(place)
        files = sorted(tars, key=_natural)
        require_shards(place, files)
        return [ShardSet(place, [*files], True, left_out)]
    names = expanded(str(place)) if is_pattern(place) and not place.exists() else [str(place)]
    found = [path for name in names for path in _on_disk(Path(name))]
    for name in found:
        _require_tar(name)
        if not Path(name).is_file():
            what = f"{name} must be a folder of shards or a .tar, got no such file"
            raise ShardError(f"{what}; write them with: flap prepare MANIFEST OUT")
    return list(_by_folder(Path(name) for name in found))


def require_shards(place: Place, found: list, splits: Collection[str] = ()) -> None:
    """Raise `ShardError` where a place holds no shards, but perhaps folders of them, `splits`."""
    if not found:
        if isinstance(place, Path):
            splits = {tar.parent.name for tar in place.glob("*/*.tar")}
        if splits:
            what = (
                f"{shown(place)} must hold .tar shards, got folders of them: "
                f"{', '.join(sorted(splits))}"
            )
            example = "train" if "train" in splits else min(splits)
            raise ShardError(f"{what}; name one, as {shown(place / example)}")
        remedy = "write them with: flap prepare MANIFEST OUT"
        if isinstance(place, Url):
            remedy = "name the folder that the .tar files are in, or a pattern of their names"
        raise ShardError(f"{shown(place)} must hold .tar shards, got none; {remedy}")


@functools.cache  # once a process
def say_repeated(files: tuple[Place, ...]) -> None:
    """Name what is there more than once, as where two patterns overlap."""
    if not is_first_rank():
        return
    named = Counter(file if isinstance(file, Url) else os.path.realpath(file) for file in files)
    if twice := [file for file, times in named.items() if times > 1]:
        some = shown(twice[0] if isinstance(twice[0], Url) else Path(twice[0]))
        is_one = "1 shard is" if len(twice) == 1 else f"{len(twice):,} shards are"
        say(
            f"{is_one} named more than once, as {some}: an epoch takes each clip as often; name "
            "it once, or with {path: ..., weight: 2} if that is meant",
            error=True,
        )


def _on_disk(path: Path) -> list[str]:
    """What a pattern stands for; a folder whose name has a pattern's signs is taken by its name."""
    if not is_glob(path) or path.exists():
        return [str(path)]
    found = [str(path)]
    if not path.parent.is_dir():
        found = glob.glob(str(path))
    elif is_glob(Path(path.name)):
        found = glob.glob(f"{glob.escape(str(path.parent))}/{path.name}")
    require_shards(path, found)
    return found


def _remote_sets(place: Url, remote: Remote) -> list[ShardSet]:
    if not is_pattern(place) and not place.suffix.lower().endswith(".tar"):
        _require_tar(place.name)
        names = [name for name in remote.names(place) if not name.startswith(".")]
        for name in names:
            _require_tar(name)
        files = [place / name for name in names if name.lower().endswith(".tar")]
        if not files:
            inside = remote.folders(place)
            require_shards(place, [], [n for n in inside if _has_tars(remote.names(place / n))])
        return [ShardSet(place, sorted(files, key=_natural), True, [])]
    found = [url for one in expanded(place) for url in _matching(Url(one), remote)]
    for url in found:
        _require_tar(url.name)
    return list(_by_folder(found))


def _matching(url: Url, remote: Remote) -> list[Url]:
    if not is_glob(url):
        return [url]
    rule = "must have its *, ? or [] in the last part, and not over HTTP, which lists no folder"
    if url.on_web or is_glob(url.parent):
        raise ShardError(f"{url.shown} {rule}; write the names in braces, as {{0..127}}.tar")
    found = [url.parent / name for name in fnmatch.filter(remote.names(url.parent), url.name)]
    require_shards(url, found)
    return found


def _by_folder(files: Iterable[Place]) -> Iterator[ShardSet]:
    for _, some in groupby(sorted(files, key=_natural), lambda file: file.parent):
        group = list(some)
        yield ShardSet(group[0].parent, group, False, [])


def _has_tars(names: Iterable[str]) -> bool:
    return any(name.lower().endswith(".tar") for name in names)


def _require_tar(name: str) -> None:
    if name.lower().endswith(COMPRESSED):
        raise ShardError(f"{name} must be a plain tar, got a compressed one; unpack it")


def _natural(file: Place) -> tuple:
    parts = re.split(r"(\d+)", shown(file))
    return tuple(int(part) if part.isdecimal() else part for part in parts)
