"""`flap export --onnx`: a model as a folder for onnxruntime.

OUT/frontend.onnx                     waveform of any length -> the encoder's input
OUT/audio.onnx, audio.int8.onnx       the encoder's input -> embedding (image.onnx of images)
OUT/text.onnx, text.int8.onnx         token ids -> embedding
OUT/tokenizer.json                    captions -> token ids, by the package `tokenizers`
OUT/model.json                        rate, lengths, scale
OUT/embed.py, README.md               a program that needs nothing of this package
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from flap_fast.checks import ConfigError, require
from flap_fast.checksums import write_sums
from flap_fast.config import Config
from flap_fast.data.tokenize import Tokenizer, portable_tokenizer, tokenizer
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.hub import local_folder
from flap_fast.interchange.convert import appearing
from flap_fast.interchange.layout import CardFields, Export
from flap_fast.interchange.to_onnx.graphs import OPSET, graphs, portable_model, write_graph
from flap_fast.model.model_folder import load_model, model_folder
from flap_fast.model.two_towers import TwoTowers

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_HERE = Path(__file__).parent
# What an int8 text encoder is scaled by; others than those that it is compared with.
_EXAMPLES = (
    *("wind", "glass shatters", "a violin plays a slow melody", "Footsteps on gravel."),
    "Waves break on a beach, and 3 children laugh.",
    "An engine starts, idles for a while and stops.",
    "A man says a few words, then the crowd applauds loudly for several seconds.",
    *("the synthesizer's chord fades out", "keys jingle; a door slams"),
)


def export_onnx(path: str | Path, out: Path, fields: CardFields | None = None) -> str:
    """Write a model folder, or a run's last checkpoint, for onnxruntime.

    Args:
        fields: what the card says that the run does not know.

    Returns:
        How far each file is from PyTorch.

    Raises:
        ConfigError: OUT exists, a package is missing, or a part of the model cannot be traced.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--onnx needs {package}: pip install 'flap_fast[onnx]'")
    # Here, not above: they import those packages, and huggingface_hub.
    from flap_fast.interchange.card import write_card
    from flap_fast.interchange.to_onnx.comparison import compare
    from flap_fast.interchange.to_onnx.int8 import write_int8

    path = local_folder(path)
    source = model_folder(path)
    model, config = load_model(source)
    rule = "be none for --onnx: whether a clip is fused depends on its length"
    require(not config.fusion.on, "fusion.type", rule, config.fusion.type)
    words = tokenizer(config.text)
    portable_words, portable = portable_tokenizer(words), portable_model(model, config)
    with appearing(out) as folder:
        for name, graph in graphs(portable, config).items():
            write_graph(graph, folder / f"{name}.onnx")
            if name != "frontend":
                feeds = [_feed(words, caption) for caption in _EXAMPLES] if name == "text" else ()
                write_int8(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", feeds)
        portable_words.save(str(folder / "tokenizer.json"))
        facts = json.dumps(_facts(model, config), indent=2)
        (folder / "model.json").write_text(facts + "\n")
        shutil.copyfile(_HERE / "embed.py", folder / "embed.py")
        table = compare(folder, model, config, words)
        export = Export(source, config, model, {}, {}, "")
        write_sums(folder)  # without the card, which is to be edited
        write_card(folder, export, path, fields or CardFields(), use=_readme(config, table))
    return f"for onnxruntime; see {out / 'README.md'}\n{table}"


def _feed(words: Tokenizer, caption: str) -> dict[str, np.ndarray]:
    """A caption as inputs of the text encoder's graph, without padding."""
    ids, mask = words([caption])
    used = mask[0].bool()
    return {"ids": ids[:, used].numpy(), "attention_mask": mask[:, used].numpy()}


def _facts(model: TwoTowers, config: Config) -> dict[str, Any]:
    """What the graphs do not say."""
    scale = model.logit_scale.detach().clamp(0, model.max_logit_scale).exp().item()
    facts: dict[str, Any] = {"opset": OPSET, "scale": scale}
    if model.logit_bias is not None:
        facts["bias"] = model.logit_bias.item()
    facts |= {"width": config.joint.width, "max_tokens": config.text.max_tokens}
    encoder = config.encoder
    facts["modality"] = encoder.modality
    if isinstance(encoder, ImageEncoder):
        return facts | {"resolution": encoder.resolution}
    audio = config.audio
    return facts | {
        "sample_rate_hz": audio.sample_rate_hz,
        "length": audio.length,
        "least_samples": audio.least_samples,
        "most_samples": audio.samples,
        "filling": audio.filling,
    }


def _readme(config: Config, comparison: str) -> str:
    encoder, audio = config.encoder, config.audio
    words: dict[str, object] = {
        "opset": OPSET,
        "modality": encoder.modality,
        "width": config.joint.width,
        "max_tokens": config.text.max_tokens,
        "comparison": comparison,
    }
    channels, frames, bins = encoder.input_shape(config.fusion)
    shape = f"{channels}, {frames}, {bins}"
    if isinstance(encoder, ImageEncoder):
        side = encoder.resolution
        words |= {"what": "images", "file": "dog.jpg", "reads": "pillow", "facts": "the resolution"}
        words["frontend_input"] = f"`pixels` (B, {side}, {side}, 3) uint8, RGB"
        words["length"] = "Images are resized to their shorter side, the middle is cut out."
    else:
        words |= {"what": "sounds", "file": "dog.wav", "reads": "soundfile soxr"}
        words["facts"] = "sample rate and lengths"
        rate, longest_s = audio.sample_rate_hz, audio.samples / audio.sample_rate_hz
        words["frontend_input"] = f"`wave` (1, samples) float32 at {rate} Hz, in [-1, 1]"
        words["length"] = (
            f"Of a sound longer than {longest_s:g} s, `frontend.onnx` takes the middle; to embed "
            "all of it, cut it into such pieces, average their embeddings, and scale that to unit "
            "norm."
        )
        if audio.variable:
            shape = f"1, T, {bins}"
            each = audio.patch_frames
            least = audio.least_samples / rate
            words["length"] += (
                f" Others are taken as long as they are: T is a multiple of {each} up to {frames}; "
                f"one shorter than {least:g} s is filled ({audio.filling})."
            )
        else:
            words["length"] += f" Shorter ones are filled ({audio.filling})."
    words["media"] = f"({'B' if encoder.modality == 'image' else 1}, {shape}) float32"
    words["batch"] = f"(B, {shape})"
    return Template((_HERE / "README.template.md").read_text()).substitute(words)
