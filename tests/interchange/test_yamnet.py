"""YAMNet as ONNX -> an audio encoder: against onnxruntime on the same file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.interchange.convert import import_checkpoint
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import TOWER
from flap_fast.model.two_towers import TwoTowers
from flap_fast.training.loop import train
from tests.tiny import YAMNET, tiny

WIDTH = 32
TABLE = (
    *((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2)),
    *((16, 1), (16, 1), (16, 1), (16, 1), (16, 1), (32, 2), (32, 1)),
)
Store = Callable[[str, np.ndarray], tuple[str, list, list]]


def as_it_is(name: str, weight: np.ndarray) -> tuple[str, list, list]:
    return name, [numpy_helper.from_array(weight, name)], []


def _scales(name: str, weight: np.ndarray) -> tuple[np.ndarray, list]:
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
    return scale, [
        numpy_helper.from_array(scale, f"{name}_scale"),
        numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}_zero"),
    ]


def quantised_here(name: str, weight: np.ndarray) -> tuple[str, list, list]:
    """Qualcomm's: the float weight in the file, quantised and back in the graph."""
    _, stored = _scales(name, weight)
    ends = [f"{name}_scale", f"{name}_zero"]
    nodes = [
        helper.make_node("QuantizeLinear", [name, *ends], [f"{name}_q"], axis=0),
        helper.make_node("DequantizeLinear", [f"{name}_q", *ends], [f"{name}_qdq"], axis=0),
    ]
    return f"{name}_qdq", [numpy_helper.from_array(weight, name), *stored], nodes


def quantised_before(name: str, weight: np.ndarray) -> tuple[str, list, list]:
    """int8 in the file, and a scale of each channel."""
    scale, stored = _scales(name, weight)
    whole = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
    inputs = [f"{name}_q", f"{name}_scale", f"{name}_zero"]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}_d"], axis=0)
    return f"{name}_d", [numpy_helper.from_array(whole, f"{name}_q"), *stored], [node]


def write(file: Path, store: Store = as_it_is, table: tuple = TABLE) -> Path:
    """A narrow YAMNet of random weights: pieces (1, 1, 96, 64) -> their means (1, 32, 1, 1)."""
    random, stored, nodes, x = np.random.default_rng(0), [], [], "audio"

    def convolution(inputs: int, outputs: int, side: int, stride: int, groups: int) -> None:
        nonlocal x
        n = sum(node.op_type == "Conv" for node in nodes)
        shape = outputs, inputs // groups, side, side
        weight = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        name, kept, before = store(f"w{n}", weight.astype(np.float32))
        bias = (0.1 * random.standard_normal(outputs)).astype(np.float32)
        stored.extend([*kept, numpy_helper.from_array(bias, f"b{n}")])
        pads = [0] * 4 if side == 1 else [2 - stride, 2 - stride, 1, 1]
        nodes.extend(before)
        given: dict[str, Any] = {"strides": [stride] * 2, "pads": pads, "group": groups}
        nodes.append(helper.make_node("Conv", [x, name, f"b{n}"], [f"c{n}"], **given))  # type: ignore
        nodes.append(helper.make_node("Relu", [f"c{n}"], [f"r{n}"]))
        x = f"r{n}"

    convolution(1, 1, 3, 2, 1)
    channels = 1
    for outputs, stride in table:
        convolution(channels, channels, 3, stride, channels)
        convolution(channels, outputs, 1, 1, 1)
        channels = outputs
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["out"]))
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)]
        for name, shape in (("audio", (1, 1, 96, 64)), ("out", (1, channels, 1, 1)))
    ]
    graph = helper.make_graph(nodes, "yamnet", ends[0], ends[1], stored)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(file))
    return file


def quantised_around_zero(name: str, weight: np.ndarray) -> tuple[str, list, list]:
    """The same without a zero point, which ONNX takes as 0."""
    found, stored, (node,) = quantised_before(name, weight)
    del node.input[2]
    return found, stored, [node]


