"""FLAP's own models in the form of a transformers folder; and trainings that begin with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, ClapTextModelWithProjection

from flap_fast.checks import ConfigError
from flap_fast.interchange.convert import export_checkpoint, import_checkpoint
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import load_weights, model_folder, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.test_cli import flap
from tests.tiny import HTSAT, tiny, tiny_clip

DECODER = ("loss.recon.weight=1", "decoder.depth=1", "decoder.width=32")


@pytest.fixture(scope="module")
def trained(roberta_folder: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    begun = "train.init_audio_from=models/of-another-machine"
    config = tiny(f"text.folder={roberta_folder}", begun, *DECODER)
    torch.manual_seed(0)
    model = TwoTowers(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    save_model(folder, config, model, model.state_dict())
    return folder


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_weights(a), load_weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_flap_goes_out_and_in_by_the_command(trained, tmp_path, monkeypatch, capsys):
    assert flap("export", trained, tmp_path / "hf", monkeypatch=monkeypatch) == 0
    assert (
        "a FLAP's folder (its encoder is vit, not htsat); clap_text/ is its text side"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "flap"
    assert flap("import", tmp_path / "hf", tmp_path / "back", monkeypatch=monkeypatch) == 0
    assert "open it with flap_fast.load(" in capsys.readouterr().out
    assert same_weights(trained, tmp_path / "back")
    captions, sound = ["a dog barks", "rain"], torch.linspace(-1, 1, 16_000)
    ours, back = load(trained, "cpu"), load(tmp_path / "back", "cpu")
    text = ours.embed_text(captions)
    assert torch.equal(back.embed_text(captions), text)
    assert torch.equal(back.embed_audio([sound]), ours.embed_audio([sound]))
    assert flap("import", tmp_path / "hf", tmp_path / "back", monkeypatch=monkeypatch) == 2
    assert "OUT must be new" in capsys.readouterr().err

    opened: Any = ClapTextModelWithProjection.from_pretrained(
        tmp_path / "hf/clap_text", output_loading_info=True
    )
    theirs, info = opened
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = AutoTokenizer.from_pretrained(tmp_path / "hf/clap_text")
    with torch.no_grad():
        out = theirs.eval()(**words(captions, return_tensors="pt", padding=True))
    assert (functional.normalize(out.text_embeds, dim=-1) - text).abs().max() <= 1e-5
    assert (text[0] - text[1]).abs().max() > 1e-3  # 1e-5 means something


def test_a_flaps_folder_that_lacks_a_file_is_named(trained, tmp_path):
    export_checkpoint(trained, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"hf must hold model\.safetensors, got 'none'"):
        import_checkpoint(tmp_path / "hf", tmp_path / "x")
    (tmp_path / "hf/config.json").write_text('{"model_type": "flap"}')
    with pytest.raises(ConfigError, match=r"config\.json must hold the model's config, got None"):
        import_checkpoint(tmp_path / "hf", tmp_path / "x")


def test_a_text_encoder_that_clap_lacks_is_reported_as_left_out(tmp_path):
    config = tiny("text.pool=mean")
    model = TwoTowers(config)
    save_model(tmp_path / "ours", config, model, model.state_dict())
    said = export_checkpoint(tmp_path / "ours", tmp_path / "hf")
    assert said.endswith("no clap_text/: its text encoder is no RoBERTa with a pooler")
    assert not (tmp_path / "hf/clap_text").exists()
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert same_weights(tmp_path / "ours", tmp_path / "back")


def test_a_training_begins_with_the_weights_of_a_folder(trained, prepared, tmp_path):
    """Of its own config too, as `flap import` writes it; a decoder is new or left behind."""
    export_checkpoint(trained, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    wanted = load_weights(trained)
    for n, recon in enumerate((0, 1)):
        config = tiny(
            *(f"run.folder={tmp_path}", f"run.name=run{n}", f"data.train={prepared}/train"),
            *(f"text.folder={tmp_path}/back/text", f"train.init_from={tmp_path / 'back'}"),
            *("train.steps=1", "optim.lr=1e-9", "log.tensorboard=false"),
            *(*DECODER, f"loss.recon.weight={recon}"),
        )
        train(config)
        found = load_weights(model_folder(tmp_path / f"run{n}"))
        assert any(name.startswith("decoder.") for name in found) == bool(recon)
        assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    with pytest.raises(ConfigError, match=r"got \(32,\) for audio\..*, which is \(48,\)"):
        train(
            tiny(
                *(f"run.folder={tmp_path}", "run.name=wide", f"data.train={prepared}/train"),
                *(f"text.folder={tmp_path}/back/text", f"train.init_from={tmp_path / 'back'}"),
                "audio.width=48",
            )
        )
    with pytest.raises(ConfigError, match=r"train\.init_audio_from must be left out with train\.i"):
        tiny("train.init_from=a", "train.init_audio_from=b")


@pytest.mark.parametrize("begin", ["init_from", "init_audio_from"])
def test_weights_begin_a_run_only_where_they_mean_the_same(begin: str, tmp_path):
    """Of these, no shape tells; what is no matter of the tower may be another."""

    def put(folder: Path, *overrides: str) -> None:
        config = tiny(*overrides, f"train.{begin}={folder}")
        put_first_weights(TwoTowers(config), config)

    vit, htsat = tmp_path / "vit", tmp_path / "htsat"
    for folder, overrides in ((vit, DECODER), (htsat, HTSAT)):
        config = tiny(*overrides)
        model = TwoTowers(config)
        save_model(folder, config, model, model.state_dict())
    others = ["heads=4", "norm_position=pooled", "pool=cls", "mean=-4.5", "std=3.5"]
    others += ["sample_rate_hz=8000", "int16_roundtrip=true"]
    for other in others:
        rule = f"audio.{other.split('=')[0]}"
        rule = f"{rule} must be .*, as in .*, got .*; set {rule}=.*, or change it in .*config.yaml"
        with pytest.raises(ConfigError, match=rule):
            put(vit, f"audio.{other}")
    for other in ("window_patches=4", "mel_variant=htk_none", "low_hz=60", "high_hz=7000"):
        with pytest.raises(ConfigError, match=f"set audio.{other.split('=')[0]}="):
            put(htsat, *HTSAT, f"audio.{other}")
    with pytest.raises(ConfigError, match=r"decoder\.heads must be 4, .*set decoder\.heads=4"):
        put(vit, *DECODER, "decoder.heads=2")
    put(vit, "audio.mel_variant=htk_none", "audio.low_hz=60")
    put(vit, "decoder.heads=2", "audio.drop_path=0.1", "audio.filling=pad")
    for name, theirs, other in (("heads", "2", "4"), ("pool", "pooler", "cls")):
        if begin == "init_audio_from":
            put(vit, f"text.{name}={other}")
        else:
            with pytest.raises(ConfigError, match=f"set text.{name}={theirs}, or"):
                put(vit, f"text.{name}={other}")


@pytest.mark.parametrize("begin", ["init_from", "init_audio_from"])
def test_what_is_refused_of_first_weights_can_be_set(begin: str, tmp_path):
    """The encoder is named before what follows from it, and a remedy is YAML."""
    folders = {name: tmp_path / name for name in ("vit", "htsat", "clip")}
    configs = {"vit": tiny(), "htsat": tiny(*HTSAT), "clip": tiny_clip()}
    for name, config in configs.items():
        model = TwoTowers(config)
        save_model(folders[name], config, model, model.state_dict())
    grey = tiny_clip("image.mean=[0.5,0.5,0.5]")
    for name, config, message in (
        ("htsat", configs["vit"], r"audio\.encoder must be htsat, .* set audio\.encoder=htsat"),
        ("vit", configs["htsat"], r"audio\.encoder must be vit, .* set audio\.encoder=vit"),
        (
            "clip",
            configs["vit"],
            "hold an audio encoder, .* not an image encoder, got '.*clip'",
        ),
        (
            "vit",
            configs["clip"],
            "hold an image encoder, .* not an audio encoder, got '.*vit'",
        ),
        ("clip", grey, r"set image\.mean=\[0\.48145466, 0\.4578275, 0\.40821073\]"),
    ):
        ours = config.train.model_copy(update={begin: folders[name]})
        with pytest.raises(ConfigError, match=message):
            put_first_weights(TwoTowers(config), config.model_copy(update={"train": ours}))
