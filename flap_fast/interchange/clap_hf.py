"""A folder of transformers' `ClapModel` -> a model, and back.

    audio_model.audio_encoder  <->  audio, see `htsat_names`
    text_model                 <->  text.inner
    audio_projection.linear1   <->  audio_head.0
    logit_scale_a              <->  logit_scale

Settings come from config.json, and from preprocessor_config.json or processor_config.json. A name
that config.json lacks has the class's default: transformers leaves out what equals it. The
preprocessor's must all be there.

Source: transformers, models/clap; SPEC 12.1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import ClapConfig, ClapFeatureExtractor, ClapTextConfig, RobertaConfig

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.interchange.htsat_names import htsat_from_hf, htsat_to_hf
from flap_fast.interchange.tensors import Tensors, read_tensors

_ENCODER = "audio_model.audio_encoder."
_HEADS = (("audio_projection.", "audio_head."), ("text_projection.", "text_head."))
_LAYERS = (("linear1.", "0."), ("linear2.", "2."))
# Buffers that transformers keeps and this project computes.
_TEXT_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# What a ClapTextConfig and a RobertaConfig both have, and the weights' meaning hangs on.
_TEXT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"),
    *("max_position_embeddings", "type_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# What this project's HTSAT always is.
_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "flatten_patch_embeds": True,
    "enable_patch_layer_norm": True,
    "aff_block_r": 4,
    "projection_hidden_act": "relu",
}
_FUSIONS = ("none", "aff_2d")


def from_clap(theirs: Tensors) -> tuple[Tensors, Tensors]:
    """In this project's names, and its second scale; names of neither stay as they are."""
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
    """The inverse; a scale for both directions where no second one is kept.

    Args:
        ours: HTSAT's indices of relative positions among them.
    """
    encoder = {n.removeprefix("audio."): v for n, v in ours.items() if n.startswith("audio.")}
    theirs = {_ENCODER + name: value for name, value in htsat_to_hf(encoder).items()}
    scale = ours["logit_scale"].reshape(())
    theirs["logit_scale_a"] = scale
    theirs["logit_scale_t"] = unused.get("logit_scale_t", scale).clone()
    return theirs | text_to_clap(ours) | _heads_to_clap(ours, "audio_head.")


def text_to_clap(ours: Tensors) -> Tensors:
    """The text tower and its head alone: a `ClapTextModelWithProjection`'s, with its buffers."""
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


def read_json(file: Path) -> dict[str, Any]:
    """A settings file of a folder."""
    require(file.is_file(), str(file.parent), f"hold {file.name}", "none")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON: {error}") from None
    require(isinstance(found, dict), str(file), "hold an object", type(found).__name__)
    return found


def _heard(folder: Path) -> dict[str, Any]:
    """The feature extractor's settings: in a file of their own, or in its processor's."""
    processor = folder / "processor_config.json"
    if processor.is_file() and not (folder / "preprocessor_config.json").is_file():
        inside = read_json(processor).get("feature_extractor")
        require(isinstance(inside, dict), str(processor), "hold feature_extractor", inside)
        return inside  # type: ignore[return-value] - checked above
    return read_json(folder / "preprocessor_config.json")


def check_spec_size(folder: Path, config: Config) -> None:
    """Raise `ConfigError` unless its log-mels are folded into a square of our side."""
    theirs: Any = ClapConfig.from_dict(read_json(folder / "config.json"))
    side, size = config.audio.image_side, theirs.audio_config.spec_size
    rule = f"be {side}, the side of {config.audio.frames} frames of {config.audio.mel_bins} bins"
    require(size == side, "audio_config.spec_size", rule, size)


def read_clap(folder: Path) -> tuple[Tensors, list[str], RobertaConfig]:
    """Its tensors, the settings of its audio side as overrides, and its text tower's config."""
    theirs = ClapConfig.from_dict(read_json(folder / "config.json"))
    heard = _heard(folder)
    file = next(
        (f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).is_file()), None
    )
    require(file is not None, str(folder), "hold model.safetensors or pytorch_model.bin", "neither")
    text: Any = theirs.text_config
    config = RobertaConfig(**{name: getattr(text, name) for name in _TEXT})
    settings = [*_encoder_settings(theirs), *_front_end_settings(heard)]
    settings += [f"text.dropout={text.hidden_dropout_prob}", "text.pool=pooler"]
    return read_tensors(folder / str(file)), settings, config


def _encoder_settings(theirs: ClapConfig) -> list[str]:
    audio: Any = theirs.audio_config
    for name, value in _FIXED.items():
        found = getattr(audio, name)
        require(found == value, f"audio_config.{name}", f"be {value}", found)
    fusion = audio.fusion_type if audio.enable_fusion else "none"
    require(fusion in _FUSIONS, "audio_config.fusion_type", f"be one of {_FUSIONS}", fusion)
    stride = audio.patch_stride
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    rule = f"be the patch_size {audio.patch_size} twice"
    require(stride == (audio.patch_size,) * 2, "audio_config.patch_stride", rule, stride)
    heads = [audio.num_attention_heads[0] << n for n in range(len(audio.depths))]
    found = list(audio.num_attention_heads)
    require(found == heads, "audio_config.num_attention_heads", f"be {heads}, doubled", found)
    return [
        "audio.encoder=htsat",
        f"audio.width={audio.patch_embeds_hidden_size}",
        f"audio.patch={audio.patch_size}",
        f"audio.depths={list(audio.depths)}",
        f"audio.heads={heads[0]}",
        f"audio.window_patches={audio.window_size}",
        f"audio.drop_path={audio.drop_path_rate}",
        f"fusion.type={fusion}",
        f"joint.width={audio.projection_dim}",
    ]


