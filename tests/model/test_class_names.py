"""joint.class_names: what the audio encoder's classifier says, by the names of its classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn.functional import normalize

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Joint
from flap_fast.data.batch import PackedMels
from flap_fast.data.tokenize import tokenizer
from flap_fast.interchange.convert import import_checkpoint
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.heads import ClassNamesHead
from flap_fast.model.model_folder import TOWER, load_weights, model_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tensors import load_tensors
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.interchange.test_yamnet import WIDTH, as_it_is, changed, quantised_here, write
from tests.sounds import noise
from tests.tiny import YAMNET_NAMED, tiny
from tests.training.stopping import train_stopped_after

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


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    import_checkpoint(package(folder / "package"), folder / "yamnet")
    return folder / "yamnet"


def settings(imported: Path, *overrides: str) -> Config:
    more = f"audio.width={WIDTH}", "audio.mel_bins=64", f"train.init_audio_from={imported}"
    return tiny(*YAMNET_NAMED, *more, *overrides)


def begun(config: Config) -> TwoTowers:
    torch.manual_seed(0)
    model = TwoTowers(config)
    put_first_weights(model, config)
    return model.eval()


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
    wanted = np.concatenate(
        [session.run(["scores"], {"audio": piece[None]})[0] for piece in pieces]
    )
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


def test_the_head_adds_the_classes_mean_to_its_own_vector():
    joint = Joint(width=3, hidden=4, class_names=0.5, text_head="none")
    torch.manual_seed(0)
    head, scores = ClassNamesHead(8, 2, joint), torch.tensor([[0.9, 0.1], [0.0, 0.4]])
    vector = torch.randn(2, 6)
    with torch.no_grad():
        head.class_names.copy_(torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]))
        own = head[2](head[0](vector).relu())
        found = head(torch.cat([vector, scores], 1))
    named = torch.tensor([[2.7, 0.4, 0], [0, 1.6, 0]])
    assert torch.allclose(found, normalize(own, dim=1) + 0.5 * normalize(named, dim=1), atol=1e-6)


def test_a_run_begins_with_what_the_text_encoder_makes_of_the_names(imported: Path):
    model = begun(settings(imported))
    assert isinstance(model.head, ClassNamesHead)
    with torch.no_grad():
        wanted = [model.embed_text(*tokenizer(settings(imported).text)([name])) for name in NAMES]
    assert torch.allclose(model.head.class_names, torch.cat(wanted), atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    stored = load_tensors(imported / TOWER)["audio.classifier.weight"]
    assert torch.equal(model.get_parameter("audio.classifier.weight"), stored)


def test_a_run_without_them_is_as_before(imported: Path, tmp_path: Path):
    import_checkpoint(write(tmp_path / "m.onnx"), tmp_path / "plain")
    config = settings(imported, "joint.class_names=0")
    ours = begun(config).state_dict()
    theirs = begun(settings(tmp_path / "plain", "joint.class_names=0")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_a_run_trains_resumes_and_opens_without_the_import(
    freeze: str, imported: Path, prepared: Path, tmp_path: Path
):
    (tmp_path / "yamnet").symlink_to(imported)

    def config(run: str) -> Config:
        return settings(
            tmp_path / "yamnet",
            *(f"audio.freeze={freeze}", f"run.folder={tmp_path}", f"run.name={run}"),
            *(f"data.train={prepared}/train", f"data.val={prepared}/val", "train.steps=3"),
            *("log.every_steps=1", "ckpt.every_steps=2", "log.tensorboard=false"),
            *("sched.warmup_steps=1", "optim.lr=1e-2"),
        )

    train(config("whole"))
    train_stopped_after(2, config("parts"))
    train(config("parts"), resume=True)
    ours, theirs = (load_weights(model_folder(tmp_path / run)) for run in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first = begun(config("first")).state_dict()
    moved = {name for name in ours if not torch.allclose(ours[name], first[name], atol=1e-4)}
    assert "audio_head.class_names" in moved
    assert ("audio.classifier.weight" in moved) == (freeze == "false")

    os.unlink(tmp_path / "yamnet")
    model = load(tmp_path / "whole", "cpu")
    waves = [noise(n, seconds, 16_000) for n, seconds in enumerate((0.1, 1.5, 5.0))]
    found = model.embed_audio(waves)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5)
    for n, wave in enumerate(waves):
        assert torch.allclose(model.embed_audio([wave])[0], found[n], atol=1e-5)


def test_what_cannot_have_them_is_refused(imported: Path, prepared: Path, tmp_path: Path):
    bare = package(tmp_path / "bare", names=())
    assert import_checkpoint(bare, tmp_path / "plain").startswith("an audio encoder; train")
    assert not any("classifier" in name for name in load_tensors(tmp_path / "plain" / TOWER))
    package(tmp_path / "wrong", names=NAMES[:4])
    refusals = {
        "the class map of": lambda: import_checkpoint(tmp_path / "wrong", tmp_path / "out"),
        "joint.class_names must be 0 with audio.encoder = vit, which cannot classify, got 0.5; "
        "set joint.class_names=0": lambda: tiny("joint.class_names=0.5", "joint.text_head=none"),
        "joint.class_names must be 0 unless joint.text_head = none, in whose space": lambda: tiny(
            *YAMNET_NAMED, "joint.text_head=encoder"
        ),
        "joint.class_names must be 0 where no weights bring a classifier and its classes' names, "
        "got 0.5; set train.init_audio_from: see flap import": lambda: begun(tiny(*YAMNET_NAMED)),
        f"joint.class_names must be 0 with {tmp_path}/plain, which names no classes: it has no "
        "classes.txt": lambda: begun(settings(tmp_path / "plain")),
        "got (5,) for audio.classifier.bias, which is (6,) here": lambda: begun(
            settings(imported, "audio.classes=6")
        ),
    }
    for message, act in refusals.items():
        with pytest.raises(ConfigError) as caught:
            act()
        assert message in str(caught.value)
