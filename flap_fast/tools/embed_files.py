"""Embed many sound files into one array, in chunks that several machines can share.

    OUT/embeddings.npy          (N, d) float32, unit rows
    OUT/sounds.jsonl            the sound of each row, and of a window its start_s and end_s
    OUT/rejected.jsonl          sounds that cannot be read, and why
    OUT/.embed/KEY.safetensors  a finished chunk

A chunk is embedded by itself and named by a hash of all that its bits depend on: the model, the
crops, the batch, and the path, size and time of each sound. So a call that resumes, or several
machines of one kind, give the bytes of one call. Whether a sound begins a chunk
is decided by a hash of its path: sounds that are added, removed or changed affect only their own
chunk. A chunk with a sound that the system failed to read is embedded again by the next call.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flap_fast.checks import ConfigError, in_one_line, require
from flap_fast.data.preprocess.waveform import BadSound, Unread
from flap_fast.files import as_utf8, write_atomically
from flap_fast.preparation.prepare import Distributor
from flap_fast.preparation.ray_cluster import run_on_cluster
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.progress import Advance
from flap_fast.tools.embedder import Embedder, load
from flap_fast.tools.search import stat_sound
from flap_fast.tools.windows import WindowRows, chosen_crop, embed_cropped

_ARRAY, _SOUNDS, _REJECTED = "embeddings.npy", "sounds.jsonl", "rejected.jsonl"

Progress = Callable[[str, int | None], AbstractContextManager[Advance]]
"""As `flap_fast.progress.progress`: takes what is done and how much of it there is."""


@dataclass(frozen=True)
class Chunk:
    """Sounds that are embedded together, and the file of their embeddings."""

    sounds: Sequence[Path]
    file: Path

    @property
    def finished(self) -> bool:
        """Whether the file exists."""
        return self.file.is_file()

    @property
    def pending(self) -> bool:
        """Whether it must be embedded: unfinished, or the system failed to read a sound."""
        return not self.finished or self.about()["again"]

    def about(self) -> dict[str, Any]:
        """Return a finished chunk's metadata: `rejected` (reasons by number) and `again`."""
        return self._read()[0]

    def embeddings(self) -> np.ndarray:
        """Return a finished chunk's rows, (n, d) float32."""
        return self._read()[1]

    def save(self, about: dict[str, Any], rows: np.ndarray) -> None:
        """Write a finished chunk, with the SHA-256 of what it holds and of whose it is.

        Args:
            about: `rejected` and `again`; with windows `windows`, of each sound [start_s, end_s]s.
        """
        about = about | {"sha256": hashlib.sha256(rows.tobytes()).hexdigest()}
        about |= {"whole": self._digest(about)}
        write_atomically(self.file, save({"embeddings": rows}, {"about": json.dumps(about)}))

    def _digest(self, about: dict[str, Any]) -> str:
        """SHA-256 of the metadata, which hold that of the rows, and of the file's name."""
        return hashlib.sha256(json.dumps([self.file.name, about]).encode()).hexdigest()

    def _read(self) -> tuple[dict[str, Any], np.ndarray]:
        """Return the metadata and the rows.

        Raises:
            ConfigError: they cannot be read, changed since they were written, or are not finite.
        """
        try:
            with safe_open(self.file, "np") as file:
                rows = file.get_tensor("embeddings").astype("<f4", copy=False)
                about = json.loads(file.metadata()["about"])
            whole = about.pop("whole", None)  # neither is in files of before
            if whole not in (None, self._digest(about)):
                raise ValueError("it changed since it was written")
            if about.get("sha256") not in (None, hashlib.sha256(rows.tobytes()).hexdigest()):
                raise ValueError("its rows changed since they were written")
            embedded = len(self.sounds) - len(about["rejected"])
            windows = about.get("windows", [None] * embedded)
            wanted = sum(len(spans_s or [0]) for spans_s in windows)
            if len(windows) != embedded or len(rows) != wanted or about["again"] is None:
                raise ValueError(f"it has {len(rows)} rows for {len(self.sounds)} sounds")
            if not np.isfinite(rows).all():
                raise ValueError("a row is not finite")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as why:
            raise ConfigError(
                f"{self.file} must hold embeddings as they were written, got {in_one_line(why)}; "
                "delete it and run the same command again"
            ) from None
        return about, rows


@dataclass(frozen=True)
class Embedded:
    """The counts of OUT after a call of `embed_files`."""

    rows: int
    rejected: int
    unfinished: int = 0
    """Chunks of other calls; the last call to finish writes the array."""
    windowed: int | None = None
    """With windows, the number of sounds that the rows are windows of."""


def embed_files(
    model: str | Path,
    sounds: Iterable[Path],
    out: Path,
    *,
    crop: str | None = None,
    windows: str | None = None,
    length: str | None = None,
    batch: int = 64,
    shard_range: ShardRange | None = None,
    distributor: Distributor = "threads",
    chunk_sounds: int = 512,
    progress: Progress = lambda what, total: nullcontext(_ignore),
) -> Embedded:
    """Embed sound files; resumes an earlier call.

    Args:
        model: what `load` opens.
        crop: of long sounds, as in `Embedder.embed_each`; `default_crop` by default.
        windows: a row for each window instead, as in `Embedder.embed_windows`.
        length: audio.length, if not the one that the model was trained with.
        shard_range: embed only these chunks; the last call to finish writes the array.
        distributor: this process, or the running Ray cluster, where each task gets as many cores
            as this process computes on, or a GPU.
        chunk_sounds: sounds of a chunk on average.
        progress: shows it; called for opening the model and for embedding.

    Raises:
        ConfigError: no model, an unknown crop, no cluster, or an OUT with another's files.
    """
    _refuse_others(out)
    with progress("open the model", None):
        embedder = _open(model, length)
    crop = chosen_crop(embedder.config, crop, windows)
    (out / ".embed").mkdir(parents=True, exist_ok=True)
    chunks = list(_chunks(sounds, out, (embedder.identity, crop, batch), chunk_sounds))
    mine = chunks[shard_range.number - 1 :: shard_range.of] if shard_range else chunks
    pending = [chunk for chunk in mine if chunk.pending]
    with progress("embed", sum(len(chunk.sounds) for chunk in pending)) as advance:
        if distributor == "ray":
            task = partial(_embed_on_worker, model, length, embedder.identity, crop, batch)
            tasks = [(partial(task, chunk), len(chunk.sounds)) for chunk in pending]
            run_on_cluster(tasks, advance, cores=torch.get_num_threads(), gpu=True)
        else:
            for chunk in pending:
                _embed(embedder, chunk, crop, batch, advance)
    return _finish(out, chunks, embedder.config.joint.width)


