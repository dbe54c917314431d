"""A CLIP on pictures of shapes, from PNGs to scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table
from safetensors.torch import load_file
from typer.testing import CliRunner

import flap_fast
from flap_fast.__main__ import app
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import read_texts
from flap_fast.evaluation.evaluated_model import whole_model
from flap_fast.evaluation.run import score
from flap_fast.evaluation.tables import markdown, terminal
from flap_fast.model.model_folder import load_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from flap_fast.training.checkpoint import latest
from flap_fast.training.loop import train
from flap_fast.training.optimizers import parameter_groups
from flap_fast.training.run_folder import differences
from tests.pictures import COLOURS, SHAPES, draw, write_pictures
from tests.tiny import tiny, tiny_clip

KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of two colours and three shapes, the last 24 for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    manifest = write_pictures(folder / "files", 120, val=24)
    prepare(manifest, folder / "shards", shard_clips=40, show=False)
    return folder / "shards"


def config_of(shards: Path, runs: Path, *overrides: str) -> Config:
    return tiny_clip(
        *(f"data.train={shards}/train", f"data.val={shards}/val", f"run.folder={runs}"),
        *("train.global_batch=24", "optim.lr=3e-3", "sched.warmup_steps=5", "log.every_steps=1"),
        *("log.tensorboard=false", "frontend.backend=torch", *overrides),
    )


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 60 steps; the labels are shapes."""
    config = config_of(shards, tmp_path_factory.mktemp("runs"), "train.steps=60")
    train(config)
    return config


def last_checkpoint(config: Config) -> Path:
    folder = latest(config.run_folder / "checkpoints")
    assert folder is not None
    return folder


def rows(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").open()]


def test_the_loss_falls_towards_what_cannot_be_told_apart(trained):
    """24 pictures of 6 kinds: four share a caption, so ln 4 = 1.39 is the least; ln 24 is 3.18."""
    losses = [row["loss"] for row in rows(trained) if "loss" in row]
    assert np.mean(losses[:5]) > 3.0
    assert 1.39 < np.mean(losses[-10:]) < 2.4


def test_retrieval_is_over_chance_and_speaks_of_images(trained):
    scores = json.loads((trained.run_folder / "eval.json").read_text())
    found = scores["retrieval"]["val"]
    assert "audio" not in json.dumps(found)
    for direction in ("image_to_text", "text_to_image"):
        assert found[direction]["R@5"] > 2 * found["chance"][direction]["R@5"]
    assert "val/image_to_text/R@1" in rows(trained)[-1]
    (table,) = terminal(scores)
    assert isinstance(table, Table)
    assert list(table.columns[1].cells) == ["image to text", "text to image"]
    assert "T-I R@1" in markdown(scores)
    assert "a caption finds its image" in markdown(scores)


def test_zero_shot_tells_shapes_with_the_prompts_of_imagenet(trained):
    model, config = load_model(trained.run_folder)
    evaluated = whole_model(model, config, tokenizer(config.text), Ranks())
    found = score(evaluated, list(trained.data.val), ("zero_shot",))["zero_shot"]["val"]
    assert (found["templates"], found["classes"], found["clips"]) == (80, 3, 24)
    assert found["top_1"] > 0.33


def test_the_embedder_embeds_as_evaluation_does(trained, tmp_path):
    embedder = flap_fast.load(trained.run_folder)
    shards = open_shards(trained.data.val, ("images",))
    files = []
    for clip in range(len(shards)):
        files.append(tmp_path / f"{clip}.png")
        files[-1].write_bytes(shards.encoded(clip))
    model, config = load_model(trained.run_folder)
    evaluated = whole_model(model, config, tokenizer(config.text), Ranks())
    expected = evaluated.clips(shards, read_texts(shards)).media
    torch.testing.assert_close(embedder.embed_image(files, batch=7), expected)
    assert embedder.embed_image([]).shape == (0, 16)
    picture = draw("red", "square", 200)
    cosines = dict(embedder.rank(picture, [f"a {kind}" for kind in KINDS]))
    red = np.mean([cosines[f"a red {shape}"] for shape in SHAPES])
    blue = np.mean([cosines[f"a blue {shape}"] for shape in SHAPES])
    assert red > blue
    best, share = embedder.classify(picture, ["red", "blue"], "a {label} square")[0]
    assert best == "red"
    assert 0.5 < share <= 1


def test_a_model_that_sees_hears_nothing_and_the_other_way_round(trained):
    embedder = flap_fast.load(trained.run_folder)
    with pytest.raises(ConfigError, match=r"audio encoder to embed sounds.*call embed_image"):
        embedder.embed_audio([np.zeros(16_000)])
    with pytest.raises(TypeError, match=r"images must be a list, got one: \['a.png'\]"):
        embedder.embed_image("a.png")
    embedder.config = embedder.config.model_copy(update={"image": None})
    with pytest.raises(ConfigError, match=r"image encoder to embed images.*call embed_audio"):
        embedder.embed_image([])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(shards, tmp_path):
    """BatchNorm's averages and counts too."""
    short = ("train.steps=6", "ckpt.every_steps=3", "ckpt.keep_last=9", "text.dropout=0.1")
    whole = config_of(shards, tmp_path / "whole", *short)
    train(whole)
    parts = config_of(shards, tmp_path / "parts", *short)
    train(parts)
    shutil.rmtree(last_checkpoint(parts))  # as if it had stopped after step 3
    assert last_checkpoint(parts).name.endswith("3")
    train(parts, resume=True)
    a, b = (load_file(last_checkpoint(config) / "model.safetensors") for config in (whole, parts))
    assert a.keys() == b.keys()
    assert a["image.bn1.num_batches_tracked"] == 6
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r.get("loss") for r in rows(whole)] == [r.get("loss") for r in rows(parts)]


