"""Safetensors files: written for others to read, and checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flap_fast.checks import ConfigError, in_one_line


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that transformers can also read.

    Raises:
        OSError: it cannot be written; on a full disk, most often.
    """
    whole = {name: value.contiguous() for name, value in tensors.items()}
    file.touch()
    mode = file.stat().st_mode  # safetensors would keep the file for its owner, whatever the umask
    try:
        save_file(whole, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from None
    file.chmod(mode)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: what is not used is not read.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {in_one_line(error)}") from None


def fault(found: Tensor, wanted: torch.dtype) -> str | None:
    """What keeps a file's tensor from being one of a model, beside its shape; None if nothing.

    Floats may be of another precision; all must be finite.
    """
    floats = wanted.is_floating_point and found.is_floating_point()
    if found.dtype != wanted and not floats:
        return f"as {_name(found.dtype)}, which must be {_name(wanted)}"
    # Finite in float64 may be infinite in the model.
    return "with values that are not finite" if floats and not is_finite(found.to(wanted)) else None


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; in one pass, without a copy, on the host."""
    if not values.numel():
        return True
    # A sum would overflow; NaN and infinity are among the extremes.
    wide = values if values.element_size() > 1 else values.float()
    return all(bool(end.isfinite()) for end in wide.aminmax())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
