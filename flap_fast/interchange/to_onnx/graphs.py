"""Front end and encoders -> ONNX, traced from the modules that train and evaluate.

    frontend   wave (1, samples), of any length -> media (1, 1, T, F), as the encoder takes it
               of images: pixels (B, R, R, 3) uint8 -> media (B, 3, R, R)
    media      media (B, ...) -> embeddings (B, d), unit norm
    text       ids, attention_mask (B, L) -> embeddings (B, d), unit norm

B clips   T frames   F mel bins   L tokens   d joint width   R resolution

Cropping and filling to the encoder's length is in the front end's graph: `crop` and `fill` of
`data.preprocess.waveform` as one gather whose indices follow from the number of samples.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from flap_fast.checks import ConfigError, in_one_line
from flap_fast.config import Config
from flap_fast.data.preprocess.front_end import log_mel
from flap_fast.data.preprocess.image import normalise_image
from flap_fast.data.preprocess.log_mel import normalise, pad_frames
from flap_fast.encoders.settings import ImageEncoder
from flap_fast.encoders.vit.patches import patchify
from flap_fast.model.two_towers import TwoTowers

# The lowest that has DFT with its axis as an input, and Gelu.
OPSET = 20

Dims = dict[int, Any]


class Graph(NamedTuple):
    """A module to trace, with an example of each input and the axes that may have any size."""

    module: nn.Module
    example: dict[str, Tensor]
    dims: dict[str, Dims]
    output: str
    setting: str
    """What chose the module, for errors."""


class SoundFrontEnd(nn.Module):
    """A waveform (1, samples) at the model's rate -> the encoder's input (1, 1, T, F)."""

    def __init__(self, config: Config):
        super().__init__()
        self.audio, self._mel = config.audio, log_mel(config.audio)

    def forward(self, wave: Tensor) -> Tensor:
        audio = self.audio
        mel = self._mel.packed([self._cropped_and_filled(wave[0])])
        if audio.variable:
            rows = audio.padded_frames(mel.shape[0]) - mel.shape[0]
            mel = functional.pad(mel, (0, 0, 0, rows), value=self._mel.silence)
        else:
            mel = pad_frames(mel, audio.frames)
        return normalise(mel, audio)[None, None]

    def _cropped_and_filled(self, wave: Tensor) -> Tensor:
        """The middle of a longer wave, a shorter one filled: `crop` at 0.5, then `fill`."""
        n, least, most = wave.shape[0], self.audio.least_samples, self.audio.samples
        samples = torch.sym_min(torch.sym_max(n, least), most)
        at = torch.arange(samples) + (torch.sym_max(n - samples, 0) + 1) // 2
        held = {"repeatpad": samples // n * n, "pad": n, "repeat": samples}[self.audio.filling]
        # ONNX has the remainder of a tensor by a tensor alone.
        index = at.remainder(torch.scalar_tensor(n, dtype=at.dtype))
        return torch.where(at < torch.sym_max(n, held), wave[index], 0.0)


class ImageFrontEnd(nn.Module):
    """Squares (B, R, R, 3) uint8 -> the encoder's input (B, 3, R, R)."""

    mean: Tensor
    std: Tensor

    def __init__(self, image: ImageEncoder):
        super().__init__()
        self.register_buffer("mean", torch.tensor(image.mean))
        self.register_buffer("std", torch.tensor(image.std))

    def forward(self, pixels: Tensor) -> Tensor:
        return normalise_image(pixels, self.mean, self.std)


class MediaTower(nn.Module):
    """The encoder of sounds or images with its head."""

    def __init__(self, model: TwoTowers):
        super().__init__()
        self.model = model

    def forward(self, media: Tensor) -> Tensor:
        return self.model.embed_media(media)


class TextTower(nn.Module):
    """The text encoder with its head."""

    def __init__(self, model: TwoTowers):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed_text(ids, attention_mask)


def portable_model(model: TwoTowers, config: Config) -> TwoTowers:
    """The same model in float32 by plain operations, with which it can be traced."""
    encoders = {config.encoder.modality: config.encoder.portable(), "text": config.text.portable()}
    train = config.train.model_copy(update={"precision": "fp32"})
    portable = TwoTowers(config.model_copy(update={**encoders, "train": train}), weights=False)
    portable.load_state_dict(model.state_dict())
    return portable.requires_grad_(False).eval()


