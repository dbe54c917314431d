"""Names of a `ClapModel`'s tensors, in transformers and in this project.

    audio_model.audio_encoder  <->  audio, see `htsat_names`
    text_model                 <->  text.inner
    audio_projection.linear1   <->  audio_head.0
    logit_scale_a              <->  logit_scale

Source: transformers, models/clap.
"""

from __future__ import annotations

import torch

from flap_fast.interchange.htsat_names import htsat_from_hf, htsat_to_hf
from flap_fast.interchange.tensors import Tensors

_ENCODER = "audio_model.audio_encoder."
_HEADS = (("audio_projection.", "audio_head."), ("text_projection.", "text_head."))
_LAYERS = (("linear1.", "0."), ("linear2.", "2."))
# Buffers that transformers keeps and this project computes.
_TEXT_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def from_clap(theirs: Tensors) -> tuple[Tensors, Tensors]:
    """Rename ClapModel's tensors; also returns its second scale. Unknown names stay."""
    encoder = {n.removeprefix(_ENCODER): v for n, v in theirs.items() if n.startswith(_ENCODER)}
    ours = {f"audio.{name}": value for name, value in htsat_from_hf(encoder).items()}
    unused: Tensors = {}
    for name, value in theirs.items():
        if name.startswith(_ENCODER) or name.removeprefix("text_model.") in _TEXT_BUFFERS:
            continue
        if name == "logit_scale_a":
            ours["logit_scale"] = value.reshape(1)
        elif name == "logit_scale_t":
            unused[name] = value
        elif name.startswith("text_model."):
            ours[f"text.inner.{name.removeprefix('text_model.')}"] = value
        else:
            ours[_head(name, 0, 1)] = value
    return ours, unused


def to_clap(ours: Tensors, unused: Tensors) -> Tensors:
    """Rename to ClapModel's names; without a second scale, the first serves both directions.

    Args:
        ours: includes HTSAT's relative position indices.
    """
    encoder = {n.removeprefix("audio."): v for n, v in ours.items() if n.startswith("audio.")}
    theirs = {_ENCODER + name: value for name, value in htsat_to_hf(encoder).items()}
    scale = ours["logit_scale"].reshape(())
    theirs["logit_scale_a"] = scale
    theirs["logit_scale_t"] = unused.get("logit_scale_t", scale).clone()
    return theirs | text_to_clap(ours) | _heads_to_clap(ours, "audio_head.")


def text_to_clap(ours: Tensors) -> Tensors:
    """Return the tensors of a `ClapTextModelWithProjection`: text encoder, head and buffers."""
    inner = "text.inner."
    theirs = {
        f"text_model.{name.removeprefix(inner)}": value
        for name, value in ours.items()
        if name.startswith(inner)
    }
    positions = ours[f"{inner}embeddings.position_embeddings.weight"].shape[0]
    ids = torch.arange(positions)[None]
    theirs["text_model.embeddings.position_ids"] = ids
    theirs["text_model.embeddings.token_type_ids"] = torch.zeros_like(ids)
    return theirs | _heads_to_clap(ours, "text_head.")


def _heads_to_clap(ours: Tensors, begin: str) -> Tensors:
    return {_head(name, 1, 0): value for name, value in ours.items() if name.startswith(begin)}


def _head(name: str, source: int, target: int) -> str:
    for begins in _HEADS:
        for layers in _LAYERS:
            if name.startswith(begins[source] + layers[source]):
                kind = name.removeprefix(begins[source] + layers[source])
                return begins[target] + layers[target] + kind
    return name
