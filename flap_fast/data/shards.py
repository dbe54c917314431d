"""WebDataset tar shards on disk: written once, read at any clip.

    FOLDER/0.tar 1.tar ...    KEY.flac + KEY.json for each clip, LAION's layout; of images KEY.jpg
                              or KEY.png; KEY.npy, a cached log-mel, in place of the sound; KEY.txt,
                              a caption, in place of the JSON or of the text in it
    FOLDER/0.idx 1.idx ...    offset and size of each file of a clip in the tar (DALI's format)
    FOLDER/sizes.json         {"0.tar": clips, ...}

A clip is read with two `pread`s, so that any order over all shards costs the same. Shards without
an index (LAION's own) are scanned once; of these, members that are no clip's, and clips without
media or captions, are left out and counted on stderr.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flap_fast.checksums import check_sums
from flap_fast.config import Config
from flap_fast.data.open_files import read_range
from flap_fast.data.preprocess.sound_formats import SOUNDS
from flap_fast.data.preprocess.unusable import Unusable
from flap_fast.data.tar_header import pair_fault
from flap_fast.data.tar_members import Members, scan, tars_of
from flap_fast.data.tar_members import ShardError as ShardError
from flap_fast.files import as_utf8, parsed_json, say, whole_characters

IMAGES = ("jpg", "jpeg", "png")
MELS = ("npy",)
KINDS = {"sounds": SOUNDS, "images": IMAGES, "mels": MELS}
KINDS_OF_MODALITY = {"audio": ("sounds", "mels"), "image": ("images",)}


@dataclass(frozen=True)
class Shards:
    """N clips in the shards of one or more folders, in the order of the files.

    Args:
        locations: (N, 5) int64: the file's number, offset and size of the clip, and of its JSON.
        kind: what the clips are, one of `KINDS`.
        plain: (N,) bool, whether there is no JSON, but a text file that is the caption.
        texts: (N, 2) int64: offset and size of a text file beside the JSON, zeros without.
    """

    files: tuple[Path, ...]
    locations: np.ndarray
    kind: str = "sounds"
    plain: np.ndarray | None = None
    texts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.locations)

    def encoded(self, clip: int) -> bytes:
        """The bytes of a clip: its sound, image or cached log-mel."""
        file, offset, size, _, _ = self.locations[clip].tolist()
        return read_range(self.files[file], offset, size)

    def encoded_range(self, clip: int, start: int, size: int) -> bytes:
        """`size` of a clip's bytes, from its byte `start`."""
        file, offset = self.locations[clip, :2].tolist()
        return read_range(self.files[file], offset + start, size)

    def folder(self, clip: int) -> Path:
        """The folder of a clip's shard."""
        return self.files[self.locations[clip, 0]].parent

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
        fault = pair_fault(functools.partial(read_range, tar), (at, media), (offset, size))
        if fault:
            raise ShardError(
                f"{tar.with_suffix('.idx')} must be the index of {tar.name}, got {fault}; delete "
                "it, or fetch both again"
            )
        data = read_range(self.files[file], offset, size)
        try:
            plain = self.plain is not None and self.plain[clip]
            record = {"text": data.decode("utf-8-sig")} if plain else parsed_json(data)
            if not isinstance(record, dict):
                raise ValueError(f"it must be an object, got a {type(record).__name__}")
            found = (texts_of(record.get(name)) for name in ("text", "caption", "captions"))
            texts = next(filter(None, found), [])
            if not texts and self.texts is not None and self.texts[clip, 1]:
                beside = read_range(self.files[file], *self.texts[clip].tolist())
                texts = texts_of(beside.decode("utf-8-sig"))
        except ValueError as error:
            raise Unusable(f"its JSON cannot be read: {error}") from None
        if not texts and not captionless:
            raise Unusable("captionless: its JSON holds no text")
        return {**record, "text": texts}

    def name(self, clip: int) -> str:
        """A clip's file and offset, for messages."""
        file, offset, *_ = self.locations[clip].tolist()
        return f"{self.files[file]} at byte {offset}"


def texts_of(value: Any) -> list[str]:
    """The captions of a value in a JSON: a text or a list of them, without blank ones."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [whole_characters(t.strip()) for t in texts if isinstance(t, str) and t.strip()]


def shard_kinds(config: Config) -> tuple[str, ...]:
    """The kinds of shards that the config's encoder can be trained on."""
    return KINDS_OF_MODALITY[config.encoder.modality]


