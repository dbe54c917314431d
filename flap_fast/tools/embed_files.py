"""Many sounds -> one array of embeddings, in pieces that any number of machines may share.

    OUT/embeddings.npy          (N, d) float32, unit rows
    OUT/sounds.jsonl            of each row its sound
    OUT/rejected.jsonl          what cannot be read, and why
    OUT/.embed/KEY.safetensors  a piece that is finished

A piece is embedded by itself and named by a hash of all that its bits depend on: the model, the
crops, the batch, and of each sound the path, size and time. So a stop and a second call, or several
machines of one kind, give the bytes of one call. A piece ends where a hash of the path says so:
sounds that come, go or change touch their own piece alone. One with a sound that the system did not
let us read, which another time it may, is embedded again by the next call.
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
from safetensors import safe_open
from safetensors.torch import save

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.waveform import BadSound, Unread
from flap_fast.files import write_atomically
from flap_fast.preparation.prepare import Distributor
from flap_fast.preparation.ray_cluster import run_on_cluster
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.tools.embedder import Embedder, load
from flap_fast.tools.search import stat_sound

Advance = Callable[[int], object]
"""Takes the number of sounds embedded since it was called last."""


@dataclass(frozen=True)
class Piece:
    """Sounds that are embedded apart from all others, and the file that is to hold the result."""

    sounds: Sequence[Path]
    file: Path

    @property
    def finished(self) -> bool:
        return self.file.is_file()

    @property
    def settled(self) -> bool:
        """Finished, and no sound in it is one that the system may let us read another time."""
        return self.finished and not self.about()["again"]

    def about(self) -> dict[str, Any]:
        """What a finished piece says: `rejected` (the reason by number), and `again`."""
        with safe_open(self.file, "np") as file:
            return json.loads(file.metadata()["about"])


@dataclass(frozen=True)
class Embedded:
    """What OUT holds after a call of `embed_files`."""

    rows: int
    rejected: int
    unfinished: int = 0
    """Pieces that other calls are still to embed; with them come the array and its names."""


def embed_files(
    model: Path,
    sounds: Iterable[Path],
    out: Path,
    *,
    crop: str = "center",
    batch: int = 64,
    part: ShardRange | None = None,
    distributor: Distributor = "threads",
    piece_sounds: int = 512,
    watch: Callable[[int], AbstractContextManager[Advance]] = lambda _: nullcontext(_ignore),
) -> Embedded:
    """Embed sound files; go on where an earlier call stopped.

    Args:
        model: a run's folder or a checkpoint's.
        crop: of long sounds, as in `Embedder.embed_each`.
        part: embed these pieces alone; whichever call finds all finished writes the array.
        distributor: this process, or the Ray cluster that is there, each task with as many cores
            as this process computes on, or with a GPU.
        piece_sounds: sounds a piece, about.
        watch: takes the number of sounds that are to be embedded, gives a context and in it what
            is told of each that is.

    Raises:
        ConfigError: no model; a crop that is none; no cluster.
    """
    embedder = _open(model)
    out.mkdir(parents=True, exist_ok=True)
    pieces = list(_pieces(sounds, out, (embedder.identity, crop, batch), piece_sounds))
    mine = pieces[part.number - 1 :: part.of] if part else pieces
    todo = [piece for piece in mine if not piece.settled]
    with watch(sum(len(piece.sounds) for piece in todo)) as advance:
        if distributor == "ray":
            there = partial(_embed_there, model, embedder.identity, crop, batch)
            tasks = [(partial(there, piece), len(piece.sounds)) for piece in todo]
            run_on_cluster(tasks, advance, cores=torch.get_num_threads(), gpu=True)
        else:
            for piece in todo:
                _embed(embedder, piece, crop, batch, advance)
    return _finish(out, pieces, embedder.config.joint.width)


def _ignore(sounds: int) -> None:
    """Nobody watches."""


def _pieces(
    sounds: Iterable[Path], out: Path, recipe: tuple[str, str, int], piece_sounds: int
) -> Iterator[Piece]:
    """The sounds in their order, cut before about every `piece_sounds`-th."""
    paths: list[Path] = []
    rows: list[tuple[str, int, int]] = []

    def piece() -> Piece:
        key = hashlib.sha256(json.dumps([recipe, rows]).encode()).hexdigest()
        return Piece(tuple(paths), out / ".embed" / f"{key}.safetensors")

    for path in sounds:
        seen = stat_sound(path, out)
        draw = hashlib.sha256(os.fsencode(seen.path)).digest()
        if paths and int.from_bytes(draw[:8], "little") % piece_sounds == 0:
            yield piece()
            paths, rows = [], []
        paths.append(path)
        rows.append((seen.path, seen.size, seen.mtime_ns))
    if paths:
        yield piece()


def _embed(embedder: Embedder, piece: Piece, crop: str, batch: int, advance: Advance) -> None:
    rows, rejected, again = [], {}, False
    with closing(embedder.embed_each(piece.sounds, batch, crop=crop)) as found:
        for number, row in enumerate(found):
            again |= isinstance(row, Unread)
            if isinstance(row, BadSound):
                rejected[number] = str(row)
            else:
                rows.append(row)
            advance(1)
    embeddings = torch.stack(rows) if rows else torch.empty(0, embedder.config.joint.width)
    piece.file.parent.mkdir(exist_ok=True)
    about = {"about": json.dumps({"rejected": rejected, "again": again})}
    write_atomically(piece.file, save({"embeddings": embeddings}, about))


def _embed_there(model: Path, identity: str, crop: str, batch: int, piece: Piece) -> None:
    """A task of a cluster; a worker opens the model once."""
    embedder = _opened(model, identity)
    if embedder.identity != identity:
        raise ConfigError(f"every machine must see the same model in '{model}', got another there")
    _embed(embedder, piece, crop, batch, advance=_ignore)


def _finish(out: Path, pieces: Sequence[Piece], width: int) -> Embedded:
    """The counts; where no piece is missing, the array, its names and rejected.jsonl."""
    rows = 0
    names, rejected = [], []
    there = [piece for piece in pieces if piece.finished]
    for piece in there:
        with safe_open(piece.file, "np") as file:
            rows += file.get_slice("embeddings").get_shape()[0]
        reasons = piece.about()["rejected"]
        for number, path in enumerate(piece.sounds):
            why = reasons.get(str(number))
            row = {"audio": str(path)} | ({"reason": why} if why else {})
            (rejected if why else names).append(row)
    unfinished = len(pieces) - len(there)
    if not unfinished:

        def array() -> Iterator[bytes]:
            header = io.BytesIO()
            about = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(header, about)
            yield header.getvalue()
            for piece in pieces:
                with safe_open(piece.file, "np") as file:
                    yield file.get_tensor("embeddings").astype("<f4", copy=False).tobytes()

        write_atomically(out / "rejected.jsonl", _lines(rejected))
        # Never the names of one array beside another.
        (out / "sounds.jsonl").unlink(missing_ok=True)
        write_atomically(out / "embeddings.npy", array)
        write_atomically(out / "sounds.jsonl", _lines(names))
        keys = {piece.file.name for piece in pieces}
        for file in (out / ".embed").glob("*.safetensors"):
            if file.name not in keys:
                file.unlink(missing_ok=True)
    return Embedded(rows, len(rejected), unfinished)


def _lines(rows: Iterable[dict[str, str]]) -> bytes:
    """JSON lines; a file name that is no UTF-8 is written as json reads it back."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(errors="backslashreplace")


@lru_cache(maxsize=1)
def _opened(model: Path, identity: str) -> Embedder:
    """The model, anew when it is another one: weights change under a path."""
    return _open(model)


def _open(model: Path) -> Embedder:
    """The model, on the GPU that a launcher gave this process, if there is one."""
    local = os.environ.get("LOCAL_RANK")
    return load(model, f"cuda:{local}" if local and torch.cuda.is_available() else None)
