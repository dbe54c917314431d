"""Layouts of LAION-CLAP's `.pt` and of HTSAT's own checkpoints.

    audio_branch.layers.0...  <->  audio.layers.0...       audio_projection.0  <->  audio_head.0
    text_branch.encoder...    <->  text.inner.encoder...   logit_scale_a       <->  logit_scale

Inside the encoders the names are the same. Tensors without a use here (a second scale, the STFT as
layers, AudioSet's head, two MLPs) are stored with the model, so that an export is the same file.

Source: LAION-CLAP, clap_module/model.py and htsat.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.preprocess.mel_clap import mel_matrix
from flap_fast.encoders.roberta.settings import RobertaSettings
from flap_fast.interchange.layout import Export, Imported, Layout, Source
from flap_fast.interchange.tensors import Tensors, module_prefix, save_pickle

# How names begin in this project, and in LAION's.
_BEGINS = (
    ("audio.", "audio_branch."),
    ("text.inner.", "text_branch."),
    ("audio_head.", "audio_projection."),
    ("text_head.", "text_projection."),
)
# LAION's names of tensors that this project computes, or has no use for.
_UNUSED = re.compile(
    r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*"
    r"|audio_branch\..*\.(relative_position_index|attn_mask)"
    r"|text_branch\.embeddings\.(position_ids|token_type_ids)"
    r"|(audio|text)_transform\..*|logit_scale_t"
)
# Tensors whose shapes give the sizes.
_PATCHES = "audio_branch.patch_embed.proj.weight"
_TABLE = "audio_branch.layers.0.blocks.0.attn.relative_position_bias_table"
_FIRST_NORM = "audio_branch.bn0.weight"
_HEAD = "audio_projection.0.weight"
_MEL = "audio_branch.logmel_extractor.melW"


def _is_laion(source: Source) -> bool:
    return any(name.startswith("audio_branch.") for name in source.tensors)


def _is_htsat(source: Source) -> bool:
    return {"bn0.weight", "patch_embed.proj.weight"} <= source.tensors.keys()


def _read_laion(source: Source) -> Imported:
    config = load_config(None, [*laion_settings(source.tensors), *source.overrides])
    rule = "name a RoBERTa's folder, for its tokenizer and its settings"
    remedy = "hf download FacebookAI/roberta-base --local-dir models/roberta-base"
    folder = config.text.folder if isinstance(config.text, RobertaSettings) else None
    require(folder is not None, "text.folder", rule, folder, remedy)
    _check_mel(source.tensors, config)
    ours, unused = from_laion(source.tensors)
    assert source.saved is not None
    prefix = module_prefix(source.saved.tensors)
    return Imported(config, ours, {prefix + name: value for name, value in unused.items()})


def _read_htsat(source: Source) -> Imported:
    theirs = {f"audio_branch.{name}": value for name, value in source.tensors.items()}
    config = load_config(None, [*htsat_settings(theirs), *source.overrides])
    _check_mel(theirs, config)
    return Imported(config, from_laion(theirs)[0], encoder_only=True)


def _write_laion(export: Export, out: Path) -> str:
    rule = (
        f"be a folder where {export.folder} was not imported from a .pt, whose unused layers that "
        "holds"
    )
    remedy = "export to a folder, for transformers"
    require(any("tscam_conv" in name for name in export.unused), "OUT", rule, out, remedy)
    theirs = to_laion(export.weights, export.unused)
    named = {export.prefix + name: value for name, value in theirs.items()}
    save_pickle(out, {"state_dict": named})
    return "LAION-CLAP's layout"


def from_laion(theirs: Tensors) -> tuple[Tensors, Tensors]:
    """Rename LAION's tensors; also returns those without a use here. Unknown names stay."""
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
    """Rename to LAION's names, the inverse of `from_laion`."""
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
    """Return the settings that the shapes give, as overrides of the defaults."""
    settings = htsat_settings(tensors)
    require(_HEAD in tensors, "the checkpoint", f"hold {_HEAD} of a LAION-CLAP with HTSAT", "none")
    return [*settings, f"joint.width={tensors[_HEAD].shape[0]}", "text.pool=pooler"]


def htsat_settings(tensors: Tensors) -> list[str]:
    """Return the settings of the audio encoder that the shapes give."""
    for name in (_PATCHES, _TABLE, _FIRST_NORM):
        require(
            name in tensors, "the checkpoint", f"hold {name} of a LAION-CLAP with HTSAT", "none"
        )
    patches, table = tensors[_PATCHES], tensors[_TABLE]
    blocks = re.compile(r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.").match
    found_blocks = {tuple(map(int, found.groups())) for found in map(blocks, tensors) if found}
    depths = [sum(layer == n for layer, _ in found_blocks) for n in range(1 + max(found_blocks)[0])]
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


def _check_mel(tensors: Tensors, config: Config) -> None:
    """Raise `ConfigError` unless the front end's matrix is the one the model was trained with."""
    # With fusion LAION's pipeline computes the mel; the matrix in the file is not used.
    if _MEL not in tensors or config.fusion.on:
        return
    theirs, ours = tensors[_MEL], torch.from_numpy(mel_matrix(config.audio)).T
    same = theirs.shape == ours.shape and torch.allclose(theirs.double(), ours, atol=1e-6)
    rule = f"give the mel matrix in {_MEL}"
    remedy = "set audio.sample_rate_hz, low_hz and high_hz to what it was trained with"
    require(same, "audio.mel_variant", rule, config.audio.mel_variant, remedy)


LAION = Layout(
    names="LAION-CLAP's (audio_branch...)",
    form="file",
    matches=_is_laion,
    read=_read_laion,
    write=_write_laion,
    modality="audio",
)
HTSAT = Layout(
    names="HTSAT's (bn0, patch_embed.proj)", form="file", matches=_is_htsat, read=_read_htsat
)
