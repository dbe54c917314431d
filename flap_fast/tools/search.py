"""An index of sounds: embeddings in a file, updated as sounds change, and the nearest to a query.

The file holds the embeddings, and the path, size and time of each sound. An unchanged sound is not
embedded again, unless the model or the crops changed or the system failed to read it. The file is
written atomically every minute and at the end, also after an error: an interrupted update keeps
its embeddings. A search of some sounds keeps those of others, as long as they exist.

Of sounds in windows (`flap_fast.tools.windows`) each window has a row, with its start and end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.data.preprocess.sound_formats import SOUNDS, sounds_among
from flap_fast.data.preprocess.waveform import BadSound, Unread
from flap_fast.files import files_below, write_atomically
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.nearest import nearest_rows
from flap_fast.tools.windows import WindowRows, embed_cropped, suppress

INDEX = ".flap-index"
"""What names of indices in folders of sounds begin with."""

_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class File:
    """A sound file at the time of its embedding."""

    path: str
    """Relative to the index's folder, so that both can move together."""
    size: int
    mtime_ns: int
    error: str | None = None
    """Why it has no embedding, if it has none."""


Rows = dict[File, Tensor | WindowRows | None]
"""The (d,) embedding of each file, or its windows, or None."""


class Match(NamedTuple):
    """A sound, or a window of one, and how near it is to a query."""

    path: Path
    cosine: float
    span_s: tuple[float, float] | None
    """Where the window begins and ends, if the index has windows."""
    number: int
    """Of the sound among `Index.files`."""


class Index:
    """Sounds and their embeddings; `open_index` or `update_index` returns one."""

    def __init__(self, file: Path, model: str, crop: str, rows: Rows):
        self.file, self.model, self.crop, self.rows = file, model, crop, rows
        self.files = [sound for sound, row in rows.items() if row is not None]
        """Of the files those with embeddings."""
        each = [row for row in rows.values() if row is not None]
        vectors = [row.rows if isinstance(row, WindowRows) else row[None] for row in each]
        self.counts = torch.tensor([len(rows) for rows in vectors], dtype=torch.int64)
        """Rows of each of `files`."""
        self.embeddings = torch.cat(vectors) if vectors else torch.empty(0, 0)
        spans_s = [row.spans_s for row in each if isinstance(row, WindowRows)]
        self.spans_s = torch.cat(spans_s) if spans_s else None
        """With windows, (N, 2) float64: where each row's begins and ends."""

    @property
    def paths(self) -> list[Path]:
        """Paths of the sounds that have embeddings."""
        return [self.path(file) for file in self.files]

    @property
    def rejected(self) -> list[File]:
        """Files that could not be embedded."""
        return [file for file in self.rows if file.error is not None]

    def path(self, file: File) -> Path:
        """Return a file's path, relative to the working folder if the index's path is."""
        path = os.path.normpath(self.file.parent.resolve() / file.path)
        return Path(path if self.file.is_absolute() else os.path.relpath(path))

    def nearest(self, queries: Tensor, most: int = 10) -> list[list[Match]]:
        """Return for each query (Q, d) the sounds with the highest cosines, best first.

        With windows, those: of windows of one sound that overlap, only the best.
        """
        if not self.files:
            return [[] for _ in queries]
        owners = torch.arange(len(self.files)).repeat_interleave(self.counts)

        def distinct(rows: Tensor) -> list[int]:
            if self.spans_s is None:
                return list(range(len(rows)))
            return list(islice(suppress(owners[rows], self.spans_s[rows]), most))

        answers = []
        for query, found in zip(queries, nearest_rows(self.embeddings, queries, most), strict=True):
            rows, cosines = found
            kept = distinct(rows)
            while len(kept) < most and len(rows) < len(self.embeddings):
                ((rows, cosines),) = nearest_rows(self.embeddings, query[None], 4 * len(rows))
                kept = distinct(rows)
            best = zip(rows[kept].tolist(), cosines[kept].tolist(), strict=True)
            answers.append([self._match(int(owners[row]), row, cosine) for row, cosine in best])
        return answers

    def _match(self, owner: int, row: int, cosine: float) -> Match:
        span_s = None if self.spans_s is None else tuple(self.spans_s[row].tolist())
        return Match(self.path(self.files[owner]), cosine, span_s, owner)

    def save(self) -> None:
        """Write the file atomically."""
        about = {"model": self.model, "crop": self.crop, "files": [asdict(f) for f in self.rows]}
        windows = {} if self.spans_s is None else {"spans_s": self.spans_s, "counts": self.counts}
        about |= {"sha256": _digest(about, self.embeddings, *windows.values())}
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"embeddings": self.embeddings, "about": text, **windows}
        write_atomically(self.file, save(tensors, {"format": "flap-index"}))


