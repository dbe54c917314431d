"""AudioMAE's checkpoints (and MAViL's, if they come in the same names) -> an audio tower.

    cls_token, blocks.N..., norm or fc_norm   the same names, behind `audio.`
    patch_embed.proj (D, 1, P, P)             audio.patch_embed (D, P * P)
    pos_embed (1, 1 + N, D)                   audio.pos_embed (N, D): as it is, never computed again

With its decoder, the same of `decoder_*`, behind `decoder.`. What is left out otherwise: the
decoder, the mask token and a classifier's head.

Source: AudioMAE, models_mae.py and models_vit.py; SPEC 12.3, 12.4.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from flap_fast.checks import require
from flap_fast.encoders.vit.patches import sine_positions
from flap_fast.encoders.vit.settings import SIZES
from flap_fast.interchange.tensors import Tensors

_IGNORED = re.compile(r"head\..*|decoder_.*|mask_token")
_RENAMED = {
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
}
_FC_NORM = {"fc_norm.weight": "norm.weight", "fc_norm.bias": "norm.bias"}
_DECODER = {
    "mask_token": "mask_token",
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
}


def is_audiomae(tensors: Tensors) -> bool:
    """Whether names are AudioMAE's."""
    return {"patch_embed.proj.weight", "pos_embed"} <= tensors.keys()


def from_audiomae(theirs: Tensors, *, decoder: bool) -> Tensors:
    """In this project's names; names that it does not know stay as they are."""
    ours: Tensors = {}
    # A fine-tuned tower has the one, a pre-trained one the other; with both one is unexpected.
    names = _RENAMED if "norm.weight" in theirs else _RENAMED | _FC_NORM
    for name, value in theirs.items():
        if decoder and (renamed := _of_decoder(name)):
            ours[renamed] = value[0] if name == "decoder_pos_embed" else value
        elif not _IGNORED.fullmatch(name):
            ours[f"audio.{names.get(name, name)}"] = value
    _flatten(ours)
    return ours


def _of_decoder(name: str) -> str:
    if name == "decoder_pos_embed":
        return "decoder.pos_embed"
    begin = next((b for b in _DECODER if name.startswith(b)), "")
    return f"decoder.{_DECODER[begin]}{name.removeprefix(begin)}" if begin else ""


def _flatten(ours: Tensors) -> None:
    """One channel of pixels as a row; the position of [CLS] into [CLS] itself."""
    pixels = ours["audio.patch_embed.weight"]
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        ours["audio.patch_embed.weight"] = pixels.flatten(1)
    table = ours["audio.pos_embed"]
    if table.ndim == 3 and len(table) == 1:
        if "audio.cls_token" in ours:
            ours["audio.cls_token"] = ours["audio.cls_token"] + table[:, :1]
            table = table[:, 1:]
        ours["audio.pos_embed"] = table[0]


def audiomae_settings(theirs: Tensors, ours: Tensors, overrides: list[str]) -> list[str]:
    """The settings that its shapes and names tell, as overrides of the defaults."""
    pixels = theirs["patch_embed.proj.weight"]
    width, patch = pixels.shape[0], pixels.shape[-1]
    depth = _blocks(theirs, "blocks.")
    heads = next((h for w, d, h in SIZES.values() if (w, d) == (width, depth)), None)
    given = any(override.startswith("audio.heads=") for override in overrides)
    rule = f"be given: {width} x {depth} is no size of a ViT known here"
    require(heads is not None or given, "audio.heads", rule, heads, "add audio.heads=N")
    settings = [
        "audio.encoder=vit",
        *(f"audio.width={width}", f"audio.depth={depth}", f"audio.heads={heads or 1}"),
        f"audio.patch={patch}",
        f"audio.use_cls={'cls_token' in theirs}",
        f"audio.norm_position={'tokens' if 'norm.weight' in theirs else 'pooled'}",
    ]
    if "decoder.embed.weight" in ours:
        settings.append(f"decoder.width={len(ours['decoder.embed.weight'])}")
        settings.append(f"decoder.depth={_blocks(ours, 'decoder.blocks.')}")
        # AudioMAE's; shapes do not tell.
        settings += ["decoder.heads=16", "loss.recon.weight=1"]
    return settings


def _blocks(tensors: Tensors, begin: str) -> int:
    return len({n.removeprefix(begin).split(".")[0] for n in tensors if n.startswith(begin)})


def grid_of(table: Tensor, grid: tuple[int, int]) -> str:
    """The `audio.pos_grid` that would compute a table, or "" for a table of its own."""
    for layout in ("correct", "audiomae_legacy"):
        if table.shape == (grid[0] * grid[1], table.shape[1]):
            computed = sine_positions(table.shape[1], grid, layout)
            if torch.allclose(table.float(), computed, atol=1e-4):
                return layout
    return ""
