"""CLIP's weights between this project's names and OpenAI's, which CyCLIP and open_clip share.

    image.NAME               <->  visual.NAME
    text.NAME                <->  NAME           (transformer, token_embedding, ln_final, ...)
    text_head.weight (d, D)  <->  text_projection (D, d)
    logit_scale (1,)         <->  logit_scale ()

Nothing is computed: what goes there and back comes back bit for bit.

Source: CLIP's published code; SPEC 12.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from flap_fast.checks import ConfigError

# Of OpenAI's checkpoints, beside weights: numbers that the shapes say as well.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_COUNTER = ".num_batches_tracked"


class Named(NamedTuple):
    """A state dict in this project's names, and how it fits a model's."""

    weights: dict[str, Tensor]
    missing: tuple[str, ...]
    """Names of the model's that are not there."""
    unexpected: tuple[str, ...]
    """Names there that the model does not have, or has in another shape."""


def from_openai(theirs: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Named:
    """OpenAI's names into ours.

    Args:
        theirs: the state dict, whose names may all begin with `module.` (CyCLIP's do).
        model: the state dict of the model that is to take them, for its names and shapes.
    """
    ours = {_ours(name): value for name, value in _bare(theirs).items() if name not in _SIZES}
    if "text_head.weight" in ours:
        ours["text_head.weight"] = ours["text_head.weight"].T.contiguous()
    if "logit_scale" in ours:
        ours["logit_scale"] = ours["logit_scale"].reshape(1)
    # How many batches a BatchNorm has seen: older files have no such count, and nothing needs it.
    counts = {name: value for name, value in model.items() if name.endswith(_COUNTER)}
    ours = {**{name: value.clone().zero_() for name, value in counts.items()}, **ours}
    return Named(
        weights={name: value for name, value in ours.items() if _fits(name, value, model)},
        missing=tuple(name for name in model if name not in ours),
        unexpected=tuple(name for name, value in ours.items() if not _fits(name, value, model)),
    )


def to_openai(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names into OpenAI's; of a model with an image tower and CLIP's text tower."""
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


def openai_settings(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sections `image`, `text` and `joint` of a model of the same shapes.

    Raises:
        ConfigError: no CLIP with a ResNet.
    """
    shapes = {name: tuple(value.shape) for name, value in _bare(theirs).items()}
    try:
        cells, _ = shapes["visual.attnpool.positional_embedding"]
        width = shapes["visual.layer1.0.conv1.weight"][0]
        tokens, text_width = shapes["positional_embedding"]
        joint = shapes["text_projection"][1]
    except KeyError as name:
        raise ConfigError(
            f"the checkpoint must be a CLIP's with a ResNet (RN50, RN101, ...), got none of {name}"
        ) from None
    layers = [_blocks(shapes, rf"visual\.layer{n}\.(\d+)\.") for n in range(1, 5)]
    return {
        "image": {
            "width": width,
            "layers": layers,
            "resolution": 32 * round((cells - 1) ** 0.5),
        },
        "text": {
            "encoder": "clip",
            "width": text_width,
            "depth": _blocks(shapes, r"transformer\.resblocks\.(\d+)\."),
            "heads": text_width // 64,
            "max_tokens": tokens,
        },
        "joint": {"width": joint},
    }


def _ours(name: str) -> str:
    if name == "text_projection":
        return "text_head.weight"
    if name == "logit_scale":
        return name
    image = name.startswith("visual.")
    return f"image.{name.removeprefix('visual.')}" if image else f"text.{name}"


def _bare(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in theirs)
    return {name.removeprefix("module.") if wrapped else name: v for name, v in theirs.items()}


def _fits(name: str, value: Tensor, model: Mapping[str, Tensor]) -> bool:
    return name in model and model[name].shape == value.shape


def _blocks(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})
