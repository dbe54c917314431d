"""Checkpoints: whole or not there, the last few and the best, each a model folder of its own.

runs/NAME/checkpoints/step-000600/model.safetensors config.yaml text/  for flap_fast.load
                                  state.json optimizer.safetensors     to go on training
runs/NAME/checkpoints/best -> step-000400

Nothing in it depends on the ranks, the ZeRO stage or the engine that wrote it: any others go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.files import write_atomically
from flap_fast.model.model_folder import save_model, step_folders
from flap_fast.ranks import Ranks
from flap_fast.train.engine import Engine


@dataclass(frozen=True)
class State:
    """Where a run stands. The data's position, masks and dropout follow from the step."""

    step: int
    """Steps done."""
    best: float | None
    """The best score on data.val so far."""
    scored: bool = True
    """Off until the evaluation that is due at this step, if one is, is done."""
    clips: int | None = None
    """Of data.train."""
    shards: str | None = None
    """A hash of their shards' names, and of where each clip lies in them."""


class Checkpoints:
    """The checkpoints of one run, which is trained on `data`."""

    def __init__(self, config: Config, ranks: Ranks, data: Shards):
        self._config, self._ranks = config, ranks
        self._clips, self._shards = len(data), _hash(data)
        self.folder = config.run_folder / "checkpoints"

    def state(self, folder: Path) -> State:
        """Where a checkpoint was written; the heads of its files are read too.

        Raises:
            ConfigError: it is broken, or of other data.
        """
        file = folder / "state.json"
        try:
            state = State(**json.loads(file.read_text()))
            for file in (folder / "model.safetensors", folder / "optimizer.safetensors"):
                with safe_open(file, "pt"):
                    pass  # knows already whether the file is as long as its head says
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            before = [earlier.name for earlier in step_folders(self.folder) if earlier != folder]
            instead = f"go on from {before[-1]}" if before else "begin anew"
            message = f"{file} cannot be read: {error}; remove {folder} to {instead}"
            raise ConfigError(message) from None
        if state.shards not in (None, self._shards):
            rule = f"hold the {state.clips} clips that the run began with"
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
        """Write a checkpoint of `step` steps, then delete what is no longer kept; on every rank.

        A failure on the way (a full disk) leaves the earlier checkpoints as they were.
        """
        final = self._folder(step)
        part = final.with_name(f"{final.name}.part")
        try:
            self._write(part, engine, self._state(step, best, scored))
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)  # room again on a full disk
            if isinstance(error, OSError):
                remedy = "make room and run the same command with --resume"
                raise OSError(f"{error}; {remedy}") from error
            raise
        if self._ranks.first:
            # Incomplete, or the run would have gone on from it.
            shutil.rmtree(final, ignore_errors=True)
            part.replace(final)
            self._keep(final, is_best)
        self._ranks.barrier()
        return final

    def mark_scored(self, step: int, best: float | None, *, is_best: bool) -> None:
        """Note that a checkpoint of `step` steps has been scored by now; on every rank."""
        if self._ranks.first:
            folder = self._folder(step)
            write_atomically(folder / "state.json", self._state(step, best, True))
            self._keep(folder, is_best)
        self._ranks.barrier()

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _state(self, step: int, best: float | None, scored: bool) -> bytes:
        state = State(step, best, scored, self._clips, self._shards)
        return (json.dumps(asdict(state), indent=1) + "\n").encode()

    def _keep(self, folder: Path, is_best: bool) -> None:
        if is_best:
            self._point_to(folder)
        _to_disk(self.folder)
        self._tidy()

    def _write(self, part: Path, engine: Engine, state: bytes) -> None:
        if self._ranks.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._ranks.share(engine.module.buffers())  # what a resumed run finds on every rank
        weights = engine.weights()
        if self._ranks.first:
            save_model(part, self._config, engine.module, weights)
        del weights
        engine.optimizer_state.save(part / "optimizer.safetensors")
        if self._ranks.first:
            (part / "state.json").write_bytes(state)
            for path in (*part.rglob("*"), part):
                _to_disk(path)

    def _point_to(self, best: Path) -> None:
        link = self.folder / "best.part"
        link.unlink(missing_ok=True)
        os.symlink(best.name, link)
        link.replace(self.folder / "best")

    def _tidy(self) -> None:
        folders = [folder.resolve() for folder in step_folders(self.folder)]
        best = (self.folder / "best").resolve()
        for folder in folders[: -self._config.ckpt.keep_last]:
            if folder != best:
                shutil.rmtree(folder)


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the most steps in a folder of checkpoints."""
    return next(reversed(step_folders(folder)), None)


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(data: Shards) -> str:
    found = hashlib.sha256(os.fsencode("/".join(file.name for file in data.files)))
    found.update(data.locations.tobytes())
    return found.hexdigest()
