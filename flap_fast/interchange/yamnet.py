"""Layout of YAMNet as ONNX: an audio encoder, and a classifier where its classes have names.

    Conv 0                 audio.stem
    Conv 1 + 2 n, 2 + 2 n  audio.blocks.n.depthwise, .pointwise
    Gemm, MatMul           audio.classifier
    *class_map*.csv        the names of its classes

A quantised export (of the form QDQ) is read as what was quantised, where its file still holds that.

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
from flap_fast.interchange.yamnet_classes import check_classifier, class_names, classifier

_BLOCKS = 13
_QDQ = ("QuantizeLinear", "DequantizeLinear")
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
    """The layers of an ONNX model, `.weight` and `.bias`: `conv.N` in their order, `classifier`.

    Without a classifier `metadata` says why, under that name.

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
    inside = [file]
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(work / "onnx")
            inside = sorted((work / "onnx").rglob("*.onnx"))
            names = ", ".join(one.name for one in inside) or "none"
            remedy = "unzip it and name the file"
            require(len(inside) == 1, str(file), "hold one .onnx file", names, remedy)
        graph = onnx.load(str(inside[0])).graph
        weights = _Weights(graph, file, onnx.numpy_helper.to_array)
        convolutions = _convolutions(graph, file, weights)
        try:
            return Saved(convolutions | classifier(graph, weights), "", {})
        except ConfigError as error:
            return Saved(convolutions, "", {"classifier": str(error)})
    except ConfigError:
        raise
    except Exception as error:  # onnx raises what protobuf does, and its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{file} must hold one ONNX model: {reason}") from None


def _convolutions(graph: Any, file: Path, weights: _Weights) -> Tensors:
    kinds = list(dict.fromkeys(node.op_type for node in graph.node))
    other = [kind for kind in kinds if "Conv" in kind and kind != "Conv"]  # QLinearConv and such
    rule = "hold convolutions as Conv, of floats or between QuantizeLinear and DequantizeLinear"
    got, remedy = ", ".join(other or kinds), "export it as float or in the form QDQ"
    require("Conv" in kinds and not other, str(file), rule, got, remedy)
    tensors: Tensors = {}
    for n, node in enumerate(node for node in graph.node if node.op_type == "Conv"):
        what, stride = f"{file}: convolution {n}", 2 if n in _HALVED else 1
        strides = next((list(a.ints) for a in node.attribute if a.name == "strides"), [1, 1])
        require(strides == [stride] * 2, what, f"have strides {[stride] * 2}", strides)
        side = 3 if n == 0 or n % 2 else 1
        wanted = [side // 2 * (2 - stride)] * 2 + [side // 2] * 2
        rule, found = f"have TensorFlow's pads {wanted}", weights.pads(node, side, stride)
        remedy = "export a model with these, whose weights were trained with them"
        require(found == wanted, what, rule, found, remedy)
        for name, value in zip(("weight", "bias"), node.input[1:], strict=False):
            tensors[f"conv.{n}.{name}"] = torch.from_numpy(weights(value).copy())
    return tensors


class _Weights:
    """A graph's weights, as they were before they were quantised."""

    def __init__(self, graph: Any, file: Path, to_array: Any):
        self._file = file
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._made = {name: node for node in graph.node for name in node.output}
        self._to_array = to_array

    def __call__(self, name: str) -> np.ndarray:
        if name in self._stored:
            return self._to_array(self._stored[name])
        node = self._made.get(name)
        require(
            node is not None and node.op_type in _QDQ,
            f"{self._file}: the weight {name}",
            "be stored in the file, as it is or quantised",
            node.op_type if node is not None else "none",
            "export it with its weights as initializers",
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

    def has(self, name: str) -> bool:
        """Whether a value is stored in the file, as it is or quantised."""
        node = self._made.get(name)
        if node is not None and node.op_type in _QDQ:
            return self.has(node.input[0])
        return name in self._stored

    def pads(self, node: Any, side: int, stride: int) -> list[int]:
        """Zeros around a convolution's input, of even sides: before both, then behind both.

        Its own, and those of a node Pad in front of it.
        """
        given = {a.name: a for a in node.attribute}
        own = list(given["pads"].ints) if "pads" in given else [0] * 4
        mode = given["auto_pad"].s.decode() if "auto_pad" in given else "NOTSET"
        if mode.startswith("SAME"):
            less, more = (side - stride) // 2, (side - stride + 1) // 2
            own = [less] * 2 + [more] * 2 if mode == "SAME_UPPER" else [more] * 2 + [less] * 2
        elif mode == "VALID":
            own = [0] * 4
        return [a + b for a, b in zip(own, self._pads_before(node), strict=True)]

    def _pads_before(self, node: Any) -> list[int]:
        before = self._made.get(node.input[0])
        while before is not None and before.op_type in _QDQ:
            before = self._made.get(before.input[0])
        if before is None or before.op_type != "Pad":
            return [0] * 4
        pads, value, axes = (*before.input[1:], *[""] * 3)[:3]
        modes = [a.s.decode() for a in before.attribute if a.name == "mode"]
        zeros = modes in ([], ["constant"]) and not (value and self(value).any())
        rows = self(pads).reshape(2, -1).tolist() if pads else []
        zeros = zeros and not axes and [row[:2] for row in rows] == [[0, 0]] * 2
        rule, remedy = "add zeros along time and frequency", "export it with pads in the Conv"
        require(zeros, f"{self._file}: the Pad {before.output[0]}", rule, f"{modes} {rows}", remedy)
        return [*rows[0][2:], *rows[1][2:]]


def _is_yamnet(source: Source) -> bool:
    convolutions = {f"conv.{n}.weight" for n in range(1 + 2 * _BLOCKS)}
    weights = {name for name in source.tensors if name.endswith(".weight")}
    return convolutions == weights - {"classifier.weight"}


def _read(source: Source) -> Imported:
    names = ["stem"]
    for block in range(_BLOCKS):
        names += [f"blocks.{block}.depthwise", f"blocks.{block}.pointwise"]
    convolutions: Tensors = {}
    layer = {n: v for n, v in source.tensors.items() if n.startswith("classifier.")}
    for name, value in source.tensors.items():
        if name not in layer:
            _, number, part = name.split(".")
            convolutions[f"audio.{names[int(number)]}.{part}"] = value
    encoder = load_config(None, ["audio.encoder=yamnet", *source.overrides]).encoder.encoder
    rule = f"be yamnet, whose weights {source.path} has"
    require(encoder == "yamnet", "audio.encoder", rule, encoder, "leave it out")
    width = len(convolutions[f"audio.blocks.{_BLOCKS - 1}.pointwise.weight"])
    settings, classes = ["audio.encoder=yamnet", f"audio.width={width}"], []
    assert source.saved is not None
    why_not = source.saved.metadata.get("classifier", "")
    if layer:
        folder = source.path if source.path.is_dir() else source.path.parent
        try:
            classes = class_names(folder, "the classifier")
            check_classifier(layer, width, len(classes))
            settings.append(f"audio.classes={len(classes)}")
        except ConfigError as error:
            why_not, layer, classes = str(error), {}, []
    return Imported(
        load_config(None, [*settings, *source.overrides]),
        convolutions,
        encoder_only=True,
        classifier={f"audio.{name}": value for name, value in layer.items()},
        class_names=classes,
        why_no_classifier=why_not,
    )


YAMNET = Layout(names="YAMNet's (conv.0, conv.1)", form="file", matches=_is_yamnet, read=_read)