@pytest.mark.parametrize(
    ("store", "most"),
    [
        (as_it_is, 1e-5),
        (quantised_here, 0.15),
        (quantised_before, 1e-5),
        (quantised_around_zero, 1e-5),
    ],
)
def test_an_import_gives_what_onnxruntime_gives(store: Store, most: float, tmp_path: Path):
    """Of weights that were quantised in the graph, those before: as near as int8 is."""
    file = write(tmp_path / "m.onnx", store)
    use = import_checkpoint(file, tmp_path / "out")
    assert use == (
        "an audio encoder without a classifier (the classifier must be one Gemm or MatMul behind "
        f"the convolutions, got 'none'); train from it with train.init_audio_from={tmp_path}/out"
    )
    config = load_config(tmp_path / "out/config.yaml")
    assert (config.audio.encoder, config.audio.mel) == ("yamnet", "yamnet")
    settings = f"audio.width={WIDTH}", f"train.init_audio_from={tmp_path}/out"
    encoder: Any = begun(tiny(*YAMNET, "audio.mel_bins=64", *settings)).audio
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for seed in range(3):
        piece = np.random.default_rng(seed).normal(-2, 2, (1, 1, 96, 64)).astype(np.float32)
        wanted: Any = session.run(None, {"audio": piece})[0]
        with torch.no_grad():
            found = encoder(torch.from_numpy(piece)).pooled
        assert np.abs(found.numpy() - wanted[:, :, 0, 0]).max() < most * np.abs(wanted).max()
    if store is quantised_here:  # exactly those of the file that were not quantised
        write(tmp_path / "float.onnx")
        import_checkpoint(tmp_path / "float.onnx", tmp_path / "float")
        ours, float_ = ((tmp_path / n / TOWER).read_bytes() for n in ("out", "float"))
        assert ours == float_


def begun(config: Config) -> TwoTowers:
    model = TwoTowers(config)
    put_first_weights(model, config)
    return model.eval()


def test_a_zip_and_a_folder_with_one_are_read(tmp_path: Path):
    (tmp_path / "package").mkdir()
    write(tmp_path / "m.onnx")
    with zipfile.ZipFile(tmp_path / "package/m.onnx.zip", "w") as archive:
        archive.write(tmp_path / "m.onnx", "inside/m.onnx")
    import_checkpoint(tmp_path / "package", tmp_path / "out")
    assert (tmp_path / "out/SHA256SUMS").is_file()


def test_a_training_begins_from_it(prepared: Path, tmp_path: Path):
    import_checkpoint(write(tmp_path / "m.onnx"), tmp_path / "yamnet")
    data = f"data.train={prepared}/train", f"run.folder={tmp_path}", "log.tensorboard=false"
    settings = (f"audio.width={WIDTH}", "audio.mel_bins=64", "train.steps=1", *data)
    train(tiny(*YAMNET, *settings, f"train.init_audio_from={tmp_path}/yamnet"))
    other = "run.name=other", "audio.width=64", f"train.init_audio_from={tmp_path}/yamnet"
    with pytest.raises(ConfigError, match="audio"):
        train(tiny(*YAMNET, *settings, *other))


def changed(file: Path, out: Path, change: Callable[[Any, list], object]) -> Path:
    """The model with another graph: `change(graph, its convolutions)`."""
    model = onnx.load(file)
    change(model.graph, [node for node in model.graph.node if node.op_type == "Conv"])
    onnx.save(model, str(out))
    return out


def borders(node: Any, name: str, value: object) -> None:
    """Other borders of a convolution."""
    (own,) = [one for one in node.attribute if one.name == "pads"]
    node.attribute.remove(own)
    node.attribute.append(helper.make_attribute(name, value))


def padded_before(graph: Any, convolutions: list) -> None:
    """PyTorch's export of strided convolutions: zeros behind are nodes of their own."""
    ends = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1]), "ends")
    graph.initializer.append(ends)
    for n in (0, 3):
        at = list(graph.node).index(convolutions[n])
        borders(convolutions[n], "pads", [0] * 4)
        pad = helper.make_node("Pad", [convolutions[n].input[0], "ends"], [f"p{n}"])
        convolutions[n].input[0] = f"p{n}"
        graph.node.insert(at, pad)


def mirrored_before(graph: Any, convolutions: list) -> None:
    padded_before(graph, convolutions)
    graph.node[0].attribute.append(helper.make_attribute("mode", "reflect"))


def same_upper(graph: Any, convolutions: list) -> None:
    for node in convolutions:
        borders(node, "auto_pad", "SAME_UPPER")


