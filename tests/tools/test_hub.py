"""Models on the Hugging Face Hub: huggingface_hub's own client against a stand-in on loopback."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.hub import local_folder, push_folder
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import load
from tests.sounds import encode, tone
from tests.test_cli import flap
from tests.tiny import tiny
from tests.tools.hub import TOKEN, Hub, serving

CAPTIONS = ["a dog barks", "rain on a roof"]
SOUND = torch.linspace(-1, 1, 16_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = tiny()
    torch.manual_seed(0)
    towers = TwoTowers(config)
    save_model(folder, config, towers, towers.state_dict())
    (folder / "optimizer.safetensors").write_bytes(b"which nobody needs to open it")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def same_answers(path: str | Path, model: Path) -> bool:
    theirs, ours = load(path, "cpu"), load(model, "cpu")
    return torch.equal(theirs.embed_text(CAPTIONS), ours.embed_text(CAPTIONS)) and torch.equal(
        theirs.embed_audio([SOUND]), ours.embed_audio([SOUND])
    )


def test_a_pushed_folder_is_opened_with_the_same_bits(hub, logged_in, model):
    assert push_folder(model, "me/clap", private=True) == f"{hub.url}/me/clap"
    assert hub.repos["me/clap"].private
    assert same_answers("hf://me/clap", model)
    assert "model.safetensors" in hub.sent
    assert "optimizer.safetensors" not in hub.sent


def test_an_export_is_pushed_with_its_card(hub, logged_in, model, tmp_path, monkeypatch, capsys):
    options = ("--push", "me/clap", "--private", "--license", "mit")
    assert flap("export", model, tmp_path / "out", *options, monkeypatch=monkeypatch) == 0
    assert f"{hub.url}/me/clap: open it with flap_fast.load('hf://me/clap')" in (
        capsys.readouterr().out
    )
    repo = hub.repos["me/clap"]
    assert repo.private
    assert b"license: mit\n" in repo.commits[repo.refs["main"]]["README.md"]
    assert same_answers("hf://me/clap", model)
    assert "README.md" not in hub.sent


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model, tmp_path):
    repo = hub.put("me/clap", model)
    repo.refs["v1"] = first = repo.refs["main"]
    other = shutil.copytree(model, tmp_path / "other")
    config = tiny("run.seed=1")
    towers = TwoTowers(config)
    save_model(other, config, towers, towers.state_dict())
    repo.commit({"model.safetensors": (other / "model.safetensors").read_bytes()})
    repo.commit({name: (other / name).read_bytes() for name in ("config.yaml", "SHA256SUMS")})
    assert same_answers("hf://me/clap", other)
    assert same_answers("hf://me/clap@v1", model)
    assert same_answers(f"hf://me/clap@{first}", model)
    with pytest.raises(ConfigError, match=r"hf://me/clap@v2 must name a branch, .* leave @REV"):
        load("hf://me/clap@v2")


def test_files_of_the_hub_are_checked_as_those_of_a_folder(hub, model):
    changed = (model / "config.yaml").read_bytes().replace(b"max_scale: 100", b"max_scale: 90")
    assert changed != (model / "config.yaml").read_bytes()
    hub.put("me/clap", model).commit({"config.yaml": changed})
    with pytest.raises(ConfigError, match=r"config\.yaml must be the file that SHA256SUMS lists"):
        load("hf://me/clap", "cpu")
    load("hf://me/clap", "cpu", verify=False)


@pytest.mark.parametrize(
    ("facts", "name", "message"),
    [
        ({}, "hf://me/none", r"hf://me/none must be a repository that exists .* got 401; check"),
        ({"private": True}, "hf://me/clap", r"must be a repository that exists .* hf auth login$"),
        (
            {"gated": True},
            "hf://me/clap",
            r"whose conditions you accepted, .* at \S*/me/clap, then",
        ),
        ({}, "hf://clap", r"must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION, got 'hf://clap'"),
        ({}, "hf://me/a b", r"must be hf://OWNER/NAME or .*, got 'hf://me/a b'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_its_remedy(hub, model, facts, name, message):
    hub.put("me/clap", model, **facts)
    with pytest.raises(ConfigError, match=message) as error:
        load(name, "cpu")
    assert "\n" not in str(error.value)


def test_with_a_token_a_private_or_gated_model_opens(hub, logged_in, model):
    hub.put("me/clap", model, private=True, gated=True)
    assert same_answers("hf://me/clap", model)
    with pytest.raises(ConfigError, match="that you have access to, got 404"):
        load("hf://me/none", "cpu")


def test_without_a_connection_the_cache_serves(hub, model, monkeypatch):
    from huggingface_hub import constants

    hub.put("me/clap", model)
    cached = local_folder("hf://me/clap")
    hub.down = 503
    assert local_folder("hf://me/clap") == cached
    with pytest.raises(ConfigError, match="hf://me/b cannot be reached: the Hub answered 503; try"):
        local_folder("hf://me/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("hf://me/clap") == cached
    with pytest.raises(ConfigError, match="hf://me/b must be in the cache where HF_HUB_OFFLINE is"):
        local_folder("hf://me/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ConfigError, match=r"hf://me/b cannot be reached: .*refused; check the con"):
        local_folder("hf://me/b")


def test_what_cannot_be_pushed_is_named_with_what_to_do_then(hub, model, monkeypatch, tmp_path):
    again = re.escape(f"then upload {model}, which is complete, with: hf upload me/clap {model}")
    with pytest.raises(ConfigError, match=f"that your token has access to, got 401; .*; {again}"):
        push_folder(model, "me/clap", private=False)
    with pytest.raises(ConfigError, match="--push must be OWNER/NAME on the Hub, got 'clap'"):
        push_folder(model, "clap", private=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(model, tmp_path / "folder")
    (folder / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(ConfigError, match=r'is refused by the Hub: .*"license" must be one of'):
        push_folder(folder, "me/clap", private=False)
    assert hub.repos["me/clap"].commits == {}


def test_commands_take_a_model_of_the_hub(hub, model, prepared, tmp_path, monkeypatch, capsys):
    hub.put("me/clap", model)
    (tmp_path / "tone.wav").write_bytes(encode(tone(440, 0.5, 16_000), 16_000, "WAV"))
    said = []
    for name in ("hf://me/clap", model):
        assert flap("rank", name, tmp_path / "tone.wav", *CAPTIONS, monkeypatch=monkeypatch) == 0
        said.append(capsys.readouterr().out)
        options = ("--labels", "dog,rain", "--model", name)
        assert flap("classify", tmp_path / "tone.wav", *options, monkeypatch=monkeypatch) == 0
        said.append(capsys.readouterr().out)
        out = ("--out", tmp_path / f"{len(said)}.json")
        assert flap("eval", name, prepared / "val", *out, monkeypatch=monkeypatch) == 0
        said.append(capsys.readouterr().out.replace(f"{len(said) - 1}.json", ""))
    assert said[:2] == said[3:5]
    assert (tmp_path / "2.json").read_bytes() == (tmp_path / "5.json").read_bytes()


def test_a_run_begins_with_the_weights_of_a_model_of_the_hub(hub, model):
    hub.put("me/clap", model)
    for name in ("init_from", "init_audio_from"):
        config = tiny(f"train.{name}=hf://me/clap", "run.seed=1")
        begun = TwoTowers(config)
        put_first_weights(begun, config)
        own = begun.get_parameter("audio.patch_embed.weight")
        assert torch.equal(own, load(model, "cpu").model.get_parameter("audio.patch_embed.weight"))
