"""The classifier of a YAMNet as ONNX, and its classes' names.

    last Conv -> mean of the cells -> Gemm, or MatMul and Add -> Sigmoid, or none
    *class_map*.csv     index,mid,display_name

What computes scores in another way is refused.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flap_fast.checks import ConfigError, require
from flap_fast.interchange.tensors import Tensors

_LINEAR = ("Gemm", "MatMul")
# What changes no score's value, or is read here.
_KNOWN = {
    *("Conv", "Relu", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze"),
    *("Transpose", "Identity", "Dropout", "Cast", "Constant", "QuantizeLinear", "DequantizeLinear"),
    *(*_LINEAR, "Add", "Sigmoid"),
}
_NAME = "the classifier"


def classifier(graph: Any, weights: Any) -> Tensors:
    """The linear layer behind the convolutions: `classifier.weight` (C, D), `.bias` (C,).

    Args:
        weights: gives a stored value by its name, and tells by `has` whether it is stored.

    Raises:
        ConfigError: there is none, several, or more than that.
    """
    last = max(n for n, node in enumerate(graph.node) if node.op_type == "Conv")
    behind = list(graph.node)[last:]
    linear = [node for node in behind if node.op_type in _LINEAR]
    found = ", ".join(node.op_type for node in linear) or "none"
    require(len(linear) == 1, _NAME, "be one Gemm or MatMul behind the convolutions", found)
    (node,) = linear
    sums = [add for add in behind if add.op_type == "Add"]
    values = [*node.input[1:], *(n for add in sums for n in add.input if n != node.output[0])]
    given = {a.name: a.f for a in node.attribute if a.name in ("alpha", "beta")}
    other = {n.op_type for n in behind} - _KNOWN | {n for n, value in given.items() if value != 1}
    rule = "be that layer and a sigmoid alone, as YAMNet's is"
    require(not other, _NAME, rule, ", ".join(sorted(other)))
    stored = [name for name in values if weights.has(name)]
    rule = "have a weight and a bias that the file stores"
    require(len(stored) == len(values) == 2, _NAME, rule, ", ".join(stored) or "none")
    weight, bias = map(weights, values)
    if not any(a.name == "transB" and a.i for a in node.attribute):
        weight = weight.T
    layer = {"weight": weight, "bias": bias.reshape(-1)}
    return {
        f"classifier.{name}": torch.from_numpy(value.astype(np.float32))
        for name, value in layer.items()
    }


def check_classifier(tensors: Tensors, width: int, classes: int) -> None:
    """Raise `ConfigError` unless a classifier takes vectors of `width` and scores `classes`."""
    weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
    shapes = tuple(weight.shape), tuple(bias.shape)
    rule = f"map {width} numbers to the {classes} classes of the class map"
    fits = shapes == ((classes, width), (classes,))
    require(fits, _NAME, rule, f"weight {shapes[0]}, bias {shapes[1]}")
    finite = bool(weight.isfinite().all() and bias.isfinite().all())
    require(finite, _NAME, "have finite weights", "infinite ones or NaN")


def class_names(folder: Path, name: str) -> list[str]:
    """The display names in the `*class_map*.csv` of a folder, in the order of their indices.

    Args:
        name: of the folder in errors.

    Raises:
        ConfigError: there is none, several, or it cannot be read.
    """
    files = sorted(folder.glob("*class_map*.csv"))
    found = ", ".join(file.name for file in files) or "none"
    rule = "have one *class_map*.csv next to its model"
    require(len(files) == 1, name, f"{rule}, in {folder}", found)
    rule = "have a class map in UTF-8 with the columns index (0, 1, ...) and display_name"
    try:
        with files[0].open(newline="", encoding="utf-8-sig") as lines:
            rows = [(int(row["index"]), row["display_name"]) for row in csv.DictReader(lines)]
        names = {index: " ".join(text.split()) for index, text in rows}
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name} must {rule}, got '{files[0]}': {reason}") from None
    whole = sorted(names) == list(range(len(rows))) and all(names.values())
    require(whole and bool(rows), name, rule, files[0])
    return [names[index] for index in range(len(rows))]
