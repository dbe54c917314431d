"""Duplicates and the sigmoid loss in training: over ranks, in micro-batches, on resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_fast.config import Config
from flap_fast.interchange.convert import export_checkpoint, import_checkpoint
from flap_fast.interchange.tensors import read_saved
from flap_fast.model.model_folder import load_model, load_weights, model_folder, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import DeepSpeedEngine
from flap_fast.training.loop import train
from flap_fast.training.optimizers import parameter_groups
from tests.losses.test_pairs import whole_total
from tests.ranks import on_ranks
from tests.tiny import HTSAT, tiny
from tests.training.stopping import train_stopped_after
from tests.training.test_step import PAIR_IDS, assert_same, run, settings

EACH = [("mask", "positive"), ("positive", "mask")]
ALONE = ("loss.contrastive.weight=0", "loss.sigmoid.weight=1", "joint.temperature=0.1")


def with_pairs(duplicates: tuple[str, str], *overrides: str) -> Config:
    first, second = duplicates
    return settings(
        *(f"loss.contrastive.duplicates={first}", f"loss.sigmoid.duplicates={second}"),
        *("loss.sigmoid.weight=0.5", "loss.sigmoid.bias=-3", *overrides),
    )


@pytest.fixture(scope="module", params=EACH)
def whole(request: pytest.FixtureRequest) -> tuple[tuple[str, str], Any]:
    """64 clips in one pass of one process."""
    return request.param, run(with_pairs(request.param), Ranks(), steps=2)


def test_the_whole_batchs_losses_are_those_of_all_logits(whole):
    duplicates, (_, _, outputs) = whole
    assert torch.equal(outputs["pair_ids"], PAIR_IDS)
    scaled = outputs | {"media": outputs["media"] * outputs["scale"]}
    expected = whole_total(scaled, duplicates)
    names = (f"loss.{name}_weight=0" for name in ("cyclic.cross", "cyclic.in"))
    only = ("loss.simcse.weight=0", "loss.nli.weight=0", "loss.recon.weight=0", *names)
    (total, *_), _, _ = run(with_pairs(duplicates, *only), Ranks(), steps=1)
    assert total == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("replay", ["keep", "decode"])
def test_micro_batches_tell_duplicates_of_the_whole_batch(replay: str, whole):
    duplicates, expected = whole
    config = with_pairs(duplicates, "train.micro_batch=8", f"train.replay={replay}")
    found = run(config, Ranks(), steps=2)
    assert_same(found, expected)
    assert "logit_bias" in expected[1]
    assert torch.equal(found[2]["pair_ids"], PAIR_IDS)  # type: ignore[index]
    ignored = run(with_pairs(("ignore", "ignore")), Ranks(), steps=1)
    with pytest.raises(AssertionError):  # and duplicates do make a difference
        assert_same(ignored, expected)


def of_each_stage(duplicates: tuple[str, str]) -> list[Any]:
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    stages = (f"train.zero_stage={stage}" for stage in (0, 2, 3))
    configs = [with_pairs(duplicates, stage, "train.micro_batch=8") for stage in stages]
    return [run(config, ranks, DeepSpeedEngine, 2)[:2] for config in configs]


def test_ranks_tell_duplicates_of_the_whole_batch_at_every_stage(whole):
    pytest.importorskip("deepspeed")
    duplicates, expected = whole
    for found in on_ranks(2, of_each_stage, duplicates, timeout_s=280):
        assert len(found) == 3
        for stage in found:
            assert_same(stage, expected)


def small(prepared: Path, runs: Path, name: str, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"run.name={name}", f"data.train={prepared}/train"),
        *("log.every_steps=1", "log.tensorboard=false", "frontend.backend=torch", *overrides),
    )


def rows(config: Config) -> list[dict[str, Any]]:
    times = ("clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s")
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(n).items() if k not in times} for n in lines]


@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
def test_the_sigmoid_loss_trains_alone_and_resumes_bit_for_bit(
    duplicates: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = (*ALONE, f"loss.sigmoid.duplicates={duplicates}", "train.micro_batch=4")
    own += ("optim.lr=1e-2", "sched.warmup_steps=0")
    whole = small(prepared, tmp_path, "whole", *own)
    train(whole)
    logged = rows(whole)
    assert all(row["loss"] == row["sigmoid"] > 0 for row in logged)
    assert "contrastive" not in logged[0]
    assert logged[0]["scale"] == pytest.approx(10)
    assert logged[0]["bias"] == -10
    assert logged[-1]["bias"] > -10
    assert list(logged[0]).index("bias") == list(logged[0]).index("scale") + 1

    halted = small(prepared, tmp_path, "halted", *own)
    train_stopped_after(2, halted)
    train(halted, resume=True)
    assert rows(halted) == logged
    model, _ = load_model(tmp_path / "whole")
    assert model.logit_bias is not None
    assert model.logit_bias.item() == pytest.approx(logged[-1]["bias"], abs=0.01)


def test_the_bias_is_not_decayed_and_is_there_only_with_the_loss():
    model = TwoTowers(tiny("loss.sigmoid.weight=0.1", "loss.sigmoid.bias=-3"))
    decayed, others = (group.parameters for group in parameter_groups(model))
    assert any(p is model.logit_bias for p in others)
    assert not any(p is model.logit_bias for p in decayed)
    assert model.state_dict()["logit_bias"].tolist() == [-3]
    assert "logit_bias" not in TwoTowers(tiny("loss.sigmoid.bias=-3")).state_dict()


def test_weights_to_begin_with_may_lack_the_bias_or_leave_it_behind(prepared: Path, tmp_path: Path):
    began: dict[str, float] = {}

    def begin(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        config = small(prepared, tmp_path, name, "train.steps=1", "optim.lr=1e-9", *overrides)
        train(config)
        began.update({name: rows(config)[0].get("bias", 0)})
        return load_weights(model_folder(config.run_folder))

    begin("without")
    with_bias = begin("with", *ALONE, f"train.init_from={tmp_path}/without", "loss.sigmoid.bias=-4")
    again = begin("again", *ALONE, f"train.init_from={tmp_path}/with", "loss.sigmoid.bias=-7")
    left = begin("left", f"train.init_from={tmp_path}/with")
    assert began == {"without": 0, "with": -4, "again": -4, "left": 0}
    assert with_bias.keys() - left.keys() == {"logit_bias"}
    assert with_bias["logit_bias"].item() == pytest.approx(again["logit_bias"].item())


def saved(folder: Path, *overrides: str) -> Path:
    config = tiny("loss.sigmoid.weight=1", *overrides)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def test_other_projects_have_no_bias_and_the_export_says_so(
    roberta_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = saved(tmp_path / "htsat", *HTSAT, f"text.folder={roberta_folder}")
    said = export_checkpoint(folder, tmp_path / "hf")
    assert said == (
        "a folder for transformers.ClapModel, without loss.sigmoid's logit_bias, which it has no "
        "place for"
    )
    heads = {"audio_branch.tscam_conv.weight": torch.zeros(1)}
    monkeypatch.setattr("flap_fast.interchange.convert._unused", lambda _: ("", heads))
    said = export_checkpoint(folder, tmp_path / "laion.pt")
    assert said.endswith(", without loss.sigmoid's logit_bias, which it has no place for")
    tensors = read_saved(tmp_path / "laion.pt").tensors
    assert "logit_scale_a" in tensors
    assert not any("bias" in name and "logit" in name for name in tensors)


def test_a_flaps_folder_holds_the_bias(roberta_folder: Path, tmp_path: Path):
    folder = saved(tmp_path / "flap", "loss.sigmoid.bias=-6", f"text.folder={roberta_folder}")
    assert "logit_bias" not in export_checkpoint(folder, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert load_weights(tmp_path / "back")["logit_bias"].tolist() == [-6]
