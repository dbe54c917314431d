"""Contrastive language-audio pre-training, fast.

    flap_fast.load("runs/demo").rank("dog.ogg", ["a dog barks", "rain on a roof"])
    flap_fast.prepare("manifest.jsonl", "data/mine")

Training is the command `flap train CONFIG`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flap_fast.config import Config
    from flap_fast.config.file import load_config
    from flap_fast.preparation.prepare import prepare
    from flap_fast.tools.embedder import Embedder, load

__all__ = ["Config", "Embedder", "load", "load_config", "prepare"]
__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "Embedder": "tools.embedder",
    "load": "tools.embedder",
    "load_config": "config.file",
    "prepare": "preparation.prepare",
}


def __dir__() -> list[str]:
    """Return the public names, which `__getattr__` imports."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'flap_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"flap_fast.{_MODULES[name]}"), name)
