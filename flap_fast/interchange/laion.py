"""LAION-CLAP's `.pt`, or HTSAT's own: under the names that this project's HTSAT has too.

    audio_branch.layers.0...  <->  audio.layers.0...       audio_projection.0  <->  audio_head.0
    text_branch.encoder...    <->  text.inner.encoder...   logit_scale_a       <->  logit_scale

What has no use here (its second scale, the STFT as layers, AudioSet's head, two MLPs) is kept
beside the model, so that a file goes through unchanged.

Source: LAION-CLAP, clap_module/model.py and htsat.py; SPEC 12.1.
"""

from __future__ import annotations

import math
import re

import torch

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.data.preprocess.clap_mel import mel_matrix
from flap_fast.interchange.tensors import Tensors

# This project's begin of a name, and LAION's.
_BEGINS = (
    ("audio.", "audio_branch."),
    ("text.inner.", "text_branch."),
    ("audio_head.", "audio_projection."),
    ("text_head.", "text_projection."),
)
# LAION's names of what this project computes, or has no use for.
_UNUSED = re.compile(
    r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*"
    r"|audio_branch\..*\.(relative_position_index|attn_mask)"
    r"|text_branch\.embeddings\.(position_ids|token_type_ids)"
    r"|(audio|text)_transform\..*|logit_scale_t"
)
# What tells sizes.
_PATCHES = "audio_branch.patch_embed.proj.weight"
_TABLE = "audio_branch.layers.0.blocks.0.attn.relative_position_bias_table"
_FIRST_NORM = "audio_branch.bn0.weight"
_HEAD = "audio_projection.0.weight"
_MEL = "audio_branch.logmel_extractor.melW"


def is_laion(tensors: Tensors) -> bool:
    """Whether names are LAION-CLAP's."""
    return any(name.startswith("audio_branch.") for name in tensors)


def of_htsat(tensors: Tensors) -> Tensors:
    """HTSAT's own names, those of an audio tower alone, as LAION-CLAP's; none of other files."""
    if not {"bn0.weight", "patch_embed.proj.weight"} <= tensors.keys():
        return {}
    return {f"audio_branch.{name}": value for name, value in tensors.items()}


def from_laion(theirs: Tensors) -> tuple[Tensors, Tensors]:
    """In this project's names, and what has none there; names of neither stay as they are."""
    ours: Tensors = {}
    unused: Tensors = {}
    for name, value in theirs.items():
        if _UNUSED.fullmatch(name):
            unused[name] = value
        elif name == "logit_scale_a":
            ours["logit_scale"] = value.reshape(1)
        else:
            ours[_renamed(name, 1, 0)] = value
    return ours, unused


def to_laion(ours: Tensors, unused: Tensors) -> Tensors:
    """The inverse of `from_laion`."""
    theirs = dict(unused)
    for name, value in ours.items():
        if name == "logit_scale":
            theirs["logit_scale_a"] = value.reshape(())
        else:
            theirs[_renamed(name, 0, 1)] = value
    return theirs


def _renamed(name: str, source: int, target: int) -> str:
    for begins in _BEGINS:
        if name.startswith(begins[source]):
            return begins[target] + name.removeprefix(begins[source])
    return name


def laion_settings(tensors: Tensors) -> list[str]:
    """The settings that the shapes tell, as overrides of the defaults."""
    settings = htsat_settings(tensors)
    require(_HEAD in tensors, "the checkpoint", f"hold {_HEAD} of a LAION-CLAP with HTSAT", "none")
    return [*settings, f"joint.width={tensors[_HEAD].shape[0]}", "text.pool=pooler"]


def htsat_settings(tensors: Tensors) -> list[str]:
    """The same of its audio tower."""
    for name in (_PATCHES, _TABLE, _FIRST_NORM):
        require(
            name in tensors, "the checkpoint", f"hold {name} of a LAION-CLAP with HTSAT", "none"
        )
    patches, table = tensors[_PATCHES], tensors[_TABLE]
    blocks = re.compile(r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.").match
    places = {tuple(map(int, found.groups())) for found in map(blocks, tensors) if found}
    depths = [sum(layer == n for layer, _ in places) for n in range(1 + max(places)[0])]
    return [
        "audio.encoder=htsat",
        f"audio.width={patches.shape[0]}",
        f"audio.patch={patches.shape[2]}",
        f"audio.depths={depths}",
        f"audio.heads={table.shape[1]}",
        f"audio.window_patches={(math.isqrt(table.shape[0]) + 1) // 2}",
        f"audio.mel_bins={tensors[_FIRST_NORM].shape[0]}",
        f"fusion.type={_fusion(tensors)}",
    ]


def _fusion(tensors: Tensors) -> str:
    if tensors[_PATCHES].shape[1] == 4:
        return "channel_map"
    axes = next((a for a in ("1d", "2d") if any(f".mel_conv{a}." in name for name in tensors)), "")
    if not axes:
        return "none"
    if not any(".fusion_model." in name for name in tensors):
        return f"daf_{axes}"
    twice = any(".fusion_model.local_att2." in name for name in tensors)
    return f"{'iaff' if twice else 'aff'}_{axes}"


def check_mel(tensors: Tensors, config: Config) -> None:
    """Raise `ConfigError` unless the front end's matrix is the one the model was trained with."""
    # With fusion the file's layers rest, and the data pipeline's matrix counts.
    if _MEL not in tensors or config.fusion.on:
        return
    theirs, ours = tensors[_MEL], torch.from_numpy(mel_matrix(config.audio)).T
    same = theirs.shape == ours.shape and torch.allclose(theirs.double(), ours, atol=1e-6)
    rule = f"give the mel matrix in {_MEL}"
    remedy = "set audio.sample_rate_hz, low_hz and high_hz to what it was trained with"
    require(same, "audio.mel_variant", rule, config.audio.mel_variant, remedy)
