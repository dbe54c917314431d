"""Layout of YAMNet as ONNX: an audio encoder, its classifier left out.

    Conv 0                 audio.stem
    Conv 1 + 2 n, 2 + 2 n  audio.blocks.n.depthwise, .pointwise

A quantised export is read as what was quantised, where its file still holds that.

Source: Google's YAMNet; Qualcomm's exports of it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_fast.checks import ConfigError, require
from flap_fast.config.file import load_config
from flap_fast.interchange.layout import Imported, Layout, Source
from flap_fast.interchange.tensors import Saved, Tensors

_BLOCKS = 13
_HALVED = {0, 3, 7, 11, 23}  # the convolutions with a stride of 2


def onnx_file(path: Path) -> Path | None:
    """The ONNX model that a path is, or that a folder holds; zipped or not.

    Raises:
        ConfigError: a folder holds several.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if file.name.endswith((".onnx", ".onnx.zip"))]
    names = ", ".join(file.name for file in found)
    require(len(found) < 2, str(path), "hold one ONNX model", names, "name one of them")
    return found[0] if found else None


def read_onnx(file: Path, work: Path) -> Saved:
    """The convolutions of an ONNX model in their order: `conv.N.weight`, `conv.N.bias`.

    Args:
        work: a folder to unpack into.

    Raises:
        ConfigError: onnx is not installed, or the file holds no such model.
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{file} must be read by the package onnx, which is not installed; pip install onnx"
        ) from None
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(work / "onnx")
            (file,) = sorted((work / "onnx").rglob("*.onnx"))
        graph = onnx.load(str(file)).graph
        return Saved(_convolutions(graph, file, onnx.numpy_helper.to_array), "", {})
    except ConfigError:
        raise
    except Exception as error:  # onnx raises what protobuf does, and its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{file} must hold one ONNX model: {reason}") from None


def _convolutions(graph: Any, file: Path, to_array: Any) -> Tensors:
    weights = _Weights(graph, to_array)
    tensors: Tensors = {}
    for n, node in enumerate(node for node in graph.node if node.op_type == "Conv"):
        strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1, 1])
        wanted = [2, 2] if n in _HALVED else [1, 1]
        require(strides == wanted, f"{file}: convolution {n}", f"have strides {wanted}", strides)
        for name, value in zip(("weight", "bias"), node.input[1:], strict=False):
            tensors[f"conv.{n}.{name}"] = torch.from_numpy(weights(value).copy())
    return tensors


class _Weights:
    """A graph's weights, as they were before they were quantised."""

    def __init__(self, graph: Any, to_array: Any):
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._made = {name: node for node in graph.node for name in node.output}
        self._to_array = to_array

    def __call__(self, name: str) -> np.ndarray:
        if name in self._stored:
            return self._to_array(self._stored[name])
        node = self._made.get(name)
        require(
            node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"),
            f"the weight {name}",
            "be stored in the file, as it is or quantised",
            node.op_type if node is not None else "none",
        )
        assert node is not None
        value = self(node.input[0])
        if node.op_type == "QuantizeLinear" or value.dtype.kind == "f":
            return value
        scale, *zeros = (self(name) for name in node.input[1:3] if name)
        zero = zeros[0] if zeros else np.zeros_like(scale)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if n == axis % value.ndim else 1 for n in range(value.ndim)]
        wide = value.astype(np.float32) - zero.reshape(shape if zero.ndim else ())
        return wide * scale.reshape(shape if scale.ndim else ())


def _is_yamnet(source: Source) -> bool:
    convolutions = {f"conv.{n}.weight" for n in range(1 + 2 * _BLOCKS)}
    return convolutions == {n for n in source.tensors if n.endswith(".weight")}


def _read(source: Source) -> Imported:
    names = ["stem"]
    for block in range(_BLOCKS):
        names += [f"blocks.{block}.depthwise", f"blocks.{block}.pointwise"]
    ours: Tensors = {}
    for name, value in source.tensors.items():
        _, number, part = name.split(".")
        ours[f"audio.{names[int(number)]}.{part}"] = value
    width = len(ours[f"audio.blocks.{_BLOCKS - 1}.pointwise.weight"])
    settings = ["audio.encoder=yamnet", f"audio.width={width}", *source.overrides]
    return Imported(load_config(None, settings), ours, encoder_only=True)


YAMNET = Layout(names="YAMNet's (conv.0, conv.1)", form="file", matches=_is_yamnet, read=_read)
