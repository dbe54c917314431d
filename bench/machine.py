"""What is needed to reproduce a measurement: the hardware, the versions and the commit."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("RESULTS", "SOURCES", "SPEEDRUN")
"""Those that are written from bench/results."""


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit by name; without git `dirty` is None and `commit` unknown."""
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "missing"
    commit = _run("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    # Results that are being added change nothing that is measured.
    ours = (".", ":!bench/results", *(f":!bench/{page}.md" for page in PAGES))
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", *ours)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "driver": _driver() if device == "cuda" else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "commit": commit.strip() if commit else "unknown",
        "dirty": bool(changed) if changed is not None else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _driver() -> str:
    said = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else "unknown"


def _cpu() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _run(*command: str) -> str | None:
    """Output of a program; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def slug(facts: dict[str, Any]) -> str:
    """DEVICE-DATE-COMMIT, without characters that are special in a shell or a URL."""
    text = "-".join((facts["device"], facts["date"][:10], facts["commit"]))
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def save(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result with its `kind` and `machine` to FOLDER/results; returns the file."""
    file = folder / "results" / f"{slug(result['machine'])}-{result['kind']}.json"
    write_json(file, result)
    return file


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Replace the file at once: whoever is killed meanwhile leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(file)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A context in which no other thread or process that asks stores into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
