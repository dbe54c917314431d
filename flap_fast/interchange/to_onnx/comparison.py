"""An exported folder, run by onnxruntime, compared with PyTorch on sounds or images by formula."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from onnxruntime import InferenceSession  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config
from flap_fast.data.batch import PackedMels, lay_end_to_end
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import crop_and_fill
from flap_fast.data.tokenize import Tokenizer
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks

# Least cosine of a float32 file's embedding with PyTorch's; less is another model.
LEAST = 0.9999
# What int8 should hold.
LEAST_INT8 = 0.99
# How far a norm may be from 1.
_UNIT = 1e-2
# In parts of the longest clip: shorter than a patch, odd, as long, cropped.
_LENGTHS = (0.011, 0.217, 0.5, 0.873, 1.0, 1.391)
_CAPTIONS = (
    *("a dog barks", "rain falls on a tin roof", "A steady tone of 440 hertz.", "drums"),
    "someone speaks in a large hall while a door closes slowly in the distance",
    *("a piano, forte", "birds sing", "A low hum is followed by two short beeps!"),
)


class Difference(NamedTuple):
    """How far a file's output is from PyTorch's."""

    name: str
    largest: float
    """Largest absolute difference of a number."""
    cosine: float | None
    """Least cosine of an embedding; None of a front end."""
    megabytes: float


def compare(folder: Path, model: TwoTowers, config: Config, tokenizer: Tokenizer) -> str:
    """The table of differences, one line for each file.

    Raises:
        ConfigError: a float32 file embeds otherwise than PyTorch, or PyTorch to no unit vectors.
    """
    found = list(_differences(folder, model, config, tokenizer))
    lines = [f"{'':20}  largest difference  least cosine      MB"]
    for name, largest, cosine, megabytes in found:
        shown = f"{cosine:.6f}" if cosine is not None else ""
        low = cosine is not None and cosine < LEAST_INT8
        note = f"  below {LEAST_INT8}: take the float32 file" if low and ".int8" in name else ""
        lines.append(f"{name:20}  {largest:18.1e}  {shown:>12}  {megabytes:6.1f}{note}")
        if cosine is not None and ".int8" not in name and not cosine >= LEAST:
            rule = f"embed as PyTorch does, with a cosine of at least {LEAST}"
            remedy = "report it: the export is at fault"
            raise ConfigError(f"{name} must {rule}, got {cosine:.6f}; {remedy}")
    return "\n".join(lines)


@torch.no_grad()
def _differences(
    folder: Path, model: TwoTowers, config: Config, tokenizer: Tokenizer
) -> Iterator[Difference]:
    modality = config.encoder.modality
    name, examples = _examples(config)
    preprocessor = make_preprocessor(config, Ranks(device=torch.device("cpu")))
    front_end, media, ours = _session(folder / "frontend.onnx"), [], []
    apart = 0.0
    for example in examples:
        (found,) = front_end.run(None, {name: example})
        clip = example if modality == "image" else _clip(example, config)
        wanted = preprocessor.finish(lay_end_to_end([clip[0]], np.zeros(1))).media
        ours.append(model.embed_media(wanted))
        rows = wanted.mel[None, None] if isinstance(wanted, PackedMels) else wanted
        apart = max(apart, float(np.abs(found - rows.numpy()).max()))
        media.append({"media": found})
    yield Difference("frontend.onnx", apart, None, _megabytes(folder, "frontend.onnx"))
    ids, mask = tokenizer(_CAPTIONS)
    used = mask.any(0)  # ours are padded to a multiple of 8, which may be more than max_tokens
    captions = {"ids": ids[:, used].numpy(), "attention_mask": mask[:, used].numpy()}
    text = model.embed_text(ids, mask)
    for tower, wanted, inputs in ((modality, torch.cat(ours), media), ("text", text, [captions])):
        norms = wanted.norm(dim=1)
        norm = float(norms[(norms - 1).abs().argmax()])  # NaN, or 0 of what overflowed
        rule, remedy = "be unit vectors", "take an earlier checkpoint: its weights are too large"
        require(abs(norm - 1) < _UNIT, f"{tower} embeddings of PyTorch", rule, norm, remedy)
        for end in (".onnx", ".int8.onnx"):
            session = _session(folder / f"{tower}{end}")
            found = np.concatenate([session.run(None, some)[0] for some in inputs])
            yield _difference(f"{tower}{end}", found, wanted, folder)


def _difference(name: str, found: np.ndarray, wanted: Tensor, folder: Path) -> Difference:
    a, b = found.astype(np.float64), wanted.double().numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return Difference(name, np.abs(a - b).max(), float(cosines.min()), _megabytes(folder, name))


def _examples(config: Config) -> tuple[str, list[np.ndarray]]:
    """The front end's input, and some of it: decaying tones in noise, or coloured gradients."""
    draw = np.random.default_rng(0)
    if isinstance(config.encoder, ImageEncoder):
        side = config.encoder.resolution
        corners = draw.integers(0, 256, (4, 2, 2, 3), np.uint8)
        squares = (Image.fromarray(some).resize((side, side)) for some in corners)
        return "pixels", [np.asarray(square)[None] for square in squares]
    rate, longest = config.audio.sample_rate_hz, config.audio.samples
    waves = []
    for n, part in enumerate(_LENGTHS):
        t = np.arange(round(part * longest)) / rate
        tones = sum(np.sin(2 * np.pi * 110 * 1.5**n * k * t) / k for k in (1, 2, 3))
        wave = 0.2 * np.exp(-t) * tones + draw.normal(0, 10.0 ** -(n % 4 + 1) / 2, len(t))
        waves.append(wave.clip(-1, 1).astype(np.float32)[None])
    return "wave", waves


def _clip(wave: np.ndarray, config: Config) -> np.ndarray:
    """(1, samples) as the package's own preprocessing crops and fills it, from the middle."""
    return crop_and_fill(wave[0], 0.5, config.audio)[None]


def _session(file: Path) -> Any:
    """An onnxruntime session; of its type, an output may be much else than an array."""
    return InferenceSession(file)


def _megabytes(folder: Path, name: str) -> float:
    """Of a file, with the file of weights that one above 2 GB has beside it."""
    return sum(part.stat().st_size for part in folder.glob(f"{name}*")) / 1e6