def open_shards(folders: Sequence[Path], kinds: Sequence[str] = ("sounds", "mels")) -> Shards:
    """All clips of the folders' shards, one folder after the other.

    Args:
        kinds: the kinds that are accepted, of `KINDS`.

    Raises:
        ShardError: a folder without shards or clips, or not written or fetched to its end; a
            truncated or compressed shard; no clip of a shard with media and JSON; shards of more
            than one kind.
    """
    files: list[Path] = []
    texts: list[tuple[int, int]] = []
    locations: list[np.ndarray] = []
    plain: list[bool] = []
    kind_files: dict[str, Path] = {}
    for folder in folders:
        tars, left_out = tars_of(folder)
        found = sorted(tars, key=_natural)
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
            rows, beside, endings, others = _index(file, kinds)
            left_out += [f"{name} in {file.name}" for name in others]
            kind_files |= {k: file for k, of in KINDS.items() if not endings.isdisjoint(of)}
            plain += [at < 0 for at, _ in beside]
            texts += [(max(0, at), size) for at, size in beside]
            locations.append(
                np.array([(len(files), *row) for row in rows], np.int64).reshape(-1, 5)
            )
            files.append(file)
            counts[file.name] = len(rows) if file.with_suffix(".idx").is_file() else None
        _check_sizes(folder / "sizes.json", counts)
        if not any(map(len, locations[-len(found) :])):
            raise ShardError(f"{folder} must hold shards with clips, got none in {found[0].name}")
        if left_out:
            _say_left_out(folder, tuple(left_out))
        check_sums(folder, ShardError)
    if len(kind_files) > 1:
        listed = ", ".join(f"{kind} in {file}" for kind, file in kind_files.items())
        raise ShardError(
            f"shards must be of one kind, got {listed}; name them in separate settings"
        )
    kind = next(iter(kind_files), kinds[0])
    texts_beside = np.array(texts, np.int64).reshape(-1, 2)
    return Shards(
        tuple(files), np.concatenate(locations), kind, np.array(plain, bool), texts_beside
    )


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
        listed = dict(parsed_json(file.read_text()) if file.is_file() else {})
    except (ValueError, TypeError) as error:
        raise ShardError(f"{file} must be a JSON object: {error}; fetch it again") from None
    for name, count in listed.items():
        if clips.get(name, -1) not in (count, None):
            got = f"{clips[name]} of {count} clips in {name}" if name in clips else f"no {name}"
            what = f"{file.parent} must hold the shards of its sizes.json, got {got}; fetch it or"
            raise ShardError(f"{what} run flap prepare again, or take it out of sizes.json")


@functools.cache  # once a process
def _say_left_out(folder: Path, names: tuple[str, ...]) -> None:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    say(f"{folder}: left out {len(names)} files that are no clips: {some}", error=True)


def _index(
    file: Path, kinds: Sequence[str]
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int]], set[str], list[str]]:
    """Offset and size of each clip's media and JSON, from the .idx file or from the tar.

    And those of a text beside the JSON, or (-1, 0) where it stands in for the JSON; and the endings
    of the media; and the names of what is left out: no clips, or without media or JSON.
    """
    index = file.with_suffix(".idx")
    media_endings = {ending for of in KINDS.values() for ending in of}
    clips, others = (_parse_index(index), []) if index.is_file() else scan(file, media_endings)
    size = file.stat().st_size
    wanted = [ending for kind in kinds for ending in KINDS[kind]]
    what = f"an image ({', '.join(IMAGES)})" if kinds[0] == "images" else "a sound"
    rows, texts, endings, halves = [], [], set(), {}
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
                f"{file} is truncated: clip {key} ends at byte {max(sum(media), sum(text))} of "
                f"{size}; delete it and run flap prepare again, or fetch it again"
            )
        rows.append((*media, *text))
    if halves and (not rows or index.is_file()):
        key, found = next(iter(halves.items()))
        raise ShardError(f"{file}: clip {key} must have {what} and a .json, got {found}")
    if not rows:
        others.append("all")
    others += [f"{key} ({', '.join(found)})" for key, found in halves.items()]
    return rows, texts, endings, others


def _parse_index(index: Path) -> list[tuple[str, Members]]:
    try:
        version, *lines = index.read_text().splitlines() or [""]
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
            f"{index} must be a whole index of version 1.2: {error}; delete it"
        ) from None
    return clips


def _natural(file: Path) -> tuple:
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name))
