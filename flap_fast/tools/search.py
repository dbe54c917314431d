"""Embeddings of many sounds, kept in a file and brought up to date, and the nearest of them.

The file holds the embeddings and of each sound its path, size and time; a sound that has not
changed since is not embedded again, unless the model or the crops are others, or the system did
not let us read it. It is written whole or not at all, every minute and when it ends in whatever
way: what is done stays done.

FAISS finds the candidates where it is installed, PyTorch where not; both are exact, and the order
is by the cosine in float64, equal ones by path.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.data.preprocess.waveform import BadSound, Unread
from flap_fast.files import write_atomically
from flap_fast.tools.embedder import Embedder

ENDINGS = frozenset(
    (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
)
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class File:
    """A sound file as it was when it was embedded."""

    path: str
    """From the index's folder, so that both can move together."""
    size: int
    mtime_ns: int
    error: str | None = None
    """Why it has no embedding."""


Rows = dict[File, Tensor | None]
"""Of each file its (d,) embedding; None of one that has none."""


class Index:
    """Sounds and their embeddings; `open_index` and `update_index` make one."""

    def __init__(self, file: Path, model: str, crop: str, rows: Rows):
        self.file, self.model, self.crop, self.rows = file, model, crop, rows
        vectors = [row for row in rows.values() if row is not None]
        self.embeddings = torch.stack(vectors) if vectors else torch.empty(0, 0)

    @property
    def paths(self) -> list[Path]:
        """Where the sounds are, in the order of `embeddings`."""
        return [self.path(file) for file in self.rows if file.error is None]

    @property
    def rejected(self) -> list[File]:
        """What could not be embedded."""
        return [file for file in self.rows if file.error is not None]

    def path(self, file: File) -> Path:
        """Where a file is; of an index that was named from the working folder, from there too."""
        path = os.path.normpath(self.file.parent.resolve() / file.path)
        return Path(path if self.file.is_absolute() else os.path.relpath(path))

    def nearest(self, queries: Tensor, most: int = 10) -> list[list[tuple[Path, float]]]:
        """Of each query (Q, d) the sounds with the highest cosines, best first."""
        files = [file for file in self.rows if file.error is None]
        if not files:
            return [[] for _ in queries]
        found = []
        candidates = _candidates(self.embeddings, queries, most)
        for query, rows in zip(queries, candidates, strict=True):
            # Row by row: a product of matrices may give equal rows unequal last bits.
            cosines = (self.embeddings[rows].double() * query.double()).sum(1)
            best = np.lexsort((rows.numpy(), -cosines.numpy()))[:most].tolist()
            found.append([(self.path(files[int(rows[n])]), cosines[n].item()) for n in best])
        return found

    def save(self) -> None:
        """Write the file, whole or not at all."""
        about = {"model": self.model, "crop": self.crop, "files": [asdict(f) for f in self.rows]}
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"embeddings": self.embeddings, "about": text}
        write_atomically(self.file, save(tensors, {"format": "flap-index"}))


