"""One process at a time trains into a run's folder: it holds RUN/lock while it does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.ranks import Ranks

_HOLDER = ("host", "pid", "started")


@contextmanager
def run_lock(config: Config, ranks: Ranks) -> Iterator[None]:
    """A context in which no other process trains into the run's folder; rank 0 holds the lock.

    The lock of a process that ended without removing it is taken over on the same host, and in a
    job of Slurm that was queued again.

    Raises:
        ConfigError: another process holds it, or may hold it on another host.
    """
    if not ranks.first:
        yield
        return
    file, own = config.run_folder / "lock", _own()
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    if not _create(file, own):
        _take_over(file, own)
    try:
        yield
    finally:
        if _read(file) == own:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: only an error leaves it so
            for folder in made:
                folder.rmdir()


def _own() -> dict[str, Any]:
    pid = os.getpid()
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    found = {"host": socket.gethostname(), "pid": pid, "started": started, "began": _began(pid)}
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return found | {"pids": _pids(), "job": job, "restarts": int(restarts)}


def _create(file: Path, own: dict[str, Any]) -> bool:
    try:
        with file.open("x") as out:
            out.write(json.dumps(own) + "\n")
    except FileExistsError:
        return False
    return True


def _take_over(file: Path, own: dict[str, Any]) -> None:
    """Replace a lock whose process has ended; raises `ConfigError` where it has not."""
    held = _read(file)
    why = "its file cannot be read"
    if held is not None:
        host, pid, started = (held[name] for name in _HOLDER)
        why = f"process {pid} on {host} has trained into it since {started}"
    if held is not None and _ended(held, own):
        aside = file.with_name(f"lock.{own['pid']}")
        with contextlib.suppress(FileNotFoundError):
            file.rename(aside)
            still = _read(aside) == held
            if still:
                aside.unlink()
                if _create(file, own):
                    return
            elif not file.exists():
                aside.rename(file)  # of another process, which took it over in between
        why = "another process has just begun to"
    raise ConfigError(
        f"{file.parent} must be trained into by one process at a time, got {why}; wait for it, set "
        f"run.name=ANOTHER, or remove {file} if no process does"
    )


def _ended(held: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the process that holds a lock has surely ended."""
    requeued = held.get("job") is not None and held["job"] == own["job"]
    if requeued and held.get("restarts", 0) < own["restarts"]:
        return True
    if held["host"] != own["host"] or held.get("pids") != own["pids"]:
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process
    return _began(held["pid"]) != held.get("began")  # another process by now


def _read(file: Path) -> dict[str, Any] | None:
    """What a lock says; None if it cannot be read."""
    try:
        found = json.loads(file.read_text())
        pid, restarts = found["pid"], found.get("restarts", 0)
        whole = type(pid) is int and 0 < pid < 2**31 and type(restarts) is int
        return found if whole and {"host", "started"} <= found.keys() else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where no /proc tells."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _pids() -> str | None:
    """The namespace of process ids, which containers of one host have each for itself."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None
