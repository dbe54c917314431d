"""WebDataset tar shards, on disk or by URL: written once, read at any clip.

    FOLDER/0.tar 1.tar ...    KEY.flac + KEY.json for each clip, LAION's layout; of images KEY.jpg
                              or KEY.png; KEY.npy, a cached log-mel, in place of the sound; KEY.txt,
                              a caption, in place of the JSON or of the text in it
    FOLDER/0.idx 1.idx ...    offset and size of each file of a clip in the tar (DALI's format)
    FOLDER/sizes.json         {"0.tar": clips, ...}

A clip is read with two `pread`s, so that any order over all shards costs the same. Shards without
an index (LAION's own) are scanned once; of these, members that are no clip's, and clips without
media or captions, are left out and counted on stderr. Shards by URL are read from a cache, into
which they are fetched whole (`shard_cache`).
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checksums import SUMS, check_sums
from flap_fast.config import Config, Data
from flap_fast.data.listing import (
    SIZES,
    Remote,
    ShardSet,
    ShardsOfSet,
    parsed_sizes,
    say_repeated,
    shard_sets,
)
from flap_fast.data.open_files import read_range
from flap_fast.data.preprocess.unusable import Unusable
from flap_fast.data.shard_cache import RemoteFile, shard_cache
from flap_fast.data.shard_index import IMAGES as IMAGES
from flap_fast.data.shard_index import KINDS as KINDS
from flap_fast.data.shard_index import Index, index_of
from flap_fast.data.tar_header import pair_fault
from flap_fast.data.tar_members import ShardError as ShardError
from flap_fast.files import as_utf8, parsed_json, say, whole_characters
from flap_fast.launcher import is_first_rank
from flap_fast.places import Place, Url, Weighted, place_in, shown

# Indices, or whole shards without one, fetched at a time.
_FETCHES = 8
KINDS_OF_MODALITY = {"audio": ("sounds", "mels"), "image": ("images",)}


@dataclass(frozen=True)
class Shards:
    """N clips in the shards of one or more folders, in the order of the files.

    Args:
        locations: (N, 5) int64: the file's number, offset and size of the clip, and of its JSON.
        kind: what the clips are, one of `KINDS`.
        plain: (N,) bool, whether there is no JSON, but a text file that is the caption.
        texts: (N, 2) int64: offset and size of a text file beside the JSON, zeros without.
        remote: where the files by URL are read; set if there are any.
        sets: the files of each entry of data.train, in order; set if one has a weight.
    """

    files: tuple[Place, ...]
    locations: np.ndarray
    kind: str = "sounds"
    plain: np.ndarray | None = None
    texts: np.ndarray | None = None
    remote: Remote | None = None
    sets: tuple[ShardsOfSet, ...] = ()

    def __len__(self) -> int:
        return len(self.locations)

    def encoded(self, clip: int) -> bytes:
        """The bytes of a clip: its sound, image or cached log-mel."""
        file, offset, size, _, _ = self.locations[clip].tolist()
        return self._read(file, offset, size)

    def encoded_range(self, clip: int, start: int, size: int) -> bytes:
        """`size` of a clip's bytes, from its byte `start`."""
        file, offset = self.locations[clip, :2].tolist()
        return self._read(file, offset + start, size)

    def folder(self, clip: int) -> Place:
        """The folder of a clip's shard."""
        return self.files[self.locations[clip, 0]].parent

    def beside(self, folder: Place, name: str) -> Path | None:
        """A small file of a shard's folder, or its copy; None where there is none."""
        if isinstance(folder, Url):
            assert self.remote is not None
            return self.remote.beside(folder, name)
        return folder / name if (folder / name).is_file() else None

    def remote_file(self, file: int) -> RemoteFile | None:
        """A shard by URL, as it was when it was opened; None of one on disk."""
        url = self.files[file]
        if isinstance(url, Path):
            return None
        assert self.remote is not None
        return self.remote.shard(url)

    def _read(self, file: int, offset: int, size: int) -> bytes:
        found = self.files[file]
        if isinstance(found, Path):
            return read_range(found, offset, size)
        assert self.remote is not None
        return self.remote.cache.read(self.remote.shard(found), offset, size)

    def record(self, clip: int, *, captionless: bool = False) -> dict[str, Any]:
        """A clip's JSON, with `text` as a list of captions.

        They are `text`, `caption` (img2dataset's) or `captions` of the JSON, the first of these
        that is not blank, or else the text file beside it.

        Args:
            captionless: take a clip without captions too.

        Raises:
            Unusable: no JSON object, or no caption in it.
            ShardError: by the tar's headers, the JSON is another clip's: its index is wrong.
        """
        file, at, media, offset, size = self.locations[clip].tolist()
        tar = self.files[file]
        fault = pair_fault(functools.partial(self._read, file), (at, media), (offset, size))
        if fault:
            raise ShardError(
                f"{shown(tar.with_suffix('.idx'))} must be the index of {tar.name}, got {fault}; "
                "delete it, or fetch both again"
            )
        data = self._read(file, offset, size)
        beside = (0, 0) if self.texts is None else self.texts[clip].tolist()
        try:
            if self.plain is not None and self.plain[clip]:
                record = parsed_record(None, lambda: data)
            else:
                record = parsed_record(
                    data, lambda: self._read(file, *beside) if beside[1] else b""
                )
        except ValueError as error:
            raise Unusable(f"its JSON cannot be read: {error}") from None
        if not record["text"] and not captionless:
            raise Unusable("captionless: its JSON holds no text")
        return record

    def name(self, clip: int) -> str:
        """A clip's file and offset, for messages."""
        file, offset, *_ = self.locations[clip].tolist()
        return f"{shown(self.files[file])} at byte {offset}"


