"""Checkpoints: complete or absent, the last few and the best, each a model folder of its own.

runs/NAME/checkpoints/step-000600/model.safetensors config.yaml text/  for flap_fast.load
                                  state.json optimizer.safetensors     to resume training
                                  trained.safetensors                  with train.ema_decay, LoRA
                                  average.safetensors                  with both
                                  SHA256SUMS                           of the others, but state.json
runs/NAME/checkpoints/best -> step-000400           or a copy, where there are no symlinks

Nothing in one depends on the ranks, the ZeRO stage or the engine that wrote it: any others resume.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from flap_fast.checks import ConfigError, in_one_line, require
from flap_fast.checksums import SUMS, delete_listed, verified, write_sums
from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.encoders.lora import has_lora, merged
from flap_fast.files import is_full, write_atomically
from flap_fast.model.model_folder import (
    AVERAGE,
    ONLY_TRAINING,
    OPTIMIZER,
    TRAINED,
    save_model,
    step_folders,
    step_of,
)
from flap_fast.places import shown
from flap_fast.ranks import Ranks
from flap_fast.tensors import save_tensors
from flap_fast.training.engine import Engine
from flap_fast.training.state import Best, State

_PUT_BACK = "put them back, or set run.name=ANOTHER"
# What file systems without symbolic links say.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Checkpoints:
    """Writes and checks the checkpoints of one run, which trains on `data`.

    Args:
        teacher: checksum of the teacher's weights.
    """

    def __init__(self, config: Config, ranks: Ranks, data: Shards, teacher: int | None = None):
        self._config, self._ranks, self._teacher = config, ranks, teacher
        self._clips, self._shards, self._versions = len(data), _hash(data), _versions(data)
        self._data = data
        self.folder = config.run_folder / "checkpoints"

    def state(self, folder: Path) -> State:
        """A checkpoint's state; the headers of its other files are checked too.

        Raises:
            ConfigError: it is broken, or was trained on other data.
        """
        file = folder / "state.json"
        try:
            state = TypeAdapter(State).validate_json(file.read_bytes())
            if state.sha256 not in (None, state.digest()):
                raise ValueError("it changed since it was written")
            if state.step != step_of(folder):
                raise ValueError(f"its step is {state.step}")
            for file in (folder / "model.safetensors", folder / OPTIMIZER):
                with safe_open(file, "pt"):
                    pass  # opening checks that the file is as long as its header says
        except (OSError, ValueError, SafetensorError) as error:
            why = in_one_line(error)  # safetensors' may quote much of the file
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            message = f"{file} cannot be read: {why}; {self._without(folder)}"
            raise ConfigError(message) from None
        if state.shards not in (None, self._shards):
            rule = f"hold the {state.clips} clips that the run started with"
            got = f"{self._clips} others" if state.clips == self._clips else self._clips
            require(False, "data.train", rule, got, _PUT_BACK)
        marks = enumerate(zip(state.versions or [], self._versions, strict=False))
        changed = [shown(self._data.files[n]) for n, (was, now) in marks if was != now]
        rule, got = "hold the shards that the run started with", "another size or ETag of "
        require(not changed, "data.train", rule, got + ", ".join(changed[:3]), _PUT_BACK)
        same, rule = state.teacher in (None, self._teacher), "be the one that the run started with"
        require(same, "loss.distill.teacher", rule, "other weights", _PUT_BACK)
        return state

    def verified(self, folder: Path) -> AbstractContextManager[None]:
        """A context that reads a checkpoint, and ends with a `ConfigError` if its files changed."""
        return verified(folder, on=self._config.ckpt.verify, remedy=self._without(folder))

    def save(
        self,
        engine: Engine,
        step: int,
        best: Best | None,
        *,
        is_best: bool = False,
        scored: bool = True,
    ) -> Path:
        """Write a checkpoint, then delete those no longer kept; returns its folder. Collective.

        A failure on the way (a full disk) leaves the earlier checkpoints as they were.
        """
        final = self._folder(step)
        partial = final.with_name(f"{final.name}.part")
        try:
            self._write(partial, engine, self._state(step, best, scored))
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)  # frees a full disk
            if isinstance(error, OSError):
                room = "make room and " if is_full(error) else ""
                raise OSError(f"{error}; {room}run the same command with --resume") from error
            raise
        if self._ranks.first:
            _put_aside(final)  # incomplete, or the run would have resumed from it
            partial.replace(final)
            self._rotate(final, is_best)
        self._ranks.barrier()
        return final

    def mark_scored(self, step: int, best: Best | None, *, is_best: bool) -> None:
        """Record that the checkpoint of `step` has been scored. Collective."""
        if self._ranks.first:
            folder = self._folder(step)
            write_atomically(folder / "state.json", self._state(step, best, True))
            self._rotate(folder, is_best)
        self._ranks.barrier()

    def _without(self, folder: Path) -> str:
        before = [earlier.name for earlier in step_folders(self.folder) if earlier != folder]
        return f"remove {folder} to {f'resume from {before[-1]}' if before else 'start over'}"

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _state(self, step: int, best: Best | None, scored: bool) -> bytes:
        state = State(
            step=step,
            best=best.score if best else None,
            since_best=best.since if best else None,
            best_task=best.task if best else None,
            scored=scored,
            clips=self._clips,
            shards=self._shards,
            versions=self._versions,
            teacher=self._teacher,
        )
        state = replace(state, sha256=state.digest())
        return (json.dumps(asdict(state), indent=1) + "\n").encode()

    def _rotate(self, folder: Path, is_best: bool) -> None:
        if is_best:
            self._point_to(folder)
        _fsync(self.folder)
        self._delete_old()

    def _write(self, partial: Path, engine: Engine, state: bytes) -> None:
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; no link
            _put_aside(partial)
            partial.mkdir(parents=True)
        self._ranks.broadcast(engine.module.buffers())  # as a resumed run finds them on every rank
        average, adapted, first = engine.average, has_lora(engine.module), self._ranks.first
        with average.in_use() if average else nullcontext():
            weights = engine.weights()
            if first:
                whole = merged(engine.module, weights)
                save_model(partial, self._config, engine.module, whole, sums=False)
                del whole
            if first and average and adapted:
                save_tensors(partial / AVERAGE, {name: weights[name] for name in average.names})
        if average:
            weights = engine.weights()
        if first and (average or adapted):
            save_tensors(partial / TRAINED, weights)
        del weights
        engine.optimizer_state.save(partial / OPTIMIZER)
        if self._ranks.first:
            paths = list(partial.rglob("*"))
            with ThreadPoolExecutor(1) as pool:
                # Beside the disk's work: SHA-256 of 1 GB takes about a second of a core.
                sums = pool.submit(write_sums, partial, [p for p in paths if p.is_file()])
                for path in paths:
                    _fsync(path)
                sums.result()
            (partial / "state.json").write_bytes(state)
            for path in (partial / SUMS, partial / "state.json", partial):
                _fsync(path)

    def _point_to(self, best: Path) -> None:
        link, target = self.folder / "best.part", self.folder / "best"
        _clear(link)
        try:
            os.symlink(best.name, link)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copytree(best, link, ignore=shutil.ignore_patterns("state.json", *ONLY_TRAINING))
            write_sums(link)
        if not (link.is_symlink() and target.is_symlink()):
            _clear(target)  # a folder and a link do not replace each other
        link.replace(target)

    def _delete_old(self) -> None:
        # The run makes no links: one to a folder elsewhere is somebody else's.
        folders = [folder for folder in step_folders(self.folder) if not folder.is_symlink()]
        best = (self.folder / "best").resolve()
        for folder in folders[: -self._config.ckpt.keep_last]:
            if folder.resolve() != best and (folder / SUMS).is_file():
                # First of all no checkpoint any more; what others put into it stays.
                (folder / "state.json").unlink()
                delete_listed(folder)


def latest(folder: Path) -> Path | None:
    """The latest complete checkpoint of a folder of checkpoints."""
    return next(reversed(step_folders(folder)), None)


def _clear(path: Path) -> None:
    """Delete a link or a copy of a checkpoint, one without a state; put aside what else is there.

    A copy of a run's folder may hold a checkpoint in the place of a link to it.
    """
    if path.is_symlink():
        path.unlink()
    elif (path / SUMS).is_file() and not (path / "state.json").is_file():
        delete_listed(path)
    _put_aside(path)


def _put_aside(path: Path) -> None:
    """Rename what lies at a path to the first free one of PATH.old, PATH.old2, ..."""
    if os.path.lexists(path):
        names = (path.with_name(f"{path.name}.old{n if n > 1 else ''}") for n in count(1))
        path.rename(next(name for name in names if not os.path.lexists(name)))


def _fsync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions(data: Shards) -> list[str]:
    files = [data.remote_file(number) for number in range(len(data.files))]
    marks = [hashlib.sha256(repr(f.stamp).encode()).hexdigest()[:16] if f else "" for f in files]
    return marks if any(marks) else []


def _hash(data: Shards) -> str:
    found = hashlib.sha256(os.fsencode("/".join(file.name for file in data.files)))
    found.update(data.locations.tobytes())
    return found.hexdigest()
