"""Rounding an ONNX file to int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flap_fast.interchange.to_onnx.int8 import write_int8
from flap_fast.interchange.to_onnx.smoothing import smoothed
from tests.interchange.test_onnx import session_of


def test_int8_is_its_formula(tmp_path: Path):
    """Each row with a scale and a zero point of its own, zeros exact, each column with a scale."""
    draw = np.random.default_rng(0)
    weight, table = draw.standard_normal((8, 5)), draw.standard_normal((1024, 8))
    table[0] = 0
    table[1] *= 1000
    known = [
        numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in (("weight", weight), ("table", table))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "index"], ["x"]),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        known,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, tmp_path / "a.onnx")
    write_int8(tmp_path / "a.onnx", tmp_path / "b.onnx")
    index = np.array([3, 0, 1])
    (found,) = session_of(tmp_path / "b.onnx").run(None, {"index": index})

    def rounded(value: np.ndarray, axis: int) -> np.ndarray:
        scale = np.abs(value).max(axis, keepdims=True) / 127
        scale[scale == 0] = 1
        return np.rint(value / scale) * scale

    x = rounded(table, 1)[index]
    low, high = x.min(1, keepdims=True).clip(max=0), x.max(1, keepdims=True).clip(min=0)
    step = np.maximum(high - low, 1e-30) / 255
    point = np.rint(-low / step)
    levels = (np.rint(x / step) + point).clip(0, 255)
    assert np.allclose(found, (levels - point) * step @ rounded(weight, 0), rtol=1e-5, atol=1e-6)
    assert (found[1] == 0).all()
    assert np.abs(found - table[index] @ weight)[2].max() > 1e-2  # it is rounded at all


def test_norms_with_large_channels_are_scaled_before_they_are_rounded(tmp_path: Path):
    """The same function in float32, and an int8 file that is nearer to it, on unseen inputs too."""
    draw = np.random.default_rng(0)
    gain, weight = np.ones(64), draw.standard_normal((64, 16))
    gain[5] = 100
    weight[5] /= 100  # as trained: it counts no more than the others
    known = [
        numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in (("gain", gain), ("shift", np.zeros(64)), ("weight", weight))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["normed"]),
            helper.make_node("MatMul", ["normed", "weight"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        known,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    source = tmp_path / "a.onnx"
    onnx.save(made, source)
    seen, x = ({"x": draw.standard_normal((32, 64)).astype(np.float32)} for _ in range(2))
    onnx.save(smoothed(source, [seen]), tmp_path / "smooth.onnx")
    write_int8(source, tmp_path / "plain.onnx")
    write_int8(source, tmp_path / "int8.onnx", [seen])
    assert len(list(tmp_path.iterdir())) == 4  # and nothing else is left
    (wanted,) = session_of(source).run(None, x)
    error = {
        name: np.abs(session_of(tmp_path / f"{name}.onnx").run(None, x)[0] - wanted).max()
        for name in ("smooth", "plain", "int8")
    }
    assert error["smooth"] < 1e-4
    assert error["int8"] < 0.2 * error["plain"]
