"""What the formulas of FLOP and memory know; anything else is refused, by whatever name it comes.

A part of the model that is not in this list, or of another class, and a loss that is not: so an
encoder or a loss that is new is refused until its formulas are written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.encoders.blocks import Blocks
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.packed import is_bert
from flap_fast.encoders.vit.model import PatchEmbed, ViT
from flap_fast.model.decoder import Decoder
from flap_fast.model.masking import kept_patches
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.synthetic import without_files

_MODEL: dict[str, type[nn.Module]] = {
    "audio": ViT,
    "audio.patch_embed": PatchEmbed,
    "audio.blocks": Blocks,
    "audio.norm": nn.LayerNorm,
    "audio_head": nn.Sequential,
    "text": TransformersText,
    "text_head": nn.Sequential,
    "decoder": Decoder,
}
_INSIDE = ("audio", "text")
_LOSSES = {"contrastive", "cyclic", "recon"}
_UNKNOWN = "the formulas of FLOP and memory do not know another yet"


def check_formulas(config: Config) -> TwoTowers:
    """The config's model on the meta device, if all of its step is known.

    Raises:
        ConfigError: a step that the formulas leave a part of out.
    """
    require(config.image is None, "image", f"be left out here: {_UNKNOWN}", "one")
    _check_losses(config)
    with without_files(config) as complete, torch.device("meta"):
        model = TwoTowers(complete, weights=False)
    _check_model(model)
    return model


def _check_model(model: TwoTowers) -> None:
    named = dict(model.named_children())
    _check_parts(named)
    inside = {
        f"{outer}.{name}": m for outer in _INSIDE for name, m in named[outer].named_children()
    }
    encoder = inside.pop("text.inner")
    _check_parts(inside)
    rule = f"hold a BERT or RoBERTa here: {_UNKNOWN}"
    require(is_bert(encoder), "text.folder", rule, type(encoder).__name__)


def _check_parts(named: Mapping[str, nn.Module]) -> None:
    for name, module in named.items():
        kind = _MODEL.get(name)
        rule = f"be a {kind.__name__} here: {_UNKNOWN}" if kind else f"not be there: {_UNKNOWN}"
        require(type(module) is kind, f"the model's {name}", rule, type(module).__name__)


def _check_losses(config: Config) -> None:
    for name, section in config.loss:
        weights = {field: value for field, value in section if field.endswith("weight")}
        for field, value in weights.items():
            known = name in _LOSSES or value == 0
            require(known, f"loss.{name}.{field}", f"be 0 here: {_UNKNOWN}", value)
    terms = (
        config.loss.contrastive.weight,
        *(getattr(config.loss.cyclic, f"{which}_weight") for which in ("cross", "in")),
    )
    rule = "be above 0 here, or a cyclic term's: without, towers train that the formulas count"
    require(any(terms), "loss.contrastive.weight", rule, 0)
    if config.loss.recon.weight:
        patches = config.audio.grid[0] * config.audio.grid[1]
        kept = kept_patches(config.mask, config.audio.grid)
        rule = "be 0 here where masking drops no patch"
        require(kept < patches, "loss.recon.weight", rule, config.loss.recon.weight)
