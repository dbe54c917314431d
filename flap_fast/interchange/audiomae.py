"""Layout of AudioMAE's checkpoints, and of MAViL's in the same names: an audio encoder.

    cls_token, blocks.N..., norm or fc_norm   the same names, behind `audio.`
    patch_embed.proj (D, 1, P, P)             audio.patch_embed (D, P * P)
    pos_embed (1, 1 + N, D)                   audio.pos_embed (N, D): the file's, not recomputed

With its decoder, `decoder_*` likewise becomes `decoder.*`; without, the decoder and the mask
token are left out. A classifier's head always is.

Source: AudioMAE, models_mae.py and models_vit.py.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.encoders.vit.patches import sine_positions
from flap_fast.encoders.vit.settings import SIZES, ViTSettings
from flap_fast.interchange.layout import Imported, Layout, Source
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


def _is_audiomae(source: Source) -> bool:
    return {"patch_embed.proj.weight", "pos_embed"} <= source.tensors.keys()


def _read(source: Source) -> Imported:
    ours = _from_audiomae(source.tensors, decoder=source.decoder)
    config = _config(source.tensors, ours, list(source.overrides))
    return Imported(config, ours, encoder_only=True, decoder=source.decoder)


def _config(theirs: Tensors, ours: Tensors, overrides: list[str]) -> Config:
    config = load_config(None, [*_settings(theirs, ours, overrides), *overrides])
    assert isinstance(config.audio, ViTSettings)  # as its own settings say
    rule = "be 'sines' for AudioMAE's weights, which were trained with them"
    require(not config.audio.rotary, "audio.time_positions", rule, config.audio.time_positions)
    grid = _grid_of(ours["audio.pos_embed"], config.audio.grid) or config.audio.pos_grid
    audio = config.audio.model_copy(update={"pos_grid": grid})
    return config.model_copy(update={"audio": audio})


def _from_audiomae(theirs: Tensors, *, decoder: bool) -> Tensors:
    """Rename AudioMAE's tensors; unknown names get the prefix of the encoder."""
    ours: Tensors = {}
    # Fine-tuned encoders have fc_norm, pre-trained ones norm; of both, one is unexpected.
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
    """Flatten a patch's pixels to a row; add the position of [CLS] to [CLS] itself."""
    pixels = ours["audio.patch_embed.weight"]
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        ours["audio.patch_embed.weight"] = pixels.flatten(1)
    table = ours["audio.pos_embed"]
    if table.ndim == 3 and len(table) == 1:
        if "audio.cls_token" in ours:
            ours["audio.cls_token"] = ours["audio.cls_token"] + table[:, :1]
            table = table[:, 1:]
        ours["audio.pos_embed"] = table[0]


def _settings(theirs: Tensors, ours: Tensors, overrides: list[str]) -> list[str]:
    """Return the settings that shapes and names give, as overrides of the defaults."""
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
        # AudioMAE's number; no shape depends on it.
        settings += ["decoder.heads=16", "loss.recon.weight=1"]
    return settings


def _blocks(tensors: Tensors, begin: str) -> int:
    return len({n.removeprefix(begin).split(".")[0] for n in tensors if n.startswith(begin)})


def _grid_of(table: Tensor, grid: tuple[int, int]) -> str:
    """Return the `audio.pos_grid` that computes this table, or "" if none does."""
    for layout, row in {"correct": grid[1], "audiomae_legacy": grid[0]}.items():
        if table.shape == (grid[0] * grid[1], table.shape[1]):
            computed = sine_positions(table.shape[1], grid, row)
            if torch.allclose(table.float(), computed, atol=1e-4):
                return layout
    return ""


AUDIOMAE = Layout(
    names="AudioMAE's (patch_embed.proj, pos_embed)", form="file", matches=_is_audiomae, read=_read
)
