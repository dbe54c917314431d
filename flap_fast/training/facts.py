"""What ranks read each for itself and must have in common, for `flap_fast.ranks.agreement`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flap_fast.config import Config
from flap_fast.data.enriched import FILE as ENRICHED
from flap_fast.data.sentences import triple_files
from flap_fast.data.shards import Shards
from flap_fast.data.tokenize import Tokenizer, tokenizer_digest
from flap_fast.ranks import Ranks
from flap_fast.training.environment import versions


def settings_facts(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The config, the code, its packages' versions and the kind of device."""
    return {
        "": config.model_dump(mode="json"),
        "the version of": versions(),
        "the code of": {package: _code(package) for package in ("flap_fast", "flap_kernels")},
        "the device": ranks.device.type,
    }


def data_facts(config: Config, shards: Shards, tokens: Tokenizer) -> dict[str, Any]:
    """Names, sizes and index of data.train's shards, sizes of data.val's, texts, tokenizer."""
    texts = [file for path in config.data.nli for file in triple_files(path)]
    texts += [Path(name) for name in (config.eval.templates, config.eval.relevance) if name]
    if config.data.captions != "original":
        texts += sorted({file.parent / ENRICHED for file in shards.files})
    return {
        "bytes in data.train of": sizes(shards.files),
        "bytes in data.val of": sizes([f for val in config.data.val for f in val.glob("*.tar")]),
        "the index of data.train": zlib.crc32(shards.locations.tobytes()),
        "the text of": {str(f): zlib.crc32(f.read_bytes()) for f in texts if f.is_file()},
        "the tokenizer": tokenizer_digest(tokens),
    }


def weights_facts(module: nn.Module) -> dict[str, int]:
    """A checksum of each tensor, by name."""
    return {name: _checksum(value) for name, value in module.state_dict().items()}


def checksum(module: nn.Module) -> int:
    """One checksum of all tensors and their names."""
    return zlib.crc32(repr(sorted(weights_facts(module).items())).encode())


def checkpoint_facts(start: Path | None) -> dict[str, Any]:
    """The checkpoint to resume from, and the sizes of its files."""
    files = [start / name for name in ("state.json", "optimizer.safetensors")] if start else []
    return {"the checkpoint to resume from": start and start.name, "bytes in it of": sizes(files)}


def sizes(files: Sequence[Path]) -> dict[str, int]:
    """The sizes of files, in bytes, by name; absent ones are left out."""
    return {file.name: file.stat().st_size for file in sorted(files) if file.is_file()}


def _checksum(value: Tensor) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def _code(package: str) -> int:
    """A checksum of a package's Python files."""
    root, found = Path(str(resources.files(package))), 0
    for file in sorted(root.rglob("*.py")):
        name = str(file.relative_to(root)).encode()
        found = zlib.crc32(file.read_bytes(), zlib.crc32(name, found))
    return found
