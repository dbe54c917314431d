"""The classifier of a YAMNet as ONNX, and its classes' names: read, or left out and said."""

from __future__ import annotations

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
from flap_fast.data.batch import PackedMels
from flap_fast.interchange.convert import import_checkpoint
from flap_fast.interchange.yamnet_classes import class_names
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import CLASSES, TOWER
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tensors import load_tensors
from tests.interchange.test_yamnet import WIDTH, as_it_is, changed, quantised_here, write
from tests.tiny import YAMNET_NAMED, tiny


def settings(imported: Path, *overrides: str) -> Config:
    """Those of a model that begins with an import."""
    more = f"audio.width={WIDTH}", "audio.mel_bins=64", f"train.init_audio_from={imported}"
    return tiny(*YAMNET_NAMED, *more, *overrides)


def begun(config: Config) -> TwoTowers:
    torch.manual_seed(0)
    model = TwoTowers(config)
    put_first_weights(model, config)
    return model.eval()


NAMES = "Speech", "Dog bark, howl", "Rain on a roof", "Bell", "Silence"


def with_classifier(graph: Any, kind: str, store: Any = as_it_is) -> None:
    """Behind the mean of the cells five classes, as Gemm (either way round) or MatMul and Add."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((5, WIDTH, 1, 1)).astype(np.float32)
    bias = random.standard_normal(5).astype(np.float32)
    if kind == "transB":
        name, kept, before = store("w", weight)
        for tensor in kept:
            if tensor.name == "w":
                tensor.CopyFrom(numpy_helper.from_array(weight[:, :, 0, 0], "w"))
    else:
        turned = numpy_helper.from_array(weight[:, :, 0, 0].T.copy(), "w")
        name, kept, before = "w", [turned], []
    graph.initializer.extend([*kept, numpy_helper.from_array(bias, "bias")])
    graph.node.extend([helper.make_node("Flatten", ["out"], ["flat"]), *before])
    if kind == "MatMul":
        graph.node.append(helper.make_node("MatMul", ["flat", name], ["product"]))
        graph.node.append(helper.make_node("Add", ["bias", "product"], ["logits"]))
    else:
        given = {"transB": 1} if kind == "transB" else {}
        node = helper.make_node("Gemm", ["flat", name, "bias"], ["logits"], **given)  # type: ignore[arg-type]
        graph.node.append(node)
    graph.node.append(helper.make_node("Sigmoid", ["logits"], ["scores"]))
    graph.output.append(helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, (1, 5)))


def package(folder: Path, kind: str = "transB", store: Any = as_it_is, names=NAMES) -> Path:
    """A folder with an ONNX YAMNet and the map of its classes; names=() writes none."""
    folder.mkdir()
    file = write(folder / "m.onnx", store)
    changed(file, file, lambda graph, _: with_classifier(graph, kind, store))
    if names:
        rows = "".join(f'{n},/m/0{n},"{name}"\n' for n, name in enumerate(names))
        (folder / "class_map.csv").write_text("index,mid,display_name\n" + rows)
    return folder


@pytest.mark.parametrize("kind", ["transB", "Gemm", "MatMul", "quantised"])
def test_scores_are_those_of_onnxruntime(kind: str, tmp_path: Path):
    kind, store = ("transB", quantised_here) if kind == "quantised" else (kind, as_it_is)
    folder = package(tmp_path / "package", kind, store)
    use = import_checkpoint(folder, tmp_path / "out")
    assert use.startswith("an audio encoder and its 5 classes; train from it with train.init_")
    encoder: Any = begun(settings(tmp_path / "out")).audio
    session = onnxruntime.InferenceSession(
        str(folder / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(0)
    pieces = random.normal(-2, 2, (3, 1, 96, 64)).astype(np.float32)
    scored: list[Any] = [session.run(["scores"], {"audio": piece[None]})[0] for piece in pieces]
    wanted = np.concatenate(scored)
    with torch.no_grad():
        found = encoder(torch.from_numpy(pieces)).pooled
        assert encoder.width == found.shape[1] == WIDTH + 5
        most = 0.1 if store is quantised_here else 1e-5
        assert np.abs(found[:, WIDTH:].numpy() - wanted).max() < most
        assert wanted.std() > 0.1
        # A clip of 3 and of 1 pieces: the mean of its pieces' scores, packed or not.
        rows = torch.from_numpy(random.normal(-2, 2, (1, 1, 192, 64)).astype(np.float32))
        three, one = encoder(rows).pooled, found[:1]
        mel = torch.cat([torch.from_numpy(pieces[0, 0]), rows[0, 0]])
        assert torch.allclose(
            encoder(PackedMels(mel, (96, 192), (1, 0))).pooled, torch.cat([three, one]), atol=1e-6
        )
        alone = [encoder(rows[:, :, n : n + 96]).pooled for n in (0, 48, 96)]
        assert torch.allclose(three, torch.stack(alone).mean(0), atol=1e-6)


def odd(change: Callable[[Any, Any], object]) -> Callable[[Any, list], object]:
    """A change of the node that classifies."""
    return lambda graph, _: change(
        graph, next(node for node in graph.node if node.op_type == "Gemm")
    )


def weight_of(graph: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(one for one in graph.initializer if one.name == "w")
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), "w"))


def behind(graph: Any, kind: str) -> None:
    """One more layer between the logits and the sigmoid."""
    at = next(n for n, node in enumerate(graph.node) if node.op_type == "Sigmoid")
    graph.node[at].input[0] = "more"
    graph.node.insert(at, helper.make_node(kind, ["logits", "bias"], ["more"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda g, n: n.attribute.append(helper.make_attribute("alpha", 0.5)),
            "alone, as YAMNet's is, got 'alpha'",
        ),
        (
            lambda g, n: behind(g, "Div"),
            "be that layer and a sigmoid alone, as YAMNet's is, got 'Div'",
        ),
        (
            lambda g, n: behind(g, "MatMul"),
            "be one Gemm or MatMul behind the convolutions, got 'Gemm, MatMul'",
        ),
        (lambda g, n: n.input.pop(), "have a weight and a bias that the file stores, got 'w'"),
        (lambda g, n: n.input.__setitem__(1, "flat"), "that the file stores, got 'bias'"),
        (
            lambda g, n: weight_of(g, lambda w: w[:, :7]),
            "map 32 numbers to the 5 classes of the class map, got 'weight (5, 7), bias (5,)'",
        ),
        (
            lambda g, n: weight_of(g, lambda w: w * np.nan),
            "have finite weights, got 'infinite ones or NaN'",
        ),
    ],
)
def test_what_scores_in_another_way_is_left_out_and_said(change, reason: str, tmp_path: Path):
    folder = package(tmp_path / "package")
    changed(folder / "m.onnx", folder / "m.onnx", odd(change))
    use = import_checkpoint(folder, tmp_path / "out")
    assert use.startswith("an audio encoder without a classifier (the classifier must ")
    assert reason in use
    assert not any("classifier" in name for name in load_tensors(tmp_path / "out" / TOWER))
    assert not (tmp_path / "out" / CLASSES).exists()


HEADER = "index,mid,display_name\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\ufeff" + HEADER + "1,b,A bell\n0,a,Dog\n", ["Dog", "A bell"]),
        (HEADER + '0,a,"Dog\nbarks\u2028twice"\n1,b,Dog\n', ["Dog barks twice", "Dog"]),
        (HEADER + "0,a,\n", None),
        (HEADER + "0,a,Dog\n1,b\n", None),
        (HEADER + "0,a,Dog\n2,b,Cat\n", None),
        (HEADER + "0,a,Dog\n0,b,Cat\n", None),
        (HEADER, None),
        ("", None),
        ("0,a,Dog\n", None),
        (HEADER.replace(",", ";") + "0;a;Dog\n", None),
        ((HEADER + "0,a,Dog\n").encode("utf-16"), None),
    ],
)
def test_a_class_map_is_read_by_its_indices_or_named(text, names, tmp_path: Path):
    file = tmp_path / "my_class_map.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if names:
        assert class_names(tmp_path, "--tagger") == names
        (tmp_path / "b_class_map.csv").touch()
        rule = "--tagger must have one .*, got 'b_class_map.csv, my_class_map.csv'"
    else:
        rule = "--tagger must have a class map in UTF-8 with the columns index .*my_class_map.csv'"
    with pytest.raises(ConfigError, match=rule):
        class_names(tmp_path, "--tagger")


def test_names_go_through_a_folder_and_back(tmp_path: Path):
    names = "Dog\nbark", "Caf\u00e9", "Rain\u2028on \x85 a roof", "Bell", "Bell"
    import_checkpoint(package(tmp_path / "package", names=names), tmp_path / "out")
    begun(settings(tmp_path / "out"))
    found = (tmp_path / "out" / CLASSES).read_bytes().decode().split("\n")
    assert found == ["Dog bark", "Caf\u00e9", "Rain on a roof", "Bell", "Bell", ""]
