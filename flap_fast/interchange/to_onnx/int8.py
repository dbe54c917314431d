"""An ONNX file -> the same with int8 weights; activations are rounded as they come (dynamic int8).

    y = x W                 W (K, D) known, x (..., K)
    W[k, d] ~ s[d] w[k, d]                w int8, a scale for each column
    x[n, k] ~ t[n] (q[n, k] - z[n])       q uint8, a scale and a zero point for each row
    y[n, d] ~ t[n] s[d] (sum_k q[n, k] w[k, d] - z[n] sum_k w[k, d])

A row is a token: its rounding depends on nothing else in its batch, so that a clip has the same
vector whichever it comes with, and one large token costs no other its precision. `quantize_dynamic`
of onnxruntime has one scale for the whole tensor (its numbers: bench/LOG.md).

Tables of embeddings are rounded by rows. Small ones (positions, types), convolutions, and products
of the heads' few rows, stay in float32. `smoothing` prepares a graph for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

from flap_fast.interchange.to_onnx.smoothing import Feed, smoothed

# Which input of a product or a table the weights are.
_KNOWN_INPUT = {"MatMul": 1, "Gather": 0}
_LEVELS = 255  # of uint8
# Tables with fewer rows are small, and their rounding is in every token.
_TABLE_ROWS = 1024
# The range of a row of zeros: any will do.
_LEAST_RANGE = 1e-30


def write_int8(source: Path, file: Path, feeds: Sequence[Feed] = ()) -> None:
    """Write a graph with int8 weights where a product or a table has known ones.

    Args:
        feeds: examples of the graph's inputs, to smooth its norms' outputs first.
    """
    model: Any = smoothed(source, feeds) if feeds else onnx.load(source)
    rewriter = _Rewriter(model.graph)
    nodes = [new for node in model.graph.node for new in rewriter.nodes_of(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    unread = rewriter.replaced - {name for node in nodes for name in node.input}
    kept = [weight for name, weight in rewriter.weights.items() if name not in unread]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, file)


class _Rewriter:
    """Gives the nodes that replace a node, and collects the weights that they read."""

    def __init__(self, graph: Any):
        self.weights = {weight.name: weight for weight in graph.initializer}
        self.replaced: set[str] = set()
        self._rounded: set[str] = set()
        self._add("int8.axis", np.array([-1], np.int64))
        self._add("int8.zero", np.array(0, np.float32))
        self._add("int8.levels", np.array(_LEVELS, np.float32))
        self._add("int8.least", np.array(_LEAST_RANGE, np.float32))

    def nodes_of(self, node: Any) -> Iterator[Any]:
        """The node itself, or those of the same product or table in int8."""
        at = _KNOWN_INPUT.get(node.op_type)
        known = None if at is None else self.weights.get(node.input[at])
        other_axis = any(a.name == "axis" and a.i != 0 for a in node.attribute)
        if known is None or len(known.dims) != 2 or known.data_type != TensorProto.FLOAT:
            yield node
        elif node.op_type == "MatMul":
            self.replaced.add(known.name)
            yield from self._row_scales(node.input[0], known.dims[0])
            yield from self._product(node, known)
        elif other_axis or known.dims[0] < _TABLE_ROWS:
            yield node
        else:
            self.replaced.add(known.name)
            yield from self._table(node, known)

    def _row_scales(self, x: str, K: int) -> Iterator[Any]:
        """x -> q, with t and z: (..., 1), once for all products of x."""
        if x in self._rounded:
            return
        self._rounded.add(x)
        self._add(f"int8.rows_of_{K}", np.array([-1, K], np.int64))
        q = f"{x}.int8"
        for name, reduce, keep in (("high", "ReduceMax", "Max"), ("low", "ReduceMin", "Min")):
            yield _node(reduce, [x, "int8.axis"], f"{q}.{name}est", keepdims=1)
            yield _node(keep, [f"{q}.{name}est", "int8.zero"], f"{q}.{name}")
        # t = (high - low) / 255,  z = round(-low / t)
        yield _node("Sub", [f"{q}.high", f"{q}.low"], f"{q}.range")
        yield _node("Max", [f"{q}.range", "int8.least"], f"{q}.some_range")
        yield _node("Div", [f"{q}.some_range", "int8.levels"], f"{q}.scale")
        yield _node("Div", [f"{q}.low", f"{q}.scale"], f"{q}.low_level")
        yield _node("Neg", [f"{q}.low_level"], f"{q}.level")
        yield _node("Round", [f"{q}.level"], f"{q}.point")
        # q = round(x / t) + z, row by row
        yield _node("Cast", [f"{q}.point"], f"{q}.point_u8", to=TensorProto.UINT8)
        yield _node("Reshape", [f"{q}.point_u8", "int8.axis"], f"{q}.points")
        yield _node("Reshape", [f"{q}.scale", "int8.axis"], f"{q}.scales")
        yield _node("Reshape", [x, f"int8.rows_of_{K}"], f"{q}.rows")
        inputs = [f"{q}.rows", f"{q}.scales", f"{q}.points"]
        yield _node("QuantizeLinear", inputs, f"{q}.levels", axis=0)
        yield _node("Shape", [x], f"{q}.shape")
        yield _node("Reshape", [f"{q}.levels", f"{q}.shape"], q)

    def _product(self, node: Any, known: Any) -> Iterator[Any]:
        """Y = t s (q w - z sum(w))."""
        q, y = f"{node.input[0]}.int8", node.output[0]
        w, s = _rounded(numpy_helper.to_array(known), axis=0)
        weight, scale, sums = (f"{known.name}.{part}" for part in ("int8", "scale", "sums"))
        self._add(weight, w)
        self._add(scale, s[0])
        self._add(sums, w.sum(0, dtype=np.int64).astype(np.float32))
        yield _node("MatMulInteger", [q, weight], f"{y}.sum_int32")
        yield _node("Cast", [f"{y}.sum_int32"], f"{y}.sum", to=TensorProto.FLOAT)
        yield _node("Mul", [f"{q}.point", sums], f"{y}.offset")
        yield _node("Sub", [f"{y}.sum", f"{y}.offset"], f"{y}.levels")
        yield _node("Mul", [f"{y}.levels", f"{q}.scale"], f"{y}.scaled")
        yield _node("Mul", [f"{y}.scaled", scale], y)

    def _table(self, node: Any, known: Any) -> Iterator[Any]:
        """Rows of a table (V, D), each with a scale."""
        w, s = _rounded(numpy_helper.to_array(known), axis=1)
        y, index = node.output[0], node.input[1]
        self._add(f"{known.name}.int8", w)
        self._add(f"{known.name}.scale", s)
        yield _node("Gather", [f"{known.name}.int8", index], f"{y}.levels")
        yield _node("Cast", [f"{y}.levels"], f"{y}.floats", to=TensorProto.FLOAT)
        yield _node("Gather", [f"{known.name}.scale", index], f"{y}.scale")
        yield _node("Mul", [f"{y}.floats", f"{y}.scale"], y)

    def _add(self, name: str, value: np.ndarray) -> None:
        self.weights[name] = numpy_helper.from_array(value, name)


def _rounded(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Int8 in [-127, 127] and its float32 scales along an axis; a column of zeros has scale 1."""
    scale = np.abs(weight).max(axis, keepdims=True) / 127
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=f"int8.{output}", **attributes)
