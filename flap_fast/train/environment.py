"""The device and package versions of a run, for environment.json."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flap_fast.ranks import Ranks

_PACKAGES = (
    *("flap_fast", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "transformers"),
    *("xformers", "numpy", "pydantic", "safetensors"),
)


def environment(ranks: Ranks) -> dict[str, str]:
    """Device, ranks, time and versions; packages that are not installed are left out."""
    found = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(ranks.device),
        "ranks": str(ranks.world),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    return found | versions()


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
