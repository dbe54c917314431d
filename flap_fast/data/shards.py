"""WebDataset tar shards on disk: written once, read at any clip.

    FOLDER/0.tar 1.tar ...    KEY.flac + KEY.json for each clip, LAION's layout; of images KEY.jpg
                              or KEY.png + KEY.json, or KEY.txt with only a caption; KEY.npy, a
                              cached log-mel, in place of the sound
    FOLDER/0.idx 1.idx ...    offset and size of each file of a clip in the tar (DALI's format)
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

from flap_fast.checksums import check_sums
from flap_fast.config import Config
from flap_fast.data.preprocess.waveform import Unusable
from flap_fast.data.tar_header import pair_fault
from flap_fast.files import as_utf8, whole_characters

SOUNDS = ("flac", "wav", "ogg", "mp3", "opus")
IMAGES = ("jpg", "jpeg", "png")
MELS = ("npy",)
KINDS = {"sounds": SOUNDS, "images": IMAGES, "mels": MELS}
KINDS_OF_MODALITY = {"audio": ("sounds", "mels"), "image": ("images",)}
_OPEN_FILES = 256


class ShardError(ValueError):
    """A shard that cannot be read; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Shards:
    """N clips in the shards of one or more folders, in the order of the files.

    Args:
        locations: (N, 5) int64: the file's number, offset and size of the clip, and of its JSON.
        kind: what the clips are, one of `KINDS`.
        plain: (N,) bool, whether there is no JSON, but a text file that is the caption.
    """

    files: tuple[Path, ...]
    locations: np.ndarray
    kind: str = "sounds"
    plain: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.locations)

    def encoded(self, clip: int) -> bytes:
        """The bytes of a clip: its sound, image or cached log-mel."""
        file, offset, size, _, _ = self.locations[clip].tolist()
        return _read(self.files[file], offset, size)

    def encoded_range(self, clip: int, start: int, size: int) -> bytes:
        """`size` of a clip's bytes, from its byte `start`."""
        file, offset = self.locations[clip, :2].tolist()
        return _read(self.files[file], offset + start, size)

    def folder(self, clip: int) -> Path:
        """The folder of a clip's shard."""
        return self.files[self.locations[clip, 0]].parent

    def record(self, clip: int, *, captionless: bool = False) -> dict[str, Any]:
        """A clip's JSON, with `text` as a list of captions (img2dataset's is `caption`).

        Args:
            captionless: take a clip without captions too.

        Raises:
            Unusable: no JSON object, or no caption in it.
            ShardError: by the tar's headers, the JSON is another clip's: its index is wrong.
        """
        file, at, media, offset, size = self.locations[clip].tolist()
        tar = self.files[file]
        fault = pair_fault(functools.partial(_read, tar), (at, media), (offset, size))
        if fault:
            raise ShardError(
                f"{tar.with_suffix('.idx')} must be the index of {tar.name}, got {fault}; delete "
                "it, or fetch both again"
            )
        data = _read(self.files[file], offset, size)
        try:
            plain = self.plain is not None and self.plain[clip]
            record = {"text": data.decode()} if plain else json.loads(data)
            text = record.get("text", record.get("caption"))
        except (ValueError, AttributeError) as error:
            raise Unusable(f"its JSON cannot be read: {error}") from None
        texts = [text] if isinstance(text, str) else text if isinstance(text, list) else []
        texts = [whole_characters(t.strip()) for t in texts if isinstance(t, str) and t.strip()]
        if not texts and not captionless:
            raise Unusable("captionless: its JSON holds no text")
        return {**record, "text": texts}

    def name(self, clip: int) -> str:
        """A clip's file and offset, for messages."""
        file, offset, *_ = self.locations[clip].tolist()
        return f"{self.files[file]} at byte {offset}"


def shard_kinds(config: Config) -> tuple[str, ...]:
    """The kinds of shards that the config's encoder can be trained on."""
    return KINDS_OF_MODALITY[config.encoder.modality]


def open_shards(folders: Sequence[Path], kinds: Sequence[str] = ("sounds", "mels")) -> Shards:
    """All clips of the folders' shards, one folder after the other.

    Args:
        kinds: the kinds that are accepted, of `KINDS`.

    Raises:
        ShardError: a folder without shards, or not written or fetched to its end; a truncated
            shard; a clip without media or JSON; shards of more than one kind.
    """
    files: list[Path] = []
    locations: list[np.ndarray] = []
    plain: list[bool] = []
    kind_files: dict[str, Path] = {}
    for folder in folders:
        found = sorted(folder.glob("*.tar"), key=_natural)
        if not found:
            raise ShardError(
                f"{folder} must hold .tar shards, got none; "
                "write them with: flap prepare MANIFEST OUT"
            )
        if (folder.parent / ".prepare").is_dir() and not (folder / "sizes.json").is_file():
            raise ShardError(
                f"{folder} must have been written to its end, got no sizes.json: run the same "
                "flap prepare again, without --shard-range"
            )
        counts: dict[str, int | None] = {}
        for file in found:
            rows, texts, endings = _index(file, kinds)
            kind_files |= {k: file for k, of in KINDS.items() if not endings.isdisjoint(of)}
            plain += texts
            locations.append(
                np.array([(len(files), *row) for row in rows], np.int64).reshape(-1, 5)
            )
            files.append(file)
            counts[file.name] = len(rows) if file.with_suffix(".idx").is_file() else None
        _check_sizes(folder / "sizes.json", counts)
        check_sums(folder, ShardError)
    if len(kind_files) > 1:
        listed = ", ".join(f"{kind} in {file}" for kind, file in kind_files.items())
        raise ShardError(
            f"shards must be of one kind, got {listed}; name them in separate settings"
        )
    kind = next(iter(kind_files), kinds[0])
    return Shards(tuple(files), np.concatenate(locations), kind, np.array(plain, bool))


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


