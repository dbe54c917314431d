"""Layout of transformers' `ClapModel`: a folder, with the names of `clap_names`.

Settings come from config.json, and from preprocessor_config.json or processor_config.json. A name
that config.json lacks has the class's default: transformers leaves out values equal to it. The
preprocessor's settings must all be present.

Source: transformers, models/clap.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_fast.checks import require
from flap_fast.checksums import write_sums
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.htsat.settings import HTSATSettings
from flap_fast.encoders.roberta.settings import RobertaSettings
from flap_fast.interchange.clap_names import from_clap, to_clap
from flap_fast.interchange.layout import Export, Imported, Layout, Source
from flap_fast.interchange.tensors import Tensors, read_json, read_tensors, strip_prefixes
from flap_fast.tensors import save_tensors

if TYPE_CHECKING:
    from transformers import ClapConfig, ClapTextConfig, RobertaConfig

# Settings that a ClapTextConfig and a RobertaConfig share and that weights depend on.
_TEXT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"),
    *("max_position_embeddings", "type_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# Settings that this project's HTSAT fixes.
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
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


def _read(source: Source) -> Imported:
    tensors, settings, text = _read_folder(source.path)
    ours, unused = from_clap(strip_prefixes(tensors, source.strip))
    files = [source.path / name for name in _TOKENIZER if (source.path / name).is_file()]
    rule = f"hold a tokenizer's files ({', '.join(_TOKENIZER)})"
    require(bool(files), str(source.path), rule, "none")
    text.save_pretrained(source.work)
    for file in files:
        shutil.copy(file, source.work)
    config = load_config(None, [*settings, f"text.folder={source.work}", *source.overrides])
    _check_spec_size(source.path, config)
    return Imported(config, ours, unused)


def _write(export: Export, folder: Path) -> str:
    buffers = export.model.named_buffers()
    indices = {name: b for name, b in buffers if name.endswith("relative_position_index")}
    _write_settings(folder, export.config, export.text_config)
    theirs = to_clap(export.weights | indices, export.unused)
    save_tensors(folder / "model.safetensors", theirs)
    tokenizer(export.config.text).inner.save_pretrained(folder)
    write_sums(folder)
    return "a folder for transformers.ClapModel"


def _feature_extractor(folder: Path) -> dict[str, Any]:
    """Return the feature extractor's settings, from its own file or from its processor's."""
    processor = folder / "processor_config.json"
    if processor.is_file() and not (folder / "preprocessor_config.json").is_file():
        inside = read_json(processor).get("feature_extractor")
        require(isinstance(inside, dict), str(processor), "hold feature_extractor", inside)
        return inside  # type: ignore[return-value] - checked above
    return read_json(folder / "preprocessor_config.json")


def _check_spec_size(folder: Path, config: Config) -> None:
    """Raise `ConfigError` unless both fold log-mels into a square of the same side."""
    from transformers import ClapConfig

    theirs: Any = ClapConfig.from_dict(read_json(folder / "config.json"))
    side, size = _htsat(config).image_side, theirs.audio_config.spec_size
    rule = f"be {side}, the side of {config.audio.frames} frames of {config.audio.mel_bins} bins"
    require(size == side, "audio_config.spec_size", rule, size)


def _read_folder(folder: Path) -> tuple[Tensors, list[str], RobertaConfig]:
    """Return the tensors, the settings as overrides, and the text encoder's config."""
    from transformers import ClapConfig, RobertaConfig

    theirs = ClapConfig.from_dict(read_json(folder / "config.json"))
    features = _feature_extractor(folder)
    file = next(
        (f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).is_file()), None
    )
    require(file is not None, str(folder), "hold model.safetensors or pytorch_model.bin", "neither")
    text: Any = theirs.text_config
    config = RobertaConfig(**{name: getattr(text, name) for name in _TEXT})
    settings = [*_encoder_settings(theirs), *_front_end_settings(features)]
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


def _front_end_settings(features: dict[str, Any]) -> list[str]:
    names = (
        *("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size"),
        *("frequency_min", "frequency_max", "truncation", "padding"),
    )
    missing = [name for name in names if name not in features]
    require(not missing, "preprocessor_config.json", f"hold {', '.join(names)}", f"no {missing}")
    rate = features["sampling_rate"]
    for name, value in (("fft_window_size", 1024), ("hop_length", rate // 100)):
        found = features[name]
        require(found == value, f"preprocessor_config.json: {name}", f"be {value}", found)
    variant = "htk_none" if features["truncation"] == "fusion" else "slaney_norm"
    return [
        f"audio.sample_rate_hz={rate}",
        f"audio.duration_s={float(features['max_length_s'])}",
        f"audio.frames={1 + round(features['max_length_s'] * rate) // features['hop_length']}",
        f"audio.mel_bins={features['feature_size']}",
        f"audio.low_hz={float(features['frequency_min'])}",
        f"audio.high_hz={float(features['frequency_max'])}",
        f"audio.mel_variant={variant}",
        f"audio.filling={features['padding']}",
    ]


def _htsat(config: Config) -> HTSATSettings:
    """The audio encoder's settings; `CLAP.encoder` lets no other in."""
    assert isinstance(config.audio, HTSATSettings)
    return config.audio


def _why_not(export: Export) -> str:
    config, audio = export.config, _htsat(export.config)
    if audio.mel != "clap":
        return "its log-mels are not CLAP's"
    if (audio.mean, audio.std) != (0, 0.5):
        return "transformers has no audio.mean and audio.std"
    if config.fusion.type not in _FUSIONS:
        return f"transformers has no fusion.type={config.fusion.type}"
    if (audio.mel_variant == "htk_none") != config.fusion.on:
        return f"transformers has no audio.mel_variant={audio.mel_variant} here"
    if audio.grid[0] >> len(audio.stages) - 1 < audio.window_patches:
        return "its last stage is smaller than audio.window_patches"
    return why_no_clap_text(export)


def why_no_clap_text(export: Export) -> str:
    """Return why a text encoder cannot be a `ClapTextModel`; empty if it can."""
    encoder = export.text_config
    roberta = encoder is not None and encoder.model_type == "roberta"
    text = export.config.text
    if not (roberta and isinstance(text, RobertaSettings) and text.pool == "pooler"):
        return "its text encoder is no RoBERTa with a pooler"
    return export.why_not_own_heads


def _write_settings(folder: Path, config: Config, encoder: Any) -> None:
    """Write config.json and preprocessor_config.json of a `ClapModel`, with every value."""
    from transformers import ClapConfig, ClapFeatureExtractor

    audio, width = _htsat(config), config.joint.width
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
    """Return the text encoder's settings as a `ClapTextConfig`."""
    from transformers import ClapTextConfig

    values = {name: getattr(encoder, name) for name in _TEXT}
    return ClapTextConfig(**values, projection_dim=config.joint.width, projection_hidden_act="relu")


CLAP = Layout(
    names="clap",
    form="folder",
    matches=lambda source: source.model_type == "clap",
    read=_read,
    write=_write,
    why_not=_why_not,
    modality="audio",
    encoder="htsat",
)
