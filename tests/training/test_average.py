"""A moving average of the weights: what is scored, saved and opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flap_fast.checks import ConfigError
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.run import evaluate
from flap_fast.model.model_folder import load_model, load_weights
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.loop import train
from tests.tiny import tiny
from tests.training.stopping import train_stopped_after


def small(data: Path, runs: Path, *overrides: str):
    return tiny(
        *(f"run.folder={runs}", f"data.train={data}/train", f"data.val={data}/val"),
        *("audio.depth=1", "text.depth=1", "frontend.backend=torch", "log.tensorboard=false"),
        *("train.steps=5", "sched.warmup_steps=0", "optim.lr=1e-2", "train.ema_decay=0.3"),
        *("ckpt.every_steps=1", "ckpt.keep_last=9", "eval.every_steps=0", *overrides),
    )


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small(prepared, tmp_path_factory.mktemp("average"))
    train(config)
    return config.run_folder


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:06d}"


def test_a_checkpoint_holds_the_average_of_the_weights_of_all_steps(
    run: Path, prepared: Path, tmp_path: Path
):
    config = small(prepared, tmp_path)
    torch.manual_seed(config.run.seed)
    average = dict(TwoTowers(config).named_parameters())
    trained = {}
    for step in range(1, 6):
        decay = min(0.3, (1 + step) / (10 + step))
        trained = load_file(checkpoint(run, step) / "trained.safetensors")
        average = {n: decay * a + (1 - decay) * trained[n] for n, a in average.items()}
        saved = load_weights(checkpoint(run, step))
        for name, value in average.items():
            torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-7)
    moved = (load_weights(checkpoint(run, 5))["logit_scale"] - trained["logit_scale"]).abs()
    assert moved.item() > 1e-4


def test_the_average_is_what_is_scored_and_opened(run: Path):
    model, config = load_model(run)
    saved = load_weights(checkpoint(run, 5))
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    again = evaluate(model, config, tokenizer(config.text), config.data.val, Ranks())
    scores = json.loads((run / "eval.json").read_text())
    assert again["retrieval"]["val"] == scores["retrieval"]["val"]


def test_a_resumed_run_has_the_same_bits(run: Path, prepared: Path, tmp_path: Path):
    config = small(prepared, tmp_path)
    train_stopped_after(2, config)
    train(config, resume=True)
    for name in ("model.safetensors", "trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (checkpoint(r, 5) / name for r in (config.run_folder, run))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("damage", ["nan", "shape", "gone"])
def test_a_damaged_average_is_named_without_sums_too(damage: str, prepared: Path, tmp_path: Path):
    config = small(prepared, tmp_path)
    train_stopped_after(2, config)
    folder = checkpoint(config.run_folder, 2)
    (folder / "SHA256SUMS").unlink()
    weights, name = load_file(folder / "model.safetensors"), "audio.norm.weight"
    if damage == "gone":
        del weights[name]
    else:
        weights[name] = weights[name] * float("nan") if damage == "nan" else weights[name][:-1]
    save_file(weights, folder / "model.safetensors")
    message = rf"step-000002/model.safetensors must hold this model's weights, got '{name} "
    with pytest.raises(ConfigError, match=message):
        train(config, resume=True)