def graphs(model: TwoTowers, config: Config) -> dict[str, Graph]:
    """The three graphs, by the names of their files.

    Args:
        model: of `portable_model`.
    """
    encoder, batch = config.encoder, torch.export.Dim("batch")
    if isinstance(encoder, ImageEncoder):
        pixels = torch.zeros(2, encoder.resolution, encoder.resolution, 3, dtype=torch.uint8)
        front_end = Graph(
            ImageFrontEnd(encoder), {"pixels": pixels}, {"pixels": {0: batch}}, "media", "image"
        )
        media, dims = front_end.module(pixels), {0: batch}
    else:
        wave = torch.zeros(1, config.audio.samples // 2 + 1)
        front_end = Graph(
            SoundFrontEnd(config),
            {"wave": wave},
            {"wave": {1: torch.export.Dim("samples", min=1)}},
            "media",
            f"audio.mel = {config.audio.mel}",
        )
        media, dims = front_end.module(wave).repeat(2, 1, 1, 1), {0: batch} | _frames(config)
    ids = torch.zeros(2, min(8, config.text.max_tokens), dtype=torch.int64)
    tokens = {0: batch, 1: torch.export.Dim("tokens", min=1, max=config.text.max_tokens)}
    captions = {"ids": ids, "attention_mask": torch.ones_like(ids)}
    tower = Graph(MediaTower(model), {"media": media}, {"media": dims}, "embeddings", encoder.named)
    text = Graph(
        TextTower(model),
        captions,
        dict.fromkeys(captions, tokens),
        "embeddings",
        f"text.encoder = {config.text.encoder}",
    )
    return {"frontend": front_end, encoder.modality: tower, "text": text}


def _frames(config: Config) -> Dims:
    """The axis of time of clips as long as they are: whole patches."""
    audio = config.audio
    if not audio.variable:
        return {}
    each = audio.patch_frames
    least, most = (frames // each for frames in (audio.padded_frames(1), audio.most_frames))
    columns = torch.export.Dim("columns", min=least, max=most)
    return {2: each * columns if each > 1 else columns}


def write_graph(graph: Graph, file: Path) -> None:
    """Trace a module and write it as ONNX.

    Raises:
        ConfigError: it has an operation that PyTorch or ONNX cannot trace.
    """
    names, example = list(graph.example), tuple(graph.example.values())
    try:
        with _quiet(), torch.no_grad():
            traced = torch.export.export(
                graph.module,
                example,
                dynamic_shapes=graph.dims,
                # What holds for any size, but PyTorch cannot tell, is no fault.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if _has(traced.graph_module, _PATCH_EMBED):
                traced = traced.run_decompositions({_PATCH_EMBED: _patch_embed})
            program = torch.onnx.export(
                traced,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=[graph.output],
                external_data=False,
                dynamic_shapes=graph.dims,
                verbose=False,
            )
    except Exception as error:  # of a module that cannot be traced, whatever it meets
        rule, cause = "be one that torch.onnx can trace, for --onnx", error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise ConfigError(f"{graph.setting} must {rule}, got {in_one_line(cause)}") from error
    assert program is not None
    # What the exporter notes of itself names the files of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(file)


def _has(traced: nn.Module, op: Any) -> bool:
    """Whether a traced module or a part of it calls an operation."""
    parts = (part for part in traced.modules() if isinstance(part, GraphModule))
    return any(node.target == op for part in parts for node in part.graph.nodes)


_PATCH_EMBED = torch.ops.flap_kernels.patch_embed.default


def _patch_embed(
    mel: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    position_index: Tensor | None,
    patch: int,
    product: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """The kernel as plain operations; the reference reads its indices to check them."""
    rows = patchify(mel[:, None], patch)
    rows = rows.gather(1, ids_keep[..., None].expand(-1, -1, rows.shape[2]))
    index = ids_keep if position_index is None else position_index
    return functional.linear(rows, weight, bias) + position[index]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what torch.onnx says of packages and axes that do not matter here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.onnx")
            yield
    finally:
        logger.setLevel(before)
