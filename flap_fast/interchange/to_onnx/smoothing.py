"""Scales between norms and products, so that rounding to int8 loses less; the function stays.

    y = x W = (x / s) (diag(s) W)
    s[k] = sqrt(max_n |x[n, k]| / max_d |W[k, d]|)

x (N, K) tokens after a layer norm   W (K, D), of all products that read x

A few channels of a text encoder are ten times as large as the others, in every token: they decide
a token's range, and the others are rounded by their step. The square root gives half of that
range to the weights. x is seen on a few captions; others have only another range, as rows of x are
rounded by what they hold.

Source: Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4 with alpha = 0.5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]
from onnxruntime import InferenceSession  # pyright: ignore[reportMissingImports]

Feed = dict[str, np.ndarray]

# A channel, or a row of weights, of zeros: any scale will do.
_LEAST = 1e-5


def smoothed(source: Path, feeds: Sequence[Feed]) -> Any:
    """A graph whose layer norms' outputs are scaled for the products that read them.

    Args:
        feeds: examples of the graph's inputs, without padding.
    """
    model: Any = onnx.load(source)
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    read = Counter(name for node in graph.node for name in node.input)
    norms = {node.output[0] for node in graph.node if node.op_type == "LayerNormalization"}
    products: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[0] in norms:
            x, weight = node.input
            if weight in weights and read[weight] == 1:
                products.setdefault(x, []).append(node)
    largest = _largest(source, list(products), feeds)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        x = node.output[0]
        if x not in products:
            continue
        W = {n.input[1]: numpy_helper.to_array(weights[n.input[1]]) for n in products[x]}
        rows = np.max([np.abs(value).max(1) for value in W.values()], 0)
        s = np.sqrt(np.maximum(largest[x], _LEAST) / np.maximum(rows, _LEAST))
        for name, value in W.items():
            weights[name].CopyFrom(numpy_helper.from_array(value * s[:, None], name))
        graph.initializer.append(numpy_helper.from_array(1 / s, f"{x}.scale"))
        nodes.append(helper.make_node("Mul", [x, f"{x}.scale"], [f"{x}.scaled"]))
        for product in products[x]:
            product.input[0] = f"{x}.scaled"
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _largest(source: Path, names: list[str], feeds: Sequence[Feed]) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel of some of a graph's tensors, (K,) each."""
    # Weights above 2 GB lie in a file beside it, which is found from the same folder only.
    model: Any = onnx.load(source, load_external_data=False)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    file = source.with_suffix(".norms.onnx")
    try:
        onnx.save(model, file)
        session: Any = InferenceSession(file)
        found = [session.run(names, feed) for feed in feeds] if names else []
    finally:
        file.unlink(missing_ok=True)
    return {
        name: np.max([np.abs(x[n]).reshape(-1, x[n].shape[-1]).max(0) for x in found], 0)
        for n, name in enumerate(names)
    }