def parsed_record(data: bytes | None, beside: Callable[[], bytes]) -> dict[str, Any]:
    """A clip's JSON, {} of None, with `text` as `Shards.record` finds it; raises `ValueError`.

    Args:
        beside: reads the text file beside it, empty without one.
    """
    record = {} if data is None else parsed_json(data)
    if not isinstance(record, dict):
        raise ValueError(f"it must be an object, got a {type(record).__name__}")
    found = (texts_of(record.get(name)) for name in ("text", "caption", "captions"))
    texts = next(filter(None, found), None) or texts_of(beside().decode("utf-8-sig"))
    return {**record, "text": texts}


def texts_of(value: Any) -> list[str]:
    """The captions of a value in a JSON: a text or a list of them, without blank ones."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [whole_characters(t.strip()) for t in texts if isinstance(t, str) and t.strip()]


def shard_kinds(config: Config) -> tuple[str, ...]:
    """The kinds of shards that the config's encoder can be trained on."""
    return KINDS_OF_MODALITY[config.encoder.modality]


def open_shards(
    places: Sequence[Place | Weighted],
    kinds: Sequence[str] = ("sounds", "mels"),
    settings: Data = Data(),  # noqa: B008 - frozen
) -> Shards:
    """All clips of the places' shards, one place after the other.

    Args:
        kinds: the kinds that are accepted, of `KINDS`.
        settings: how shards by URL are read.

    Raises:
        ConfigError: a package for URLs is missing.
        ShardError: a folder without shards or clips, or not written or fetched to its end; a
            truncated or compressed shard; no clip of a shard with media and JSON; shards of more
            than one kind.
    """
    remote = Remote(shard_cache(settings))
    files: list[Place] = []
    indices: list[Index] = []
    kind_files: dict[str, Place] = {}
    sets: list[ShardsOfSet] = []
    for entry in places:
        before = len(files)
        for found in shard_sets(place_in(entry), remote):
            added = _opened(found, kinds, remote)
            for file, index in zip(found.files, added, strict=True):
                new = (kind for kind, of in KINDS.items() if not index.endings.isdisjoint(of))
                kind_files |= dict.fromkeys(new, file)
            files += found.files
            indices += added
        weight = entry.weight if isinstance(entry, Weighted) else 1.0
        sets.append(ShardsOfSet(len(files) - before, weight, shown(place_in(entry))))
    if len(kind_files) > 1:
        listed = ", ".join(f"{kind} in {shown(file)}" for kind, file in kind_files.items())
        raise ShardError(
            f"shards must be of one kind, got {listed}; name them in separate settings"
        )
    say_repeated(tuple(files))
    rows = [np.array(index.rows, np.int64).reshape(-1, 4) for index in indices]
    numbers = np.repeat(np.arange(len(files)), [len(some) for some in rows])
    texts = [text for index in indices for text in index.texts]
    return Shards(
        tuple(files),
        np.concatenate([numbers[:, None], np.concatenate(rows)], axis=1),
        next(iter(kind_files), kinds[0]),
        np.array([at < 0 for at, _ in texts], bool),
        np.array([(max(0, at), size) for at, size in texts], np.int64).reshape(-1, 2),
        remote if any(isinstance(file, Url) for file in files) else None,
        tuple(sets) if any(one.weight != 1 for one in sets) else (),
    )


