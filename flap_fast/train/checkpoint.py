"""Checkpoints: complete or absent, the last few and the best, each a model folder of its own.

runs/NAME/checkpoints/step-000600/model.safetensors config.yaml text/  for flap_fast.load
                                  state.json optimizer.safetensors     to resume training
runs/NAME/checkpoints/best -> step-000400           or a copy, where there are no symlinks

Nothing in one depends on the ranks, the ZeRO stage or the engine that wrote it: any others resume.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.files import is_full, write_atomically
from flap_fast.model.model_folder import save_model, step_folders, step_of
from flap_fast.ranks import Ranks
from flap_fast.train.engine import Engine


@dataclass(frozen=True)
class State:
    """A run's progress. The position in the data, masks and dropout follow from the step."""

    step: int
    """Steps done."""
    best: float | None
    """The best score on data.val so far."""
    scored: bool = True
    """False until the evaluation that is due at this step, if any, is done."""
    clips: int | None = None
    """Clips of data.train."""
    shards: str | None = None
    """Hash of the shards' names, and of where each clip lies in them."""


_STATE = TypeAdapter(State)
# What file systems without symbolic links say.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Checkpoints:
    """Writes and checks the checkpoints of one run, which trains on `data`."""

    def __init__(self, config: Config, ranks: Ranks, data: Shards):
        self._config, self._ranks = config, ranks
        self._clips, self._shards = len(data), _hash(data)
        self.folder = config.run_folder / "checkpoints"

    def state(self, folder: Path) -> State:
        """A checkpoint's state; the headers of its other files are checked too.

        Raises:
            ConfigError: it is broken, or was trained on other data.
        """
        file = folder / "state.json"
        try:
            state = _STATE.validate_json(file.read_bytes(), strict=True)
            require(state.step == step_of(folder), "step", f"be {step_of(folder)}", state.step)
            for file in (folder / "model.safetensors", folder / "optimizer.safetensors"):
                with safe_open(file, "pt"):
                    pass  # opening checks that the file is as long as its header says
        except (OSError, ValueError, SafetensorError) as error:
            why = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = " ".join([*map(str, first["loc"]), first["msg"]])
            before = [earlier.name for earlier in step_folders(self.folder) if earlier != folder]
            instead = f"resume from {before[-1]}" if before else "start over"
            message = f"{file} cannot be read: {why}; remove {folder} to {instead}"
            raise ConfigError(message) from None
        if state.shards not in (None, self._shards):
            rule = f"hold the {state.clips} clips that the run started with"
            got = f"{self._clips} others" if state.clips == self._clips else self._clips
            require(False, "data.train", rule, got, "put them back, or set run.name=ANOTHER")
        return state

    def save(
        self,
        engine: Engine,
        step: int,
        best: float | None,
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
            # An incomplete one, or the run would have resumed from it.
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            self._rotate(final, is_best)
        self._ranks.barrier()
        return final

    def mark_scored(self, step: int, best: float | None, *, is_best: bool) -> None:
        """Record that the checkpoint of `step` has been scored. Collective."""
        if self._ranks.first:
            folder = self._folder(step)
            write_atomically(folder / "state.json", self._state(step, best, True))
            self._rotate(folder, is_best)
        self._ranks.barrier()

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _state(self, step: int, best: float | None, scored: bool) -> bytes:
        state = State(step, best, scored, self._clips, self._shards)
        return (json.dumps(asdict(state), indent=1) + "\n").encode()

    def _rotate(self, folder: Path, is_best: bool) -> None:
        if is_best:
            self._point_to(folder)
        _fsync(self.folder)
        self._delete_old()

    def _write(self, partial: Path, engine: Engine, state: bytes) -> None:
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._ranks.broadcast(engine.module.buffers())  # as a resumed run finds them on every rank
        weights = engine.weights()
        if self._ranks.first:
            save_model(partial, self._config, engine.module, weights)
        del weights
        engine.optimizer_state.save(partial / "optimizer.safetensors")
        if self._ranks.first:
            (partial / "state.json").write_bytes(state)
            for path in (*partial.rglob("*"), partial):
                _fsync(path)

    def _point_to(self, best: Path) -> None:
        link, target = self.folder / "best.part", self.folder / "best"
        _remove(link)
        try:
            os.symlink(best.name, link)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            to_resume = shutil.ignore_patterns("state.json", "optimizer.safetensors")
            shutil.copytree(best, link, ignore=to_resume)
        if not (link.is_symlink() and target.is_symlink()):
            _remove(target)  # a folder and a link do not replace each other
        link.replace(target)

    def _delete_old(self) -> None:
        folders = [folder.resolve() for folder in step_folders(self.folder)]
        best = (self.folder / "best").resolve()
        for folder in folders[: -self._config.ckpt.keep_last]:
            if folder != best:
                shutil.rmtree(folder)


def latest(folder: Path) -> Path | None:
    """The latest complete checkpoint of a folder of checkpoints."""
    return next(reversed(step_folders(folder)), None)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(data: Shards) -> str:
    found = hashlib.sha256(os.fsencode("/".join(file.name for file in data.files)))
    found.update(data.locations.tobytes())
    return found.hexdigest()