def open_index(file: Path) -> Index:
    """Read an index.

    Raises:
        ConfigError: the file does not exist, is no index or changed since it was written.
    """
    require(file.is_file(), "the index", "be an existing file", file, "name sounds with --audio")
    try:
        tensors = load_file(file)
        about, embeddings = json.loads(bytes(tensors["about"].numpy())), tensors["embeddings"]
        digest = about.pop("sha256", None)  # not in indices of before
        if about.keys() != {"model", "crop", "files"}:
            raise ValueError(f"it holds {', '.join(about)}")
        windows = {name: tensors[name] for name in ("spans_s", "counts") if name in tensors}
        if digest not in (None, _digest(about, embeddings, *windows.values())):
            raise ValueError("it changed since it was written")
        if not embeddings.isfinite().all():
            raise ValueError("an embedding is not finite")
        rows = iter(embeddings)
        if windows:
            cuts = [
                part.split(windows["counts"].tolist()) for part in (windows["spans_s"], embeddings)
            ]
            rows = map(WindowRows, *cuts)
        files = [File(**row) for row in about["files"]]
        found: Rows = {file: next(rows) if file.error is None else None for file in files}
        return Index(file, about["model"], about["crop"], found)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, StopIteration) as why:
        raise ConfigError(f"{file} must be an index of flap, delete it: {why!r}") from None


def _digest(about: dict[str, Any], *tensors: Tensor) -> str:
    """SHA-256 of what an index holds: its JSON, and the type, shape and bytes of its tensors."""
    heads = [part for tensor in tensors for part in (str(tensor.dtype), list(tensor.shape))]
    digest = hashlib.sha256(json.dumps([about, *heads]).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Update:
    """The changes that bring an index up to date."""

    kept: Rows
    new: dict[File, Path]
    """Sounds to embed."""
    others: Rows
    """Of the earlier index sounds that are not requested, and exist: they stay in the file."""
    removed: int
    """Number of sounds of the earlier index that changed, or are gone."""
    rebuild_reason: str | None
    """Why nothing of the earlier index can be kept, if so."""


def plan_update(file: Path, embedder: Embedder, sounds: Sequence[Path], crop: str) -> Update:
    """Compare an index, if it exists, with the sounds that it should hold."""
    before = open_index(file) if file.is_file() else None
    rebuild_reason = None
    if before and before.model != embedder.identity:
        rebuild_reason = "another model made it"
    elif before and before.crop != crop:
        rebuild_reason = f"its crops are {before.crop}"
    known = before.rows if before and not rebuild_reason else {}
    unchanged = {(old.path, old.size, old.mtime_ns): old for old in known}
    kept: Rows = {}
    new: dict[File, Path] = {}
    for path in sounds:
        sound = stat_sound(path, file.parent)
        old = unchanged.get((sound.path, sound.size, sound.mtime_ns))
        if old is None:
            new[sound] = path
        else:
            kept[old] = known[old]
    requested = {sound.path for sound in (*kept, *new)}
    others = {
        old: row
        for old, row in known.items()
        if old.path not in requested and before and before.path(old).is_file()
    }
    removed = len(known) - len(kept) - len(others)
    return Update(kept, new, others, removed, rebuild_reason)


def update_index(
    file: Path,
    embedder: Embedder,
    update: Update,
    *,
    crop: str = "center",
    batch: int = 64,
    advance: Callable[[], object] = lambda: None,
) -> Index:
    """Embed the new sounds of an update and write the index, also after an error.

    Args:
        crop: of long sounds, as in `Embedder.embed_each`, or `window_policy`'s; the same as for
            `plan_update`.
        advance: called after each sound is embedded or rejected.

    Returns:
        The index of the requested sounds; the file also holds `update.others`.
    """
    rows = dict(update.kept)

    def index_of(rows: Rows) -> Index:
        return Index(file, embedder.identity, crop, dict(sorted(rows.items(), key=_by_path)))

    def saved() -> Index:
        index = index_of(rows)
        if update.new or update.removed or update.rebuild_reason:
            (index_of(rows | update.others) if update.others else index).save()
        return index

    due = time.monotonic() + _SAVE_EVERY_S
    try:
        found = embed_cropped(embedder, update.new.values(), batch, crop)
        with closing(found):
            for sound, row in zip(update.new, found, strict=True):
                if isinstance(row, Unread):  # no file matches this: the next update tries again
                    sound = replace(sound, size=0, mtime_ns=0)
                if isinstance(row, BadSound):
                    rows[replace(sound, error=str(row))] = None
                else:
                    rows[sound] = row
                advance()
                if time.monotonic() > due:
                    saved()
                    due = time.monotonic() + _SAVE_EVERY_S
    finally:
        index = saved()
    return index


def _by_path(item: tuple[File, object]) -> str:
    return item[0].path


def find_sounds(paths: Iterable[Path]) -> list[Path]:
    """Return the given files and all sound files below the given folders, without duplicates.

    What is left out of folders is counted, by ending, on stderr.

    Raises:
        ConfigError: a path does not exist, or there is no sound.
    """
    paths = list(paths)
    found: dict[Path, None] = {}  # in order, each once
    for path in paths:
        require(path.exists(), "a sound", "be an existing file or folder", path)
        files = [] if path.is_file() else files_below(path)
        below = [file for file in files if not file.name.startswith(INDEX)]
        found |= dict.fromkeys([path] if path.is_file() else sounds_among(below))
    rule = f"be files such as {', '.join(f'.{ending}' for ending in SOUNDS[:4])}"
    require(bool(found), "the sounds", rule, f"none in {', '.join(map(str, paths))}")
    return list(found)


def stat_sound(path: Path, folder: Path) -> File:
    """Return a sound's path relative to a folder, size and time; zeros if it does not exist."""
    try:
        stat = path.stat()
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:
        size = mtime_ns = 0
    return File(os.path.relpath(path.resolve(), folder.resolve()), size, mtime_ns)