@pytest.mark.parametrize("change", [same_upper, padded_before])
def test_borders_of_tensorflow_are_read_however_they_are_written(change, tmp_path: Path):
    file = changed(write(tmp_path / "m.onnx"), tmp_path / "changed.onnx", change)
    session, other = (
        onnxruntime.InferenceSession(str(one), providers=["CPUExecutionProvider"])
        for one in (tmp_path / "m.onnx", file)
    )
    piece = {"audio": np.random.default_rng(0).normal(-2, 2, (1, 1, 96, 64)).astype(np.float32)}
    assert np.allclose(session.run(None, piece)[0], other.run(None, piece)[0], atol=1e-5)  # type: ignore
    import_checkpoint(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda graph, found: borders(found[3], "pads", [1, 1, 0, 0]),
            "convolution 3 must have TensorFlow's pads [0, 0, 1, 1], got '[1, 1, 0, 0]'",
        ),
        (
            lambda graph, found: borders(found[0], "pads", [1, 1, 1, 1]),
            "convolution 0 must have TensorFlow's pads [0, 0, 1, 1]",
        ),
        (
            lambda graph, found: borders(found[5], "auto_pad", "VALID"),
            "pads [1, 1, 1, 1], got",
        ),
        (
            lambda graph, found: borders(found[0], "auto_pad", "SAME_LOWER"),
            "convolution 0 must have TensorFlow's pads [0, 0, 1, 1], got '[1, 1, 0, 0]'",
        ),
        (
            lambda graph, found: [setattr(node, "op_type", "QLinearConv") for node in found],
            "m.onnx must hold convolutions as Conv, of floats or between QuantizeLinear and "
            "DequantizeLinear, got 'QLinearConv'; export it as float or in the form QDQ",
        ),
        (
            lambda graph, found: setattr(found[4], "op_type", "ConvInteger"),
            "DequantizeLinear, got 'ConvInteger'; export",
        ),
        (lambda graph, found: [setattr(node, "op_type", "Gemm") for node in found], "got 'Gemm, "),
        (
            mirrored_before,
            "the Pad p0 must add zeros along time and frequency, got '['reflect'] [[",
        ),
        (
            lambda graph, found: found[2].input.__setitem__(1, "audio"),
            "m.onnx: the weight audio must be stored in the file, as it is or quantised, got "
            "'none'; export it with its weights as initializers",
        ),
    ],
)
def test_a_graph_that_would_compute_something_else_is_refused(change, message: str, tmp_path: Path):
    file = write(tmp_path / "m.onnx")
    with pytest.raises(ConfigError) as caught:
        import_checkpoint(changed(file, file, change), tmp_path / "out")
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_zip_with_none_or_several_is_refused(tmp_path: Path):
    for names, got in (((), "none"), (("a.onnx", "in/b.onnx"), "a.onnx, b.onnx")):
        with zipfile.ZipFile(tmp_path / "m.onnx.zip", "w") as archive:
            archive.writestr("readme.txt", "")
            for name in names:
                archive.writestr(name, "")
        with pytest.raises(ConfigError) as caught:
            import_checkpoint(tmp_path / "m.onnx.zip", tmp_path / "out")
        rule = f"m.onnx.zip must hold one .onnx file, got '{got}'; unzip it and name the file"
        assert rule in str(caught.value)


def test_another_encoder_is_refused_at_once(tmp_path: Path):
    file = write(tmp_path / "m.onnx")
    for setting, got in (("audio.encoder=htsat", "htsat"), ("audio.encoder=vit", "vit")):
        with pytest.raises(ConfigError) as caught:
            import_checkpoint(file, tmp_path / "out", [setting])
        rule = f"audio.encoder must be yamnet, whose weights {file} has, got '{got}'; leave it out"
        assert rule == str(caught.value)


def test_what_is_no_yamnet_is_refused(tmp_path: Path):
    (tmp_path / "damaged.onnx").write_bytes(write(tmp_path / "m.onnx").read_bytes()[:500])
    write(tmp_path / "short.onnx", table=TABLE[:-1])
    model = onnx.load(tmp_path / "m.onnx")
    last = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    del last.input[2]
    onnx.save(model, tmp_path / "biasless.onnx")
    bad = next(tensor for tensor in model.graph.initializer if tensor.name == "w3")
    bad.raw_data = bad.raw_data[:-3]
    onnx.save(model, tmp_path / "cut.onnx")
    write(tmp_path / "other.onnx", table=((2, 2), *TABLE[1:]))
    (tmp_path / "two").mkdir()
    for name in "ab":
        write(tmp_path / f"two/{name}.onnx")
    refusals = {
        "damaged.onnx": "damaged.onnx must hold one ONNX model: ",
        "cut.onnx": "cut.onnx must hold one ONNX model: ",
        "biasless.onnx": "missing     audio.blocks.12.pointwise.bias (32,)",
        "short.onnx": "short.onnx must have LAION-CLAP's",
        "other.onnx": "other.onnx: convolution 1 must have strides [1, 1], got '[2, 2]'",
        "two": "two must hold one ONNX model, got 'a.onnx, b.onnx'",
        "none.onnx": "the checkpoint must exist",
        "package:nowhere": "the checkpoint must name an installed package",
    }
    for name, message in refusals.items():
        with pytest.raises(ConfigError) as caught:
            import_checkpoint(Path(name if ":" in name else tmp_path / name), tmp_path / "out")
        assert message in str(caught.value), name
        assert not (tmp_path / "out").exists()