def _check_sizes(file: Path, clips: dict[str, int | None]) -> None:
    """Raise `ShardError` where a shard of sizes.json is missing, or has other clips.

    None is not compared: shards without our index, LAION's, whose sizes.json is only about right.
    """
    try:
        listed = dict(json.loads(file.read_text()) if file.is_file() else {})
    except (ValueError, TypeError) as error:
        raise ShardError(f"{file} must be a JSON object: {error}; fetch it again") from None
    for name, count in listed.items():
        if clips.get(name, -1) not in (count, None):
            got = f"{clips[name]} of {count} clips in {name}" if name in clips else f"no {name}"
            what = f"{file.parent} must hold the shards of its sizes.json, got {got}; fetch it or"
            raise ShardError(f"{what} run flap prepare again, or take it out of sizes.json")


def _index(
    file: Path, kinds: Sequence[str]
) -> tuple[list[tuple[int, int, int, int]], list[bool], set[str]]:
    """Offset and size of each clip's media and JSON, from the .idx file or from the tar.

    And whether a plain text stands in for the JSON; and the endings of the media.
    """
    index = file.with_suffix(".idx")
    clips = _parse_index(index) if index.is_file() else _scan(file)
    size = file.stat().st_size
    wanted = [ending for kind in kinds for ending in KINDS[kind]]
    what = f"an image ({', '.join(IMAGES)})" if kinds[0] == "images" else "a sound"
    rows, plain, endings = [], [], set()
    for key, files in clips:
        ending = next((ending for ending in wanted if ending in files), "")
        media, text = files.get(ending), files.get("json", files.get("txt"))
        if media is None or text is None:
            raise ShardError(f"{file}: clip {key} must have {what} and a .json, got {list(files)}")
        endings.add(ending)
        plain.append("json" not in files)
        if max(sum(media), sum(text)) > size:
            raise ShardError(
                f"{file} is truncated: clip {key} ends at byte {max(sum(media), sum(text))} of "
                f"{size}; delete it and run flap prepare again, or fetch it again"
            )
        rows.append((*media, *text))
    return rows, plain, endings


# A clip's key, and offset and size of each of its files in the tar.
_Clip = tuple[str, dict[str, tuple[int, int]]]


def _parse_index(index: Path) -> list[_Clip]:
    try:
        version, *lines = index.read_text().splitlines() or [""]
        if not version.startswith("v1.2 "):
            raise ValueError(f"its first line is '{version}'")
        clips = []
        for line in lines:
            words = line.split(" ")
            fields = [words[i : i + 4] for i in range(0, len(words), 4)]
            files = {ending.lower(): (int(at), int(size)) for ending, at, size, _ in fields}
            clips.append((words[3].rpartition(".")[0], files))
        if len(clips) != int(version.split()[1]):
            raise ValueError(f"it announces {version.split()[1]} clips and has {len(clips)}")
    except ValueError as error:
        raise ShardError(
            f"{index} must be a whole index of version 1.2: {error}; delete it"
        ) from None
    return clips


def _scan(file: Path) -> list[_Clip]:
    clips: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    files = clips.setdefault(f"{folder}/{key}" if folder else key, {})
                    if ending.lower() in files:
                        raise ShardError(f"{file}: {member.name} must stand once; it stands twice")
                    files[ending.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{file} is truncated or no tar: {error}; fetch it again") from None
    # tarfile takes a file that was cut or spoilt between two members for a whole one.
    with file.open("rb") as whole:
        whole.seek(end)
        if whole.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ShardError(
                f"{file} is truncated or no tar: it has no end mark at byte {end}; fetch it again"
            )
    return list(clips.items())


def _natural(file: Path) -> tuple:
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name))


def _read(file: Path, offset: int, size: int) -> bytes:
    descriptor = _descriptor(file)  # held: another thread may push it out of the cache
    data = os.pread(descriptor.fd, size, offset)
    if len(data) != size:
        raise ShardError(
            f"{file} ends before byte {offset + size}, inside a clip; was it replaced?"
        )
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
