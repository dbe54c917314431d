"""Names of HTSAT's tensors, in this project (LAION's names) and in transformers' `ClapModel`.

    layers.0.blocks.1.attn.qkv.weight  <->  layers.0.blocks.1.attention.self.query.weight, key, ...

Names are those inside an encoder: after `audio_branch.` in LAION's files, and after
`audio_model.audio_encoder.` in transformers'.

Source: LAION-CLAP, clap_module/htsat.py; transformers, models/clap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Parts of names, in this project and in transformers.
_PARTS = (
    ("bn0.", "batch_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.relative_position_", ".attention.self.relative_position_"),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_QKV = ("query", "key", "value")


def htsat_from_hf(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `ClapAudioEncoder`'s state dict to this project's names."""
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        query = re.fullmatch(r"(.*)\.attention\.self\.query\.(weight|bias)", name)
        if query:
            block, kind = query.groups()
            three = [theirs[f"{block}.attention.self.{part}.{kind}"] for part in _QKV]
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat(three)
        elif not re.search(r"\.self\.(key|value)\.|relative_position_index$", name):
            for mine, other in _PARTS:
                name = name.replace(other, mine) if _is_in(other, name) else name
            ours[name] = value
    return ours


def htsat_to_hf(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename to transformers' names. It also keeps relative position indices; they are optional."""
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        block, qkv, kind = name.partition(".attn.qkv.")
        if qkv:
            for part, rows in zip(_QKV, value.chunk(3), strict=True):
                theirs[f"{block}.attention.self.{part}.{kind}"] = rows.clone()
        else:
            for mine, other in _PARTS:
                name = name.replace(mine, other) if _is_in(mine, name) else name
            theirs[name] = value
    return theirs


def _is_in(part: str, name: str) -> bool:
    """Whether a name contains a part; `bn0.` only at its start."""
    return part in name if part.startswith(".") else name.startswith(part)
