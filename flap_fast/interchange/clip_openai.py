"""CLIPs with a ResNet in OpenAI's names, which CyCLIP and open_clip share -> a model, and back.

    visual.NAME              <->  image.NAME
    NAME                     <->  text.NAME           (transformer, token_embedding, ln_final, ...)
    text_projection (D, d)   <->  text_head.weight (d, D)
    logit_scale ()           <->  logit_scale (1,)

Nothing is computed: what goes in and out comes out bit for bit. How the file itself was laid out
(CyCLIP's state dict lies beside an epoch, under `module.`; OpenAI's half of it is half floats) is
kept beside the model in `origin.json`, so that this comes out as it was too.

Source: CLIP's published code, CyCLIP's src/main.py; SPEC 12.5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.tokenize import CLIP_TOKENS, tokenizer
from flap_fast.interchange.tensors import Saved, Tensors

ORIGIN = "origin.json"
# Of OpenAI's checkpoints, beside weights: numbers that the shapes say as well.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_TABLE = "token_embedding.weight"


def is_openai(tensors: Tensors) -> bool:
    """Whether names are those of OpenAI's CLIP."""
    return _TABLE in tensors and any(name.startswith("visual.") for name in tensors)


def from_openai(theirs: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """In this project's names, and what has no use here."""
    ours = {_ours(name): value for name, value in theirs.items() if name not in _SIZES}
    head, scale = ours.get("text_head.weight"), ours.get("logit_scale")
    if head is not None and head.ndim == 2:
        ours["text_head.weight"] = head.T.contiguous()
    if scale is not None and scale.numel() == 1:
        ours["logit_scale"] = scale.reshape(1)
    # How many batches a BatchNorm has seen: older files have no such count, and nothing needs it.
    norms = [name.removesuffix("running_var") for name in ours if name.endswith(".running_var")]
    counts = {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    return counts | ours, {name: theirs[name] for name in _SIZES if name in theirs}


def _ours(name: str) -> str:
    if name == "text_projection":
        return "text_head.weight"
    if name == "logit_scale":
        return name
    image = name.startswith("visual.")
    return f"image.{name.removeprefix('visual.')}" if image else f"text.{name}"


def to_openai(ours: Mapping[str, Tensor]) -> Tensors:
    """The inverse; of a model with an image tower and CLIP's text tower."""
    theirs = {}
    for name, value in ours.items():
        if name.startswith("image."):
            theirs["visual." + name.removeprefix("image.")] = value
        elif name.startswith("text."):
            theirs[name.removeprefix("text.")] = value
        elif name == "text_head.weight":
            theirs["text_projection"] = value.T.contiguous()
        elif name == "logit_scale":
            theirs["logit_scale"] = value.reshape(())
        else:
            raise ConfigError(f"the model must have CLIP's towers to be named so, got '{name}'")
    return theirs


def openai_settings(theirs: Mapping[str, Tensor]) -> list[str]:
    """The settings that the shapes tell, as overrides of the defaults; CLIP has no dropout.

    Raises:
        ConfigError: no CLIP with a ResNet.
    """
    cells, _ = _shape(theirs, "visual.attnpool.positional_embedding", 2)
    width, *_ = _shape(theirs, "visual.layer1.0.conv1.weight", 4)
    tokens, text_width = _shape(theirs, "positional_embedding", 2)
    vocabulary, _ = _shape(theirs, _TABLE, 2)
    _, joint = _shape(theirs, "text_projection", 2)
    layers = [_blocks(theirs, rf"visual\.layer{n}\.(\d+)\.") for n in range(1, 5)]
    depth = _blocks(theirs, r"transformer\.resblocks\.(\d+)\.")
    words = "package:open_clip" if vocabulary == CLIP_TOKENS else "bytes"
    return [
        f"image.width={width}",
        f"image.layers={layers}",
        f"image.resolution={32 * round((cells - 1) ** 0.5)}",
        "text.encoder=clip",
        f"text.tokenizer={words}",
        f"text.width={text_width}",
        f"text.depth={depth}",
        f"text.heads={text_width // 64}",
        f"text.max_tokens={tokens}",
        "text.dropout=0",
        f"joint.width={joint}",
    ]


def _shape(theirs: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    shape = tuple(theirs[name].shape) if name in theirs else None
    rule = f"be a CLIP's with a ResNet (RN50, RN101, ...), with {name} of {axes} axes"
    require(shape is not None and len(shape) == axes, "the checkpoint", rule, shape)
    assert shape is not None
    return shape


def _blocks(theirs: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({found[1] for name in theirs if (found := re.match(pattern, name))})


def check_tokenizer(theirs: Mapping[str, Tensor], config: Config) -> None:
    """Raise `ConfigError` unless the tokenizer's tokens are those of the table."""
    wanted, found = len(theirs[_TABLE]), len(tokenizer(config.text).inner)
    rule = f"have the {wanted} tokens of {_TABLE}"
    remedy = "give text.tokenizer=FOLDER of the one it was trained with"
    got = f"{found} of {config.text.tokenizer}"
    require(found == wanted, "text.tokenizer", rule, got, remedy)


def keep_origin(folder: Path, saved: Saved, prefix: str) -> None:
    """Write how a file was laid out that has become the model of a folder."""
    types = {
        name.removeprefix(prefix): str(value.dtype).removeprefix("torch.")
        for name, value in saved.tensors.items()
        if value.is_floating_point() and value.dtype != torch.float32
    }
    origin = {"inside": saved.inside, "beside": saved.beside, "prefix": prefix, "types": types}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def laid_out(folder: Path, theirs: Tensors) -> dict[str, Any]:
    """What torch.save is to write: as the file was that a folder was imported from, else plain."""
    file = folder / ORIGIN
    if not file.is_file():
        return dict(theirs)
    origin = json.loads(file.read_text())
    types = {name: getattr(torch, kind) for name, kind in origin["types"].items()}
    typed = {name: _exactly(value, types.get(name)) for name, value in theirs.items()}
    named = {origin["prefix"] + name: value for name, value in typed.items()}
    return {**origin["beside"], origin["inside"]: named} if origin["inside"] else named


def _exactly(value: Tensor, kind: torch.dtype | None) -> Tensor:
    """In another type where that loses nothing: with --partial, some began at random."""
    cast = value if kind is None else value.to(kind)
    return cast if torch.equal(cast.to(value.dtype), value) else value
