"""The model card: what is known is true, the rest said to be unknown, and no place is in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from flap_fast.config import Config
from flap_fast.config.file import load_config, parse_config
from flap_fast.encoders import ENCODERS
from flap_fast.interchange import card
from flap_fast.interchange.convert import export_checkpoint
from flap_fast.interchange.layout import CardFields
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.section import NAMES_FILES, Section
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.test_cli import flap
from tests.tiny import HTSAT, YAMNET, tiny

FACTS = CardFields("me/clap", "apache-2.0", languages=("en",), datasets=("me/sounds",))


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = (f"data.train={prepared}/train", f"data.val={prepared}/val")
    train(tiny(f"run.folder={folder}", *data, "train.steps=1", "log.tensorboard=false"))
    return folder / "flap"


def card_of(run: Path, out: Path, fields: CardFields) -> tuple[ModelCardData, str]:
    export_checkpoint(run, out, fields)
    read = ModelCard.load(out / "README.md")
    assert isinstance(read.data, ModelCardData)
    return read.data, read.text


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)
    return found


def test_the_card_has_what_the_run_knows(run, tmp_path):
    data, text = card_of(run, tmp_path / "out", FACTS)
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["me/sounds"])
    assert (data.library_name, data.model_name) == ("flap_fast", "clap")
    scores = json.loads((run / "eval.json").read_text())["retrieval"]["val"]
    found = {one.metric_type: one.metric_value for one in data.eval_results or ()}
    assert found["text_to_audio/R@10"] == round(scores["text_to_audio"]["R@10"], 4)
    assert f"Retrieval, val: {scores['clips']} clips, {scores['captions']} captions" in text
    assert f"| this model | {100 * scores['text_to_audio']['R@1']:.2f} |" in text
    assert row(text, "clips") == "24"
    assert row(text, "torch") == torch.__version__.partition("+")[0]
    total = sum(p.numel() for p in load(run, "cpu").model.parameters())
    assert row(text, "whole, with its heads") == f"{total / 1e6:.1f} M parameters"
    assert 'flap_fast.load("hf://me/clap")' in text


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ((), "kaldi's log-mel, 20 to 8000 Hz"),
        (("audio.sample_rate_hz=32000",), "kaldi's log-mel, 20 to 16000 Hz"),
        (HTSAT, "clap's log-mel, 50 to 8000 Hz"),
        (YAMNET, "yamnet's log-mel, 125 to 7500 Hz"),
    ],
)
def test_frequencies_are_those_of_the_front_end(settings, ends):
    (_, text), *_ = card._front_end(tiny(*settings))
    assert text.endswith(ends)


def test_what_is_not_known_is_said_to_be_unknown(run, tmp_path):
    model = shutil.copytree(next((run / "checkpoints").glob("step-*")), tmp_path / "model")
    (model / "state.json").unlink()
    data, text = card_of(model, tmp_path / "out", CardFields())
    assert (data.license, data.datasets, data.eval_results) == (None, None, None)
    assert "## Licence\n\nNot stated." in text
    assert row(text, "data sets") == "not stated"
    assert row(text, "clips") == row(text, "hours") == "not known where this card was written"
    assert "## Scores\n\nNone: the run has no eval.json." in text
    assert "## Environment\n\nNot known where" in text


def test_hours_are_those_of_the_shards_that_were_trained_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "clip_seconds", lambda *_: torch.full((24,), 9000).numpy())
    _, text = card_of(run, tmp_path / "a", CardFields())
    assert row(text, "hours") == "60.0"
    state = next((run / "checkpoints").glob("step-*")) / "state.json"
    other = shutil.copytree(state.parent, tmp_path / "other")
    (other / "state.json").write_text('{"clips": 25}')
    _, text = card_of(other, tmp_path / "c", CardFields())
    assert row(text, "hours").startswith("not known")


def test_the_settings_are_those_that_differ_from_the_defaults(run, tmp_path):
    _, text = card_of(run, tmp_path / "out", CardFields())
    tree = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    trained = load_config(run / "config.yaml")
    assert parse_config(tree) == trained.shareable()
    assert tree["joint"] == {"width": 16}
    assert "decoder" not in tree


@pytest.mark.parametrize("kind", ["flap", "clap"])
def test_no_file_of_an_export_names_a_place_or_an_account(kind, roberta_folder, tmp_path):
    home = tmp_path / "alice-home"
    folder = shutil.copytree(roberta_folder, home / "models/roberta")
    own = (f"text.folder={folder}", f"run.folder={home}/runs", "log.wandb_entity=alice-account")
    data = [f"data.{name}=[{home}/{name}]" for name in ("train", "val", "nli")]
    begun = (f"train.init_from={home}/before", f"loss.distill.teacher={home}/teacher")
    files = (f"eval.relevance={home}/right.csv", f"eval.templates={home}/prompts.txt")
    config = tiny(*(HTSAT if kind == "clap" else ()), *own, *data, *begun, *files)
    model = TwoTowers(config)
    last = config.run_folder / "checkpoints/step-000001"
    save_model(last, config, model, model.state_dict())
    (last / "state.json").write_text('{"step": 1, "clips": 3}')
    (config.run_folder / "eval.json").write_text(json.dumps({"data": {"val": f"{home}/val"}}))
    earlier = {"command": f"flap train {home}/mine.yaml", "host": "alice-laptop"}
    facts = earlier | {
        "outcome": f"OSError: {home}/runs",
        "torch": "2",
        "earlier_sessions": [earlier],
    }
    (config.run_folder / "environment.json").write_text(json.dumps(facts))
    export_checkpoint(config.run_folder, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"alice" not in file.read_bytes(), file
    text = (tmp_path / "out/README.md").read_text()
    assert "roberta (roberta)" in text
    assert row(text, "torch") == "2"
    assert "- train" in text
    assert ("ClapModel.from_pretrained" in text) == (kind == "clap")
    load(tmp_path / "out", "cpu").embed_text(["a dog barks"])


def test_data_sets_of_one_name_are_told_apart_without_the_folders_above(run, tmp_path):
    found = json.loads((run / "eval.json").read_text())
    one, other = "/home/alice/val", "/mnt/clotho/carol/val"
    places = {"alice/val": one, "bob/val": "/srv/bob/val", "carol/val": other, "dan": "/home/dan"}
    places["erin"] = "/Users/erin/{0..7}.tar"
    sets = dict.fromkeys(places, found["retrieval"]["val"])
    model = shutil.copytree(run, tmp_path / "run")
    (model / "eval.json").write_text(json.dumps({"retrieval": sets, "data": places}))
    data, text = card_of(model, tmp_path / "out", CardFields())
    assert re.findall("### Retrieval, ([^:]*):", text) == [
        *("val", "val (2)", "val (Clotho)", "data", "data (2)"),
    ]
    assert {one.dataset_name for one in data.eval_results or ()} >= {"val (2)", "data (2)"}
    assert not re.search("alice|bob|carol|dan[^a-z]|erin", (tmp_path / "out/README.md").read_text())


@pytest.mark.parametrize(
    "home",
    ["~", "~alice", "/home/alice", "/export/home/alice", "/Users/alice", "/root", "s3://alice"],
)
def test_a_home_or_a_bucket_is_not_named(home, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    config = tiny(f"data.train=['{home}', '{home}/a']")
    assert [*map(str, config.shareable().data.train)] == [".", "a"]
    assert row(card._data(config, Path("none"), CardFields()), "trained on") == "data, a"


def paths(section: type[Section], name: str = "") -> Iterator[tuple[str, bool]]:
    """Each setting of a path, and whether it is marked."""
    for field, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from paths(inner, f"{name}{field}.")
        elif "Path" in str(inner):
            yield f"{name}{field}", NAMES_FILES in info.metadata


def test_every_setting_of_a_path_is_marked_as_one():
    arms = [arm for section in ENCODERS.values() for arm in section.values()]
    found = dict(pair for section in (Config, *arms) for pair in paths(section))
    assert {"run.folder", "data.train", "train.init_from", "loss.distill.teacher"} <= set(found)
    assert [name for name, marked in found.items() if not marked] == []


def test_prompts_and_names_of_the_hub_and_of_packages_are_no_places():
    given = ("eval.templates='A {label} in a/b.'", "train.init_from=hf://me/clap")
    config = tiny(*given, "text.folder=package:a/b").shareable()
    assert config.eval.templates == "A {label} in a/b."
    assert str(config.train.init_from) == "hf:/me/clap"
    assert getattr(config.text, "folder", None) == "package:a/b"


def test_an_edited_card_changes_no_checksum(run, tmp_path):
    export_checkpoint(run, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("Mine.")
    load(tmp_path / "out", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--push", "clap"), "--push must be OWNER/NAME"),
        (("--push", "me/clap"), "OUT must be a folder with --push, got '.*a.pt'"),
        (("--private",), "--private must come with --push"),
        (("--license-name", "mine"), "--license must be other with --license-name"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    options, message, monkeypatch, capsys, tmp_path
):
    assert flap("export", "nowhere", tmp_path / "a.pt", *options, monkeypatch=monkeypatch) == 2
    assert re.search(message, capsys.readouterr().err)