def _opened(found: ShardSet, kinds: Sequence[str], remote: Remote) -> list[Index]:
    """The indices of shards of one folder, which is checked."""
    folder, files = found.folder, found.files
    if isinstance(folder, Url):
        urls = [file for file in files if isinstance(file, Url)]
        indices_of = (url.with_suffix(".idx") for url in urls)
        remote.look_up(dict.fromkeys([folder / SIZES, folder / SUMS, *urls, *indices_of]))
        with ThreadPoolExecutor(_FETCHES) as pool:
            indices = list(pool.map(lambda file: index_of(file, kinds, remote), files))
        sizes = remote.beside(folder, SIZES)
    else:
        sizes = folder / SIZES if (folder / SIZES).is_file() else None
        if (folder.parent / ".prepare").is_dir() and sizes is None:
            raise ShardError(
                f"{folder} must have been written to its end, got no sizes.json: run the same "
                "flap prepare again, without --shard-range"
            )
        indices = [index_of(file, kinds, remote) for file in files]
    left_out = [*found.left_out]
    for file, index in zip(files, indices, strict=True):
        left_out += [f"{name} in {file.name}" for name in index.others]
    if sizes is not None:
        listed = parsed_sizes(sizes.read_bytes(), folder / SIZES)
        clips = [len(index.rows) if index.written else None for index in indices]
        counts = dict(zip((file.name for file in files), clips, strict=True))
        _check_sizes(folder, listed, counts, whole=found.whole)
    if not any(index.rows for index in indices):
        what = f"{shown(folder)} must hold shards with clips, got none in {files[0].name}"
        raise ShardError(what)
    if left_out:
        say_left_out(shown(folder), tuple(left_out))
    if isinstance(folder, Path):
        check_sums(folder, ShardError)
    return indices


def pack(samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> tuple[bytes, str, int]:
    """A shard's bytes, its index and its number of clips; the same bytes for the same samples.

    Args:
        samples: key, media and JSON record of each clip. A key is `KEY.ENDING` where the media are
            no FLAC.
    """
    buffer = io.BytesIO()
    lines: list[str] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, media, record in samples:
            fields = []
            text = as_utf8(json.dumps(record, ensure_ascii=False, sort_keys=True))
            key, _, kind = name.partition(".")
            for ending, data in ((kind or "flac", media), ("json", text)):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
                offset = buffer.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                fields.append(f"{ending} {offset} {len(data)} {info.name}")
            lines.append(" ".join(fields))
    index = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
    return buffer.getvalue(), index, len(lines)


def _check_sizes(
    folder: Place, listed: dict[str, int], clips: dict[str, int | None], *, whole: bool
) -> None:
    """Raise `ShardError` where a shard of sizes.json is missing, or has other clips.

    None is not compared: shards without our index, LAION's, whose sizes.json is only about right.
    """
    for name, count in listed.items():
        if clips.get(name, -1 if whole else None) not in (count, None):
            got = f"{clips[name]} of {count} clips in {name}" if name in clips else f"no {name}"
            what = f"{shown(folder)} must hold the shards of its sizes.json, got {got}; fetch it or"
            raise ShardError(f"{what} run flap prepare again, or take it out of sizes.json")


@functools.cache  # once a process
def say_left_out(folder: str, names: tuple[str, ...]) -> None:
    """Count files of a folder that are no clips, and name some."""
    if not is_first_rank():
        return
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    say(f"{folder}: left out {len(names)} files that are no clips: {some}", error=True)