def test_micro_batches_train_a_clip_too(shards, tmp_path):
    """BatchNorm sees each micro-batch alone, so the numbers are others; they are finite ones."""
    config = config_of(shards, tmp_path, "train.steps=2", "train.micro_batch=8")
    train(config)
    assert all(np.isfinite(row["loss"]) for row in rows(config) if "loss" in row)


def test_weight_decay_leaves_positions_alone():
    model = TwoTowers(tiny_clip())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = (
        {names[id(p)] for p in group.parameters} for group in parameter_groups(model)
    )
    assert {"image.attnpool.positional_embedding", "text.positional_embedding"} <= others
    assert {"image.conv1.weight", "text.token_embedding.weight", "text_head.weight"} <= decayed
    assert {"image.bn1.weight", "text.ln_final.weight", "logit_scale"} <= others


def test_a_run_cannot_resume_with_the_other_modality():
    """Also where `image` goes away, and its settings with it."""
    there = {name for name, _, _ in differences(tiny(), tiny_clip())}
    back = {name for name, _, _ in differences(tiny_clip(), tiny())}
    assert {"image.resolution", "text.encoder", "mask.kind"} <= there & back


def test_show_refuses_an_encoder_without_a_log_mel(trained):
    found = CliRunner().invoke(app, ["show", str(trained.run_folder / "config.yaml")])
    assert isinstance(found.exception, ConfigError)
    shown = "image.encoder must be one that masks patches of a log-mel"
    assert str(found.exception).startswith(shown)


@pytest.mark.parametrize(
    "arguments", [["plan", "--gpus", "1"], ["profile", "--synthetic", "--no-search", "--steps=1"]]
)
def test_a_run_on_images_is_planned_and_profiled(trained, arguments, monkeypatch):
    monkeypatch.chdir(trained.run_folder)
    command, *options = arguments
    found = CliRunner().invoke(app, [command, str(trained.run_folder / "config.yaml"), *options])
    assert found.exit_code == 0, found.output
    assert "image tower" in found.output


def test_flops_of_an_image_encoder_are_counted(trained, tmp_path):
    out = tmp_path / "scores.json"
    asked = ["eval", str(trained.run_folder), "--tasks", "flops", "--out", str(out)]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    assert "Image encoder, forward pass over 8 images" in found.output
    (row,) = json.loads(out.read_text())["flops"]
    assert (row["kind"], row["kept"], row["modality"]) == ("none", None, "image")
    assert row["gflops"] == row["gflops_fused"] > 0