def _refuse_others(out: Path) -> None:
    """Raise `ConfigError` where files that we did not write would be overwritten."""
    found = [name for name in (_ARRAY, _SOUNDS, _REJECTED) if (out / name).exists()]
    rule, remedy = "be new or made by flap embed", "name another folder"
    begun = (out / ".embed").is_dir()
    require(begun or not found, "OUT", rule, f"{out} with {', '.join(found)}", remedy)


def _ignore(sounds: int = 1, /) -> None:
    """Show no progress."""


def _chunks(
    sounds: Iterable[Path], out: Path, recipe: tuple[str, str, int], chunk_sounds: int
) -> Iterator[Chunk]:
    """Split the sounds, in order, before every `chunk_sounds`-th on average."""
    paths: list[Path] = []
    rows: list[tuple[str, int, int]] = []

    def chunk() -> Chunk:
        key = hashlib.sha256(json.dumps([recipe, rows]).encode()).hexdigest()
        return Chunk(tuple(paths), out / ".embed" / f"{key}.safetensors")

    for path in sounds:
        file = stat_sound(path, out)
        digest = hashlib.sha256(os.fsencode(file.path)).digest()
        if paths and int.from_bytes(digest[:8], "little") % chunk_sounds == 0:
            yield chunk()
            paths, rows = [], []
        paths.append(path)
        rows.append((file.path, file.size, file.mtime_ns))
    if paths:
        yield chunk()


def _embed(embedder: Embedder, chunk: Chunk, crop: str, batch: int, advance: Advance) -> None:
    rows, rejected, again = [torch.empty(0, embedder.config.joint.width)], {}, False
    windows: list[list[list[float]]] = []
    with closing(embed_cropped(embedder, chunk.sounds, batch, crop)) as found:
        for number, row in enumerate(found):
            again |= isinstance(row, Unread)
            if isinstance(row, BadSound):
                rejected[str(number)] = str(row)
            elif isinstance(row, WindowRows):
                rows.append(row.rows)
                windows.append(row.spans_s.tolist())
            else:
                rows.append(row[None])
            advance(1)
    about = {"rejected": rejected, "again": again} | ({"windows": windows} if windows else {})
    chunk.save(about, torch.cat(rows).numpy())


def _embed_on_worker(
    model: str | Path, length: str | None, identity: str, crop: str, batch: int, chunk: Chunk
) -> None:
    """Embed a chunk on a cluster's worker, which opens the model once."""
    embedder = _opened(model, length, identity)
    if embedder.identity != identity:
        raise ConfigError(f"every machine must see the same model in '{model}', got another one")
    _embed(embedder, chunk, crop, batch, advance=_ignore)


def _finish(out: Path, chunks: Sequence[Chunk], width: int) -> Embedded:
    """Return the counts; if all chunks are finished, write the array and both lists."""
    windowed = 0
    names, rejected = [], []
    finished = [chunk for chunk in chunks if chunk.finished]
    for chunk in finished:
        about = chunk.about()
        windowed += len(about.get("windows", ()))
        windows = iter(about.get("windows", ()))
        for number, path in enumerate(chunk.sounds):
            if why := about["rejected"].get(str(number)):
                rejected.append({"audio": str(path), "reason": why})
            elif spans_s := next(windows, None):
                its = ({"start_s": start, "end_s": end} for start, end in spans_s)
                names += [{"audio": str(path)} | span for span in its]
            else:
                names.append({"audio": str(path)})
    rows = len(names)
    unfinished = len(chunks) - len(finished)
    if not unfinished:

        def array() -> Iterator[bytes]:
            header = io.BytesIO()
            about = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(header, about)
            yield header.getvalue()
            for chunk in chunks:
                yield chunk.embeddings().tobytes()

        write_atomically(out / _REJECTED, _lines(rejected))
        # Deleted first, so that it never lists the rows of another array.
        (out / _SOUNDS).unlink(missing_ok=True)
        write_atomically(out / _ARRAY, array)
        write_atomically(out / _SOUNDS, _lines(names))
        keys = {chunk.file.name for chunk in chunks}
        for file in (out / ".embed").glob(f"{'[0-9a-f]' * 64}.safetensors"):
            if file.name not in keys:
                file.unlink(missing_ok=True)
    return Embedded(rows, len(rejected), unfinished, windowed or None)


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return as_utf8("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@lru_cache(maxsize=1)
def _opened(model: str | Path, length: str | None, identity: str) -> Embedder:
    """Open the model, again if its weights changed."""
    return _open(model, length)


def _open(model: str | Path, length: str | None) -> Embedder:
    """Open the model, on the GPU that a launcher assigned to this process, if any."""
    local = os.environ.get("LOCAL_RANK")
    device = f"cuda:{local}" if local and torch.cuda.is_available() else None
    return load(model, device, length=length)
