"""Where each clip of a shard lies in it: from its index, or from the tar itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from flap_fast.checksums import SUMS, parsed_sums
from flap_fast.data.listing import Remote
from flap_fast.data.preprocess.sound_formats import SOUNDS
from flap_fast.data.shard_cache import RemoteFile
from flap_fast.data.tar_members import Members, ShardError, scan
from flap_fast.places import Place, Url, shown

IMAGES = ("jpg", "jpeg", "png")
MELS = ("npy",)
KINDS = {"sounds": SOUNDS, "images": IMAGES, "mels": MELS}
MEDIA = frozenset(ending for of in KINDS.values() for ending in of)


class Index(NamedTuple):
    """The clips of a shard, and what else it holds."""

    rows: list[tuple[int, int, int, int]]
    """Offset and size of each clip's media and JSON."""
    texts: list[tuple[int, int]]
    """Those of a text beside the JSON; (-1, 0) where it stands in for the JSON."""
    endings: set[str]
    """Of the media."""
    others: list[str]
    """Names of what is left out: no clips, or without media or JSON."""
    written: bool
    """There is an .idx file."""


def index_of(file: Place, kinds: Sequence[str], remote: Remote) -> Index:
    """The index of a shard, by its .idx file or by the tar.

    Args:
        kinds: the kinds of shards that are accepted, of `KINDS`.

    Raises:
        ShardError: a shard or an index that is not whole, or a clip without media or JSON.
    """
    if isinstance(file, Url):
        shard = remote.shard(file)
        clips, others, written = _remote_members(shard, remote)
        return _checked(file, shard.stamp.size, clips, others, kinds, written=written)
    index = file.with_suffix(".idx")
    written = index.is_file()
    clips, others = (_parse_index(index.read_bytes(), index), []) if written else scan(file, MEDIA)
    return _checked(file, file.stat().st_size, clips, others, kinds, written=written)


def _remote_members(
    shard: RemoteFile, remote: Remote
) -> tuple[list[tuple[str, Members]], list[str], bool]:
    """Clips, others, and whether an index says so; without one the shard is fetched, once."""
    index = shard.url.with_suffix(".idx")
    copy = remote.beside(index.parent, index.name)
    if copy is not None:
        data = copy.read_bytes()
        _check_sum(index, data, remote)
        return _parse_index(data, index), [], True
    kept = remote.cache.small_files / f"{shard.cached_name}.members"
    try:
        clips, others = json.loads(kept.read_bytes())
    except FileNotFoundError:
        clips, others = _scanned(shard, remote)
        remote.cache.keep(kept, json.dumps([clips, others]).encode())
    return (
        [(key, {e: (at, size) for e, (at, size) in m.items()}) for key, m in clips],
        others,
        False,
    )


def _scanned(shard: RemoteFile, remote: Remote) -> tuple[list[tuple[str, Members]], list[str]]:
    while True:
        path = remote.cache.path(shard)
        try:
            return scan(path, MEDIA)
        except FileNotFoundError:
            continue  # another shard needed the room
        except ShardError as error:
            raise ShardError(str(error).replace(str(path), shard.url.shown)) from None


def _check_sum(file: Url, data: bytes, remote: Remote) -> None:
    """Raise `ShardError` where a file is not the one that its folder's SHA256SUMS lists."""
    sums = remote.beside(file.parent, SUMS)
    where = (file.parent / SUMS).shown
    wanted = parsed_sums(sums.read_bytes(), where).get(file.name) if sums else None
    if wanted not in (None, hashlib.sha256(data).hexdigest()):
        raise ShardError(
            f"{file.shown} must be the file that {SUMS} lists, got another SHA-256; copy the "
            "folder again"
        )


def _checked(
    file: Place,
    size: int,
    clips: list[tuple[str, Members]],
    others: list[str],
    kinds: Sequence[str],
    *,
    written: bool,
) -> Index:
    wanted = [ending for kind in kinds for ending in KINDS[kind]]
    what = f"an image ({', '.join(IMAGES)})" if kinds[0] == "images" else "a sound"
    rows, texts, endings, halves = [], [], set(), {}
    others = [*others]
    keys = {key for key, _ in clips}
    for key, files in clips:
        ending = next((ending for ending in wanted if ending in files), "")
        media, text = files.get(ending), files.get("json", files.get("txt"))
        if media is None or text is None:
            if key.rpartition(".")[0] not in keys:  # KEY.more.json is KEY's
                halves[key] = list(files)
            continue
        endings.add(ending)
        texts.append(files.get("txt", (0, 0)) if "json" in files else (-1, 0))
        if max(sum(media), sum(text)) > size:
            raise ShardError(
                f"{shown(file)} is truncated: clip {key} ends at byte "
                f"{max(sum(media), sum(text))} of {size}; delete it and run flap prepare again, or "
                "fetch it again"
            )
        rows.append((*media, *text))
    if halves and (not rows or written):
        key, found = next(iter(halves.items()))
        raise ShardError(f"{shown(file)}: clip {key} must have {what} and a .json, got {found}")
    if not rows:
        others.append("all")
    others += [f"{key} ({', '.join(found)})" for key, found in halves.items()]
    return Index(rows, texts, endings, others, written)


def _parse_index(data: bytes, index: Place) -> list[tuple[str, Members]]:
    try:
        version, *lines = data.decode().splitlines() or [""]
        if not version.startswith("v1.2 "):
            raise ValueError(f"its first line is '{version}'")
        clips = []
        for line in lines:
            words = line.split(" ")
            fields = [words[i : i + 4] for i in range(0, len(words), 4)]
            if len(words) < 4:
                raise ValueError(f"it has the line '{line[:80]}'")
            files = {ending.lower(): (int(at), int(size)) for ending, at, size, _ in fields}
            clips.append((words[3].rpartition(".")[0], files))
        if len(clips) != int(version.removeprefix("v1.2 ")):
            raise ValueError(f"its first line is '{version}' and it has {len(clips)} clips")
    except ValueError as error:
        raise ShardError(
            f"{shown(index)} must be a whole index of version 1.2: {error}; delete it"
        ) from None
    return clips
