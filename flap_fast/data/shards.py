"""WebDataset tar shards on disk: written once, read at any clip.

    FOLDER/0.tar 1.tar ...    KEY.flac + KEY.json for each clip, LAION's layout
    FOLDER/0.idx 1.idx ...    where each file of a clip lies in the tar (DALI's index format)
    FOLDER/sizes.json         {"0.tar": clips, ...}

A clip is read with two `pread`s, so that any order over all shards costs the same. Shards without
an index (LAION's own) are scanned once.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.data.sound import BadSound

SOUNDS = ("flac", "wav", "ogg", "mp3", "opus")
_OPEN_FILES = 256


class ShardError(ValueError):
    """A shard that cannot be read: which, why, and what to do."""


@dataclass(frozen=True)
class Shards:
    """N clips in the shards of one or more folders, in the order of the files.

    `place` is (N, 5) int64: the file, then offset and size of the sound and of the JSON.
    """

    files: tuple[Path, ...]
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def sound(self, clip: int) -> bytes:
        """The encoded sound of a clip."""
        file, at, size, _, _ = self.place[clip].tolist()
        return _read(self.files[file], at, size)

    def record(self, clip: int) -> dict[str, Any]:
        """What the JSON says, with `text` as a list of captions.

        Raises:
            BadSound: no JSON object, or no caption in it.
        """
        file, _, _, at, size = self.place[clip].tolist()
        try:
            record = json.loads(_read(self.files[file], at, size))
            text = record.get("text")
        except (ValueError, AttributeError) as error:
            raise BadSound(f"its JSON cannot be read: {error}") from None
        texts = [text] if isinstance(text, str) else list(text or ())
        texts = [t.strip() for t in texts if isinstance(t, str) and t.strip()]
        if not texts:
            raise BadSound("captionless: its JSON holds no text")
        return {**record, "text": texts}

    def name(self, clip: int) -> str:
        """Where a clip lies, for a message."""
        file, at, *_ = self.place[clip].tolist()
        return f"{self.files[file]} at byte {at}"


def open_shards(folders: Sequence[Path]) -> Shards:
    """All clips of the folders' shards, one folder after the other.

    Raises:
        ShardError: a folder without shards, a truncated shard, a clip without sound or JSON.
    """
    files: list[Path] = []
    places: list[np.ndarray] = []
    for folder in folders:
        found = sorted(folder.glob("*.tar"), key=_natural)
        if not found:
            raise ShardError(
                f"{folder} must hold .tar shards, got none; "
                "write them with: flap prepare MANIFEST OUT"
            )
        for file in found:
            rows = _index(file)
            places.append(np.array([(len(files), *row) for row in rows], np.int64).reshape(-1, 5))
            files.append(file)
    return Shards(tuple(files), np.concatenate(places))


def pack(samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> tuple[bytes, str, int]:
    """A shard's bytes, its index and its clips, the same bytes for the same samples.

    Args:
        samples: key, FLAC bytes and JSON record of each clip.
    """
    buffer = io.BytesIO()
    lines: list[str] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sound, record in samples:
            parts = []
            text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
            for ending, data in (("flac", sound), ("json", text)):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
                at = buffer.tell() - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                parts.append(f"{ending} {at} {len(data)} {info.name}")
            lines.append(" ".join(parts))
    index = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
    return buffer.getvalue(), index, len(lines)


def write_atomically(file: Path, data: bytes) -> None:
    """Write all of `data` or nothing: a crash or a full disk leaves no half file."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _index(file: Path) -> list[tuple[int, int, int, int]]:
    """Offset and size of each clip's sound and JSON, from the .idx beside it or from the tar."""
    index = file.with_suffix(".idx")
    clips = _parse_index(index) if index.is_file() else _scan(file)
    size = file.stat().st_size
    rows = []
    for key, parts in clips.items():
        sound = next((parts[ending] for ending in SOUNDS if ending in parts), None)
        text = parts.get("json")
        if sound is None or text is None:
            raise ShardError(f"{file}: clip {key} must have a sound and a .json, got {list(parts)}")
        if max(sum(sound), sum(text)) > size:
            raise ShardError(
                f"{file} is truncated: clip {key} ends at byte {max(sum(sound), sum(text))} of "
                f"{size}; delete it and run flap prepare again, or fetch it again"
            )
        rows.append((*sound, *text))
    return rows


def _parse_index(index: Path) -> dict[str, dict[str, tuple[int, int]]]:
    version, *lines = index.read_text().splitlines()
    if not version.startswith("v1.2"):
        raise ShardError(f"{index} must be an index of version 1.2, got '{version}'; delete it")
    clips = {}
    for line in lines:
        words = line.split(" ")
        parts = {words[i]: (int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)}
        clips[words[3].partition(".")[0]] = parts
    return clips


def _scan(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    clips: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    place = (member.offset_data, member.size)
                    clips.setdefault(f"{folder}/{key}", {})[ending.lower()] = place
    except tarfile.TarError as error:
        raise ShardError(f"{file} is truncated or no tar: {error}; fetch it again") from None
    return clips


def _natural(file: Path) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name))


def _read(file: Path, at: int, size: int) -> bytes:
    data = os.pread(_descriptor(file).fd, size, at)
    if len(data) != size:
        raise ShardError(f"{file} ended at byte {at + len(data)}, inside a clip; was it replaced?")
    return data


class _Descriptor:
    """An open file that closes with its last use."""

    def __init__(self, file: Path):
        self.fd = os.open(file, os.O_RDONLY)

    def __del__(self):
        os.close(self.fd)


@functools.lru_cache(_OPEN_FILES)
def _descriptor(file: Path) -> _Descriptor:
    return _Descriptor(file)
