"""The weights of a folder of transformers', checked as a checkpoint's are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from flap_fast.checks import ConfigError
from flap_fast.tensors import fault

# Checkpoints of masked language models, such as roberta-base, have none: it begins random.
_OPTIONAL = "pooler."


def check_weights(folder: Path, inner: nn.Module, report: dict[str, Any]) -> None:
    """Check an encoder that transformers loaded from a folder.

    Args:
        report: transformers' `output_loading_info`.

    Raises:
        ConfigError: a weight is missing, of another shape, of no float type or not finite.
    """
    for why in _faults(folder, inner, report):
        raise ConfigError(
            f"text.folder must hold the weights of its encoder, got '{folder}' {why}; fetch it "
            "again, or take the config.json that belongs to them"
        )


def _faults(folder: Path, inner: nn.Module, report: dict[str, Any]) -> Iterator[str]:
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(_OPTIONAL))
    if missing:
        others = f" and {len(missing) - 1} others" if missing[1:] else ""
        yield f"without {missing[0]}{others}"
    for name, found, wanted in report["mismatched_keys"]:
        yield f"with {name} of {tuple(found)}, which is {tuple(wanted)} in its config.json"
    own = dict(inner.named_parameters())
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."
    for name, dtype in _dtypes(folder):  # as written: transformers makes floats of them
        weight = own.get(name, own.get(name.removeprefix(prefix)))
        if weight is not None and (why := fault(torch.empty(0, dtype=dtype), weight.dtype)):
            yield f"with {name} {why}"
    for name, weight in own.items():
        if why := fault(weight.detach(), weight.dtype):
            yield f"with {name} {why}"


def _dtypes(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """Name and type of each tensor in the folder's files of weights; their values are not read."""
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_slice(name)[:0].dtype
    for path in () if files else sorted(folder.glob("pytorch_model*.bin")):
        for name, value in torch.load(path, map_location="meta", weights_only=True).items():
            yield name, value.dtype
