"""What a run runs on and how it was started, for environment.json.

    {"started": .., "ended": .., "duration_s": .., "outcome": "complete", "command": "flap ..",
     "commit": .., "dirty": false, "host": .., "launcher": .., "device": .., "ranks": "1", ..,
     "torch": "2.14.1", .., "parameters": .., "earlier_sessions": [{..}, ..]}

A session is one process from start to end; `--resume` begins another. Files of before have neither
an end nor earlier sessions.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flap_fast.checks import in_one_line
from flap_fast.files import parsed_json, say, write_atomically
from flap_fast.launcher import launcher_facts
from flap_fast.places import without_secrets
from flap_fast.ranks import Ranks
from flap_fast.ranks.failure import Ended

_PACKAGES = (
    *("flap_fast", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "transformers"),
    *("xformers", "numpy", "pydantic", "safetensors"),
)
_EARLIER = "earlier_sessions"
# git on a network's disk may take long; a run must not wait for it.
_GIT_S = 5.0


@contextmanager
def session(file: Path, facts: dict[str, Any], *, resumed: bool) -> Iterator[None]:
    """A context whose facts are written to environment.json, and its end and duration after it.

    Args:
        resumed: keep the sessions that the file has, as `earlier_sessions`.
    """
    began = time.monotonic()
    earlier = _sessions(file) if resumed else []
    facts = {**facts, **({_EARLIER: earlier} if earlier else {})}
    write_atomically(file, _json(facts))
    outcome = "complete"
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, Ended)
        outcome = " ".join((str(error) if ended else f"{type(error).__name__}: {error}").split())
        raise
    finally:
        seconds = round(time.monotonic() - began, 1)
        end = {"ended": _now(), "duration_s": seconds, "outcome": outcome}
        try:
            write_atomically(file, _json({"started": facts["started"], **end} | facts))
        except OSError as error:  # all else is saved, and how the run ended must be seen
            say(f"warning: {file} does not say how the run ended, got {error}", error=True)


def environment(ranks: Ranks) -> dict[str, Any]:
    """Start, command, code, host, launcher, device and versions; what is not known is left out."""
    found = {"started": _now(), "command": command_line(), **code(), "host": socket.gethostname()}
    found |= launcher_facts() | {
        "device": device_name(ranks.device),
        "ranks": str(ranks.world),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    return found | versions()


def command_line() -> str:
    """The command that started this process, as one would type it, without secrets of URLs."""
    name, *given = sys.argv or [""]
    path = Path(name)
    if path.name == "flap" or (path.name, path.parent.name) == ("__main__.py", "flap_fast"):
        # deepspeed adds its own option.
        given = [word for word in given if not word.startswith("--local_rank")]
        return without_secrets(shlex.join(["flap", *given]))
    return without_secrets(shlex.join(sys.orig_argv))


def code() -> dict[str, Any]:
    """The commit of flap_fast and whether files of its packages differ from it; {} outside git."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_GIT_S
            )
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in somebody else's checkout, which does not track it.
    if git("ls-files", "--error-unmatch", "flap_fast/__init__.py") is None:
        return {}
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "flap_fast", "kernels")
    known = {"commit": commit, "dirty": None if changed is None else bool(changed)}
    return {name: value for name, value in known.items() if value is not None}


def versions() -> dict[str, str]:
    """The versions of packages that are installed."""
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: torch.device) -> str:
    """A GPU's name, or how many threads of which processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return f"{torch.get_num_threads()} of {os.cpu_count()} threads, {model}"


def sessions_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The sessions in an environment.json, first to last; in a file of before, its only one."""
    last = {name: value for name, value in found.items() if name != _EARLIER}
    return [*found.get(_EARLIER, []), last] if last else []


def _sessions(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        return sessions_of(parsed_json(file.read_bytes()))
    except (ValueError, AttributeError, TypeError) as error:
        why = in_one_line(error)
        say(f"warning: {file} loses its earlier sessions, got no JSON: {why}", error=True)
        return []


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()
