"""joint.class_names: what the audio encoder's classifier says, by the names of its classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Joint
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import embed
from flap_fast.interchange.convert import import_checkpoint
from flap_fast.model.heads import ClassNamesHead
from flap_fast.model.model_folder import CLASSES, TOWER, load_weights, model_folder
from flap_fast.ranks import Ranks
from flap_fast.tensors import load_tensors
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.interchange.test_yamnet import WIDTH, write
from tests.interchange.test_yamnet_classes import NAMES, begun, package, settings
from tests.sounds import noise
from tests.tiny import YAMNET_NAMED, tiny
from tests.training.stopping import train_stopped_after


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    import_checkpoint(package(folder / "package"), folder / "yamnet")
    return folder / "yamnet"


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
    import_checkpoint(package(tmp_path / "bare", names=()), tmp_path / "plain")
    data = f"run.folder={tmp_path}", f"data.train={prepared}/train", "train.steps=0"
    for name, weight in (("named", 0.5), ("unnamed", 0)):
        more = f"run.name={name}", f"joint.class_names={weight}", "log.tensorboard=false"
        train(settings(imported, *data, *more))
    first = "train.init_audio_from=null", f"train.init_from={tmp_path}"
    vit = "joint.class_names=0.5", "joint.text_head=none"
    headed = *YAMNET_NAMED, "joint.text_head=encoder"
    named, unnamed = ((f"{first[1]}/{run}", first[0]) for run in ("named", "unnamed"))
    refusals: list[tuple[str, Callable[[], object]]] = [
        (
            "must be 0 with audio.encoder = vit, which cannot classify, got 0.5; set joint.class_n",
            lambda: tiny(*vit),
        ),
        (
            "must be 0 unless joint.text_head = none, in whose space names have embeddings from "
            "the start, got 0.5; set joint.class_names=0",
            lambda: tiny(*headed),
        ),
        (
            "must be 0 where no weights bring a classifier and its classes' names, got 0.5; set "
            "train.init_audio_from: see flap import",
            lambda: begun(tiny(*YAMNET_NAMED)),
        ),
        (
            f"must be 0 with {tmp_path}/plain, which names no classes: it has no classes.txt, got "
            "0.5; import it again, from a model with a classifier and its class map",
            lambda: begun(settings(tmp_path / "plain")),
        ),
        (
            "which names no classes: it has no classes.txt, got 0.5; train.init_from=",
            lambda: begun(settings(tmp_path / "named")),
        ),
        (
            f"audio.classes must be 5, as in {imported}/classes.txt, got 6; set audio.classes=5",
            lambda: begun(settings(imported, "audio.classes=6")),
        ),
        ("must be 0, as in", lambda: begun(settings(imported, *unnamed))),
        (
            "got 0.0; set joint.class_names=0.5",
            lambda: begun(settings(imported, *named, "joint.class_names=0")),
        ),
    ]
    for message, act in refusals:
        with pytest.raises(ConfigError) as caught:
            act()
        assert message in str(caught.value), message
    (tmp_path / "plain" / CLASSES).write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"plain/classes.txt must be UTF-8: .* import it again"):
        begun(settings(tmp_path / "plain", "ckpt.verify=false"))
    # With both the same, a run begins with the other's embeddings.
    begun(settings(imported, *named, "joint.class_names=0.3"))


def test_the_text_encoder_begins_as_without_them(imported: Path):
    named, plain = (begun(settings(imported, f"joint.class_names={n}")) for n in (0.5, 0))
    for name, value in plain.text.state_dict().items():
        assert torch.equal(named.text.state_dict()[name], value), name


def test_probes_take_the_encoders_vector_without_the_scores(imported: Path, prepared: Path):
    pooled = []
    shards = open_shards([prepared / "val"])
    for weight in (0.5, 0):
        of = settings(imported, f"joint.class_names={weight}")
        found = embed(begun(of), of, tokenizer(of.text), shards, Ranks(), pooled=True)
        pooled.append(found.pooled)
    assert pooled[0].shape[1] == WIDTH
    assert torch.equal(*pooled)