def open_index(file: Path) -> Index:
    """Read an index.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    require(file.is_file(), "the index", "be an existing file", file, "name sounds with --audio")
    try:
        tensors = load_file(file)
        about = json.loads(bytes(tensors["about"].numpy()))
        vectors = iter(tensors["embeddings"])
        files = [File(**row) for row in about["files"]]
        rows = {file: next(vectors) if file.error is None else None for file in files}
        return Index(file, about["model"], about["crop"], rows)
    except (SafetensorError, KeyError, ValueError, TypeError, StopIteration) as error:
        raise ConfigError(f"{file} must be an index of flap, delete it: {error!r}") from None


@dataclass(frozen=True)
class Plan:
    """What bringing an index up to date takes."""

    kept: Rows
    todo: dict[File, Path]
    gone: int
    """Sounds of the earlier index that are no longer asked for, or have changed."""
    anew: str | None
    """Why nothing of the earlier index can be kept."""


def plan_update(file: Path, embedder: Embedder, sounds: Sequence[Path], crop: str) -> Plan:
    """Compare an index, if there is one, with the sounds that it is to have."""
    before = open_index(file) if file.is_file() else None
    anew = None
    if before and before.model != embedder.identity:
        anew = "another model made it"
    elif before and before.crop != crop:
        anew = f"its crops are {before.crop}"
    known = before.rows if before and not anew else {}
    same = {(there.path, there.size, there.mtime_ns): there for there in known}
    kept: Rows = {}
    todo: dict[File, Path] = {}
    for path in sounds:
        there = stat_sound(path, file.parent)
        old = same.get((there.path, there.size, there.mtime_ns))
        if old is None:
            todo[there] = path
        else:
            kept[old] = known[old]
    return Plan(kept, todo, len(known) - len(kept), anew)


def update_index(
    file: Path,
    embedder: Embedder,
    plan: Plan,
    *,
    crop: str = "center",
    batch: int = 64,
    advance: Callable[[], object] = lambda: None,
) -> Index:
    """Carry a plan out; the index holds what was done even where this is interrupted.

    Args:
        crop: of long sounds, as in `Embedder.embed_each`, and as the plan was made for.
        advance: called after each sound embedded or rejected.
    """
    rows = dict(plan.kept)

    def saved() -> Index:
        index = Index(file, embedder.identity, crop, dict(sorted(rows.items(), key=_by_path)))
        if plan.todo or plan.gone or plan.anew:
            index.save()
        return index

    due = time.monotonic() + _SAVE_EVERY_S
    try:
        found = embedder.embed_each(plan.todo.values(), batch, crop=crop)
        with closing(found):
            for there, row in zip(plan.todo, found, strict=True):
                if isinstance(row, Unread):  # as good as gone: tried again when it is there
                    there = replace(there, size=0, mtime_ns=0)
                bad = isinstance(row, BadSound)
                rows[replace(there, error=str(row)) if bad else there] = None if bad else row
                advance()
                if time.monotonic() > due:
                    saved()
                    due = time.monotonic() + _SAVE_EVERY_S
    finally:
        index = saved()
    return index


def _by_path(item: tuple[File, object]) -> str:
    return item[0].path


def find_sounds(places: Iterable[Path]) -> list[Path]:
    """The files named, and all sound files below the folders named, by path; each once.

    Raises:
        ConfigError: a place that is not there, or no sound at all.
    """
    found: dict[Path, None] = {}  # in order, each once
    for place in places:
        require(place.exists(), "a sound", "be an existing file or folder", place)
        inside = (f for f in _below(place) if f.suffix.lower() in ENDINGS and f.is_file())
        found |= dict.fromkeys([place] if place.is_file() else inside)
    require(bool(found), "the sounds", f"be files such as {', '.join(sorted(ENDINGS)[:4])}", "none")
    return list(found)


def _below(folder: Path) -> list[Path]:
    """What is below a folder and is none, by path; links are followed, each folder is read once."""
    found, seen, todo = [], set(), [str(folder)]
    for place in todo:  # links join it: what a folder holds itself comes first
        for inside, folders, files in os.walk(place):
            real = os.path.realpath(inside)
            folders[:] = [] if real in seen else sorted(folders)
            found += [] if real in seen else [Path(inside, name) for name in files]
            seen.add(real)
            below = (os.path.join(inside, name) for name in folders)
            todo += [path for path in below if os.path.islink(path)]
    return sorted(found)


def stat_sound(path: Path, folder: Path) -> File:
    """A sound as it is now, its path from a folder; zeros if it is gone, decoding will say so."""
    try:
        stat = path.stat()
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:
        size = mtime_ns = 0
    return File(os.path.relpath(path.resolve(), folder.resolve()), size, mtime_ns)


# Float32's cosines are that near to the true ones, for queries of length one.
_SLACK = 1e-5


def _candidates(embeddings: Tensor, queries: Tensor, most: int) -> Tensor:
    """(Q, C) int64: rows among which are the `most` highest cosines, and all that tie with them."""
    count, search = 2 * most + 16, _by_cosine(embeddings, queries)
    while True:
        count = min(count, len(embeddings))
        cosines, rows = search(count)
        behind = cosines[:, -1] < cosines[:, min(most, count) - 1] - _SLACK * queries.norm(dim=1)
        if count == len(embeddings) or behind.all():
            return rows
        count *= 4


def _by_cosine(embeddings: Tensor, queries: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What gives (Q, n) float32 cosines, the n highest, and their rows, int64."""
    try:
        import faiss
    except ImportError:
        cosines = queries @ embeddings.T
        return lambda count: cosines.topk(count, dim=1)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())

    def search(count: int) -> tuple[Tensor, Tensor]:
        cosines, rows = index.search(queries.numpy(), count)
        return torch.from_numpy(cosines), torch.from_numpy(rows)

    return search
