"""Layout of CLIP with a ResNet in OpenAI's names, which CyCLIP and open_clip share.

    visual.NAME              <->  image.NAME
    NAME                     <->  text.NAME           (transformer, token_embedding, ln_final, ...)
    text_projection (D, d)   <->  text_head.weight (d, D)
    logit_scale ()           <->  logit_scale (1,)

Nothing is computed: a checkpoint that is imported and exported is the same bit for bit. The layout
of its file (CyCLIP saves an epoch too and the prefix `module.`; most of OpenAI's tensors are
float16) is stored with the model in `origin.json`, so that an export has it again.

Source: CLIP's published code, CyCLIP's src/main.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.tokenize import CLIP_TOKENS, tokenizer
from flap_fast.interchange.layout import Export, Imported, Layout, Source
from flap_fast.interchange.tensors import Saved, Tensors, module_prefix, read_json, save_pickle

ORIGIN = "origin.json"
# Entries of OpenAI's checkpoints that are no weights: sizes, which the shapes give as well.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_TABLE = "token_embedding.weight"


def _is_openai(source: Source) -> bool:
    return _TABLE in source.tensors and any(n.startswith("visual.") for n in source.tensors)


def _read(source: Source) -> Imported:
    config = load_config(None, [*openai_settings(source.tensors), *source.overrides])
    if not source.partial:
        _check_tokenizer(source.tensors, config)
    ours, unused = from_openai(source.tensors)
    assert source.saved is not None
    return Imported(config, ours, unused, origin=_origin(source.saved))


def _write(export: Export, out: Path) -> str:
    save_pickle(out, _laid_out(export.folder, to_openai(export.weights) | export.unused))
    return "OpenAI's layout"


def from_openai(theirs: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Rename OpenAI's tensors; also returns the entries without a use here."""
    ours = {_ours(name): value for name, value in theirs.items() if name not in _SIZES}
    head, scale = ours.get("text_head.weight"), ours.get("logit_scale")
    if head is not None and head.ndim == 2:
        ours["text_head.weight"] = head.T.contiguous()
    if scale is not None and scale.numel() == 1:
        ours["logit_scale"] = scale.reshape(1)
    # Older files do not count a BatchNorm's batches, and nothing needs the count.
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
    """Rename to OpenAI's names, the inverse of `from_openai`.

    Raises:
        ConfigError: the model has other encoders than CLIP's.
    """
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
    """Return the settings that the shapes give, as overrides of the defaults; CLIP has no dropout.

    Raises:
        ConfigError: it is no CLIP with a ResNet.
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
    """Count the different numbers that the pattern's group matches."""
    return len({found[1] for name in theirs if (found := re.match(pattern, name))})


def _check_tokenizer(theirs: Mapping[str, Tensor], config: Config) -> None:
    """Raise `ConfigError` unless the tokenizer's tokens are those of the table."""
    wanted, found = len(theirs[_TABLE]), len(tokenizer(config.text).inner)
    rule = f"have the {wanted} tokens of {_TABLE}"
    remedy = "give text.tokenizer=FOLDER of the one it was trained with"
    got = f"{found} of {config.text.tokenizer}"
    require(found == wanted, "text.tokenizer", rule, got, remedy)


def _origin(saved: Saved) -> dict[str, Any]:
    """Return the layout of a file: key, metadata, prefix, and types other than float32."""
    prefix = module_prefix(saved.tensors)
    types = {
        name.removeprefix(prefix): str(value.dtype).removeprefix("torch.")
        for name, value in saved.tensors.items()
        if value.is_floating_point() and value.dtype != torch.float32
    }
    return {"inside": saved.inside, "beside": saved.metadata, "prefix": prefix, "types": types}


def _laid_out(folder: Path, theirs: Tensors) -> dict[str, Any]:
    """Return the tree to save: laid out as the file that was imported, else the tensors."""
    file = folder / ORIGIN
    if not file.is_file():
        return dict(theirs)
    origin = read_json(file)
    types = {name: getattr(torch, kind) for name, kind in origin["types"].items()}
    typed = {name: _exactly(value, types.get(name)) for name, value in theirs.items()}
    named = {origin["prefix"] + name: value for name, value in typed.items()}
    return {**origin["beside"], origin["inside"]: named} if origin["inside"] else named


def _exactly(value: Tensor, kind: torch.dtype | None) -> Tensor:
    """Cast where that loses nothing: with --partial, some tensors are random float32."""
    cast = value if kind is None else value.to(kind)
    return cast if torch.equal(cast.to(value.dtype), value) else value


OPENAI = Layout(
    names="OpenAI's CLIP's (visual..., token_embedding)",
    form="file",
    matches=_is_openai,
    read=_read,
    write=_write,
    modality="image",
)
