"""What commands write, for tests that disturb them: each in a process of its own, forked."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flap_fast.config import Config
from flap_fast.preparation.prepare import prepare
from flap_fast.tools.embed_files import embed_files
from flap_fast.tools.enrich.run import enrich
from flap_fast.training.loop import train
from tests.ranks import start_server
from tests.tiny import tiny
from tests.tools.enrich.test_run import clips, recipe

WORKS = ("prepare", "embed", "enrich", "train", "save")
# Of a run: its losses, and its last checkpoint's weights and state.
_OF_A_RUN = ("model.safetensors", "optimizer.safetensors", "state.json")
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"}


class Inputs(NamedTuple):
    """What the works read."""

    manifest: Path
    shards: Path
    model: Path


def run_config(inputs: Inputs, out: Path, *overrides: str) -> Config:
    """A run of four steps with two checkpoints and an evaluation."""
    return tiny(
        *(f"run.folder={out}", f"data.train={inputs.shards}/train"),
        *(f"data.val={inputs.shards}/val", "audio.depth=1", "text.depth=1", "ckpt.every_steps=2"),
        *("log.tensorboard=false", "log.every_steps=1", "sched.warmup_steps=2", *overrides),
    )


def work(name: str, inputs: Inputs, out: Path) -> None:
    """Do a command's work, or go on with it."""
    if name == "prepare":
        prepare(inputs.manifest, out, shard_clips=7, threads=1, show=False)
    elif name == "embed":
        sounds = sorted(inputs.manifest.parent.glob("*.wav"))
        # A chunk each: how more are divided depends on where OUT lies, and rounds otherwise.
        embed_files(inputs.model, sounds, out, chunk_sounds=1, batch=4)
    elif name == "enrich":
        enrich(clips(9), out, recipe())
    else:
        train(run_config(inputs, out), resume=True)


def outcome(name: str, out: Path) -> dict[str, Any]:
    """What a work has written: files by name, and of a run its losses."""
    if name in ("train", "save"):
        last = out / "flap/checkpoints/step-000004"
        rows = map(json.loads, (out / "flap/metrics.jsonl").read_text().splitlines())
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        return {"losses": losses} | {file: (last / file).read_bytes() for file in _OF_A_RUN}
    # The names of .embed/ depend on where OUT lies.
    files = (f for f in (out.glob("*") if name == "embed" else out.rglob("*")) if f.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


class Ended(NamedTuple):
    """How a process ended: its exit code, its error's type and message, events in its folder."""

    code: int
    error: str
    message: str
    events: int


def start(function: Callable[..., None], out: Path, *arguments: Any, die_at: int = 0) -> Any:
    """A process that calls `function(*arguments)`; SIGKILL at its `die_at`-th touch of a file."""
    context = start_server()
    note = context.SimpleQueue()
    process = context.Process(
        target=_child, args=(function, str(out), note, arguments, die_at), daemon=True
    )
    process.note = note
    process.start()
    return process


def ended(process: Any, timeout_s: float = 60) -> Ended:
    """Wait for a process of `start`."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still runs after {timeout_s:g} s")
    if process.note.empty():
        return Ended(process.exitcode, "", "", 0)
    return Ended(process.exitcode, *process.note.get())


def run(
    name: str, inputs: Inputs, out: Path, *, watch: Path | None = None, die_at: int = 0
) -> Ended:
    """A work in a process of its own; `watch`: the folder whose files count, `out` by default."""
    return ended(start(work, watch or out, name, inputs, out, die_at=die_at))


def _child(function: Any, folder: str, note: Any, arguments: tuple, die_at: int) -> None:
    touched = 0

    def touch(path: object) -> None:
        nonlocal touched
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder):
            touched += 1
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, args: touch(args[0]) if event in _EVENTS else None)
    fsync = os.fsync

    def synced(file: Any) -> None:
        touch(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    os.fsync = synced
    error = message = ""
    code = 0
    try:
        function(*arguments)
    except BaseException as found:
        error, message, code = type(found).__name__, str(found), 3
    note.put((error, message, touched))
    os._exit(code)
