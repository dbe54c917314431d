"""Read a checkpoint's tensors by name, and compare them with what a model needs."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.files import say
from flap_fast.tensors import fault

Tensors = dict[str, Tensor]
# What DistributedDataParallel puts before names, of LAION's and CyCLIP's files.
MODULE = "module."
# Keys under which checkpoints keep their state dict, next to an optimizer's and an epoch.
_INSIDE = ("state_dict", "model")


class Saved(NamedTuple):
    """A state dict, and how its file was laid out."""

    tensors: Tensors
    inside: str
    """Its key in the saved mapping; empty if the mapping is the state dict itself."""
    metadata: dict[str, Any]
    """The numbers and strings saved next to it, such as an epoch."""


def read_tensors(path: Path) -> Tensors:
    """Return the state dict of a `.safetensors` file, or of one that torch.save wrote."""
    return read_saved(path).tensors


def read_saved(path: Path) -> Saved:
    """Return a file's state dict and how the file was laid out.

    What torch.save wrote is a pickle: only tensors and plain values are taken from it, and nothing
    is run.

    Raises:
        ConfigError: the file holds anything else.
    """
    if path.suffix != ".safetensors":
        _no_program(path)
    try:
        if path.suffix == ".safetensors":
            return Saved(load_file(path), "", {})
        # AudioMAE's files also hold their arguments: a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} must hold only tensors and plain values: {reason}") from None
    inside, metadata = "", {}
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            metadata = {n: v for n, v in found.items() if isinstance(v, (bool, int, float, str))}
            inside, found = name, found[name]
    rule = "hold a state dict, itself or as its 'state_dict' or 'model'"
    plain = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    require(plain and len(found) > 0, str(path), rule, type(found).__name__)
    return Saved(dict(found), inside, metadata)


def _no_program(path: Path) -> None:
    """Refuse TorchScript, which PyTorch would read as a program: OpenAI ships its CLIPs so."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                program = any(name.endswith("/constants.pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ConfigError(f"{path} must be a whole archive: {error}") from None
        remedy = (
            "save that first, in Python: torch.save(torch.jit.load("
            f"'{path}', map_location='cpu').state_dict(), '{path.stem}_weights.pt')"
        )
        rule = "hold a state dict"
        require(not program, str(path), rule, "a TorchScript archive, which is a program", remedy)


def module_prefix(tensors: Tensors) -> str:
    """Return the prefix that all names of a file have: "module." or none."""
    return MODULE if tensors and all(name.startswith(MODULE) for name in tensors) else ""


def save_pickle(path: Path, tree: dict[str, Any]) -> None:
    """Write a file with torch.save, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)


def read_json(file: Path) -> dict[str, Any]:
    """Return the settings in a folder's JSON file.

    Raises:
        ConfigError: the file is missing or holds no JSON object.
    """
    require(file.is_file(), str(file.parent), f"hold {file.name}", "none")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON: {error}") from None
    require(isinstance(found, dict), str(file), "hold an object", type(found).__name__)
    return found


def strip_prefixes(tensors: Tensors, prefixes: Sequence[str]) -> Tensors:
    """Remove the prefixes from the start of names, repeatedly.

    Raises:
        ConfigError: two names become one.
    """
    stripped: Tensors = {}
    for name, value in tensors.items():
        short = name
        while prefix := next((p for p in prefixes if p and short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        require(short not in stripped, "--strip", "leave names apart", short)
        stripped[short] = value
    return stripped


def fitted_tensors(found: Tensors, wanted: Tensors, source: Path, *, partial: bool) -> Tensors:
    """Return the tensors of `wanted` with the values of `found`, in the types of `wanted`.

    Args:
        partial: a tensor that `found` lacks or has in another shape keeps the value in `wanted`;
            the differences are listed on stderr.

    Raises:
        ConfigError: names every tensor that is missing, unexpected or of another shape; with
            `partial`, nothing fits.
    """
    lines = faults(found, wanted)
    listed = "\n".join(f"  {line}" for line in lines)
    if lines and not partial:
        raise ConfigError(
            f"{source} must hold this model's weights, got\n{listed}\n"
            "--partial takes what fits and initialises the rest; --strip PREFIX shortens names"
        )
    fits = {n for n, v in found.items() if n in wanted and _fits(v, wanted[n])}
    require(
        bool(fits), str(source), "hold a tensor of this model", "none", "--strip shortens names"
    )
    if lines:
        count = f"took {len(fits)} of {len(wanted)} tensors"
        say(f"{count}; the others of the model are random:\n{listed}", error=True)
    return {n: found[n].to(v.dtype) if n in fits else v for n, v in wanted.items()}


def _fits(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and not fault(found, wanted.dtype)


def faults(found: Tensors, wanted: Tensors) -> list[str]:
    """Return a line for each tensor that is missing, unexpected or mis-shaped, or see `fault`."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            lines.append(f"missing     {name} {tuple(wanted[name].shape)}")
        elif name not in wanted:
            lines.append(f"unexpected  {name} {tuple(found[name].shape)}")
        elif found[name].shape != wanted[name].shape:
            shapes = tuple(found[name].shape), tuple(wanted[name].shape)
            lines.append(f"mis-shaped  {name} {shapes[0]}, wanted {shapes[1]}")
        elif why := fault(found[name], wanted[name].dtype):
            lines.append(f"unusable    {name} {why}")
    return lines