def _front_end_settings(heard: dict[str, Any]) -> list[str]:
    names = (
        *("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size"),
        *("frequency_min", "frequency_max", "truncation", "padding"),
    )
    missing = [name for name in names if name not in heard]
    require(not missing, "preprocessor_config.json", f"say {', '.join(names)}", f"no {missing}")
    rate = heard["sampling_rate"]
    for name, value in (("fft_window_size", 1024), ("hop_length", rate // 100)):
        require(
            heard[name] == value, f"preprocessor_config.json: {name}", f"be {value}", heard[name]
        )
    variant = "htk_none" if heard["truncation"] == "fusion" else "slaney_norm"
    return [
        f"audio.sample_rate_hz={rate}",
        f"audio.duration_s={float(heard['max_length_s'])}",
        f"audio.frames={1 + round(heard['max_length_s'] * rate) // heard['hop_length']}",
        f"audio.mel_bins={heard['feature_size']}",
        f"audio.low_hz={float(heard['frequency_min'])}",
        f"audio.high_hz={float(heard['frequency_max'])}",
        f"audio.mel_variant={variant}",
        f"audio.filling={heard['padding']}",
    ]


def why_not_clap(config: Config, encoder: Any) -> str:
    """Why a model cannot be a `ClapModel`; empty if it can.

    Args:
        encoder: the text tower's transformers config; None for CLIP's tower.
    """
    if config.image is not None:
        return "it sees"
    if config.audio.encoder != "htsat" or config.audio.mel != "clap":
        return "its audio tower is no HTSAT on CLAP's mel"
    if (config.audio.mean, config.audio.std) != (0, 0.5):
        return "transformers has no audio.mean and audio.std"
    if config.fusion.type not in _FUSIONS:
        return f"transformers has no fusion.type={config.fusion.type}"
    if (config.audio.mel_variant == "htk_none") != config.fusion.on:
        return f"transformers has no audio.mel_variant={config.audio.mel_variant} here"
    if config.audio.grid[0] >> len(config.audio.stages) - 1 < config.audio.window_patches:
        return "its last stage is smaller than audio.window_patches"
    return why_no_clap_text(config, encoder)


def why_no_clap_text(config: Config, encoder: Any) -> str:
    """The same of the text tower alone."""
    roberta = encoder is not None and encoder.model_type == "roberta"
    fits = roberta and config.text.pool == "pooler"
    return "" if fits else "its text tower is no RoBERTa with a pooler"


def write_clap_settings(folder: Path, config: Config, encoder: Any) -> None:
    """config.json and preprocessor_config.json of a `ClapModel`, every value spelt out."""
    audio, width = config.audio, config.joint.width
    stages = audio.stages
    sizes = {
        "patch_embeds_hidden_size": stages[0][0],
        "hidden_size": stages[-1][0],
        "depths": [depth for _, depth, _ in stages],
        "num_attention_heads": [heads for _, _, heads in stages],
        "num_hidden_layers": len(stages),
        "window_size": audio.window_patches,
        "patch_size": audio.patch,
        "patch_stride": [audio.patch] * 2,
        "num_mel_bins": audio.mel_bins,
        "spec_size": audio.image_side,
        "drop_path_rate": audio.drop_path,
        "hidden_dropout_prob": 0.0,
        "enable_fusion": config.fusion.on,
        "fusion_type": config.fusion.type if config.fusion.on else None,
        "projection_dim": width,
    }
    theirs = ClapConfig(
        text_config=clap_text_config(config, encoder).to_dict(),
        audio_config=_FIXED | sizes,
        projection_dim=width,
        projection_hidden_act="relu",
        architectures=["ClapModel"],
    )
    theirs.to_json_file(folder / "config.json", use_diff=False)
    seconds = audio.duration_s
    ClapFeatureExtractor(
        feature_size=audio.mel_bins,
        sampling_rate=audio.sample_rate_hz,
        hop_length=audio.hop,
        max_length_s=int(seconds) if seconds.is_integer() else seconds,  # type: ignore[arg-type]
        fft_window_size=audio.window,
        frequency_min=audio.low_hz,
        frequency_max=audio.high_hz,
        truncation="fusion" if config.fusion.on else "rand_trunc",
        padding=audio.filling,
    ).save_pretrained(folder)


def clap_text_config(config: Config, encoder: Any) -> ClapTextConfig:
    """A `ClapTextConfig` of the text tower, every value of it as it is."""
    values = {name: getattr(encoder, name) for name in _TEXT}
    return ClapTextConfig(**values, projection_dim=config.joint.width, projection_hidden_act="relu")
