"""A run: its files, its resumption bit for bit, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from flap_fast import tensors as tensor_files
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.rules import check_effects
from flap_fast.data.batch import Batch
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.tools.embedder import load
from flap_fast.training import setup
from flap_fast.training import step as step_file
from flap_fast.training.checkpoint import latest
from flap_fast.training.loop import Stopped, train
from flap_fast.training.observers import NotFinite
from flap_fast.training.run_folder import differences
from flap_fast.training.scorer import Scorer
from flap_fast.training.stop import Stop
from flap_kernels import PatchMask
from tests.sounds import encode, tone, write_manifest
from tests.tiny import tiny

TIMES = {"clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s"}


def settings(prepared: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        f"run.folder={runs}",
        f"data.train={prepared}/train",
        f"data.val={prepared}/val",
        *("log.every_steps=1", "ckpt.every_steps=2", "eval.every_steps=3", "log.tensorboard=false"),
        # Dropout and drop-path on: their draws must survive a resumption too.
        *("text.dropout=0.1", "audio.drop_path=0.1", "train.steps=6", "sched.warmup_steps=2"),
        *overrides,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ctrl-C came during that step."""
    asked = iter([False] * (step - 1) + [True])
    monkeypatch.setattr(Stop, "agreed", lambda self: next(asked))


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    runs = tmp_path_factory.mktemp("whole")
    train(settings(prepared, runs))
    return runs / "flap"


def test_a_run_leaves_what_its_user_needs(whole: Path, prepared: Path):
    assert {f.name for f in whole.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "eval.json", "checkpoints")
    }
    found = json.loads((whole / "environment.json").read_text())
    assert (found["ranks"], found["outcome"]) == ("1", "complete")
    assert 0 < found["parameters_trained"] == found["parameters"]
    steps = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in steps] == [0, 0, 0, 1, 1, 1]  # 24 clips, batches of 8
    assert steps[0]["lr"] == 0.5e-4  # half-way through a warm-up of two steps
    scores = json.loads((whole / "eval.json").read_text())["retrieval"]["val"]
    last = rows(whole)[-1]
    assert last["val/text_to_audio/R@5"] == scores["text_to_audio"]["R@5"]
    timed = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(("eval_s" in row) == ("loss" not in row) for row in timed)
    assert all(0 < row.get("eval_s", 1) < 60 for row in timed)


def test_the_last_checkpoints_and_the_best_are_kept(whole: Path):
    names = {f.name for f in (whole / "checkpoints").iterdir()}
    assert {"step-000004", "step-000006", "best"} <= names
    assert len(names) <= 4
    scores = {
        row["step"]: (row["val/audio_to_text/mAP@10"] + row["val/text_to_audio/mAP@10"]) / 2
        for row in rows(whole)
        if "loss" not in row
    }
    best = int((whole / "checkpoints/best").resolve().name[5:])
    assert scores[best] == max(scores.values())


def test_a_run_of_no_steps_keeps_and_scores_its_first_weights(prepared: Path, tmp_path: Path):
    """A random tower to compare with; `--resume` finds it complete."""
    config = settings(prepared, tmp_path, "train.steps=0", "eval.tasks=[retrieval,geometry]")
    assert config.train.run_steps(3) == 0
    scores = train(config)
    assert scores is not None
    kept = load(tmp_path / "flap").model.state_dict()
    torch.manual_seed(config.run.seed)
    first = TwoTowers(config).state_dict()
    assert kept.keys() == first.keys()
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert [row["step"] for row in rows(tmp_path / "flap")] == [0]
    assert {f.name for f in (tmp_path / "flap/checkpoints").iterdir()} == {"step-000000", "best"}
    assert train(config, resume=True) == scores
    assert {f.name for f in (tmp_path / "flap/checkpoints").iterdir()} == {"step-000000", "best"}


def test_reconstruction_alone_trains_a_tower_that_probes_choose(prepared: Path, tmp_path: Path):
    """The text tower and the heads keep their first weights; `probe` may come first."""
    rows_of = [{"labels": [("a", "b")[n % 2]], "caption": f"{n}"} for n in range(12)]
    for n, row in enumerate(rows_of):
        (tmp_path / f"{n}.wav").write_bytes(encode(tone(300 + 90 * n, 0.5, 16_000), 16_000, "WAV"))
        row["audio"] = f"{n}.wav"
    prepare(write_manifest(tmp_path / "m.jsonl", rows_of), tmp_path / "data", show=False)
    alone = ("loss.contrastive.weight=0", "loss.recon.weight=1", "mask.kind=2d")
    scored = ("eval.tasks=[probe]", f"data.val={tmp_path}/data/train", "eval.every_steps=0")
    config = settings(
        prepared, tmp_path, *alone, *scored, "decoder.width=16", "decoder.depth=1", "train.steps=2"
    )
    scores = train(config)
    assert scores is not None
    (found,) = scores["probe"].values()
    assert found["folds"] == "5 stratified folds"
    last = rows(tmp_path / "flap")[-1]
    assert last["train/probe/pooled/linear"] == found["pooled"]["linear"]["accuracy"]
    kept = load(tmp_path / "flap").model.state_dict()
    torch.manual_seed(config.run.seed)
    first = TwoTowers(config).state_dict()
    moved = {name.partition(".")[0] for name in first if not torch.equal(kept[name], first[name])}
    assert moved == {"audio", "decoder"}


def test_a_checkpoint_opens_on_its_own(whole: Path, prepared: Path, tmp_path: Path):
    alone = shutil.copytree(whole / "checkpoints/step-000006", tmp_path / "moved")
    model = load(alone)
    (text,) = open_shards([prepared / "val"]).record(0)["text"][:1]
    embedding = model.embed_text([text])
    assert embedding.shape == (1, 16)
    assert torch.allclose(embedding.norm(), torch.ones(()))


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    step: int, whole: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings(prepared, tmp_path)
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.step == step
    assert latest(tmp_path / "flap/checkpoints") == stopped.value.checkpoint
    train(config, resume=True)
    assert rows(tmp_path / "flap") == rows(whole)
    found = json.loads((tmp_path / "flap/environment.json").read_text())
    assert (found["resumed_from_step"], found["outcome"]) == (step, "complete")
    (before,) = found["earlier_sessions"]
    assert before["outcome"].startswith(f"stopped after step {step}, saved in ")
    ours, theirs = (
        load(folder / "checkpoints/step-000006").model.state_dict()
        for folder in (tmp_path / "flap", whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_killed_between_checkpoints_repeats_the_steps_it_lost(
    whole: Path, prepared: Path, tmp_path: Path
):
    """As `kill -9` in step 6 leaves it: checkpoint 4, rows up to 5 and half a row."""
    killed = shutil.copytree(whole, tmp_path / "flap", symlinks=True)
    shutil.rmtree(killed / "checkpoints/step-000006")
    (killed / "checkpoints/best").unlink()
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    (killed / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 6, "lo')
    config = settings(prepared, tmp_path)
    train(config, resume=True)
    assert rows(killed) == rows(whole)


def test_a_finished_run_is_only_scored_again(whole: Path, prepared: Path, tmp_path: Path):
    again = shutil.copytree(whole, tmp_path / "flap", symlinks=True)
    before = rows(again)
    (again / "eval.json").unlink()
    assert train(settings(prepared, tmp_path), resume=True) is not None
    assert rows(again) == before
    assert (again / "eval.json").is_file()


def test_resuming_nothing_begins(prepared: Path, tmp_path: Path):
    train(settings(prepared, tmp_path, "train.steps=1"), resume=True)
    assert [row["step"] for row in rows(tmp_path / "flap")] == [1, 1]


def test_a_run_is_not_begun_twice(whole: Path, prepared: Path):
    with pytest.raises(ConfigError, match=r"run\.name must be new.*--resume"):
        train(settings(prepared, whole.parent))


def test_a_run_goes_on_with_the_settings_it_began_with(whole: Path, prepared: Path):
    changed = ("optim.lr=0.5", "log.every_steps=3", "frontend.threads=2")
    with pytest.raises(ConfigError, match=r"--resume must keep.*\n  optim\.lr: 0\.0001 -> 0\.5\n"):
        train(settings(prepared, whole.parent, *changed), resume=True)


def test_a_run_goes_on_with_another_decoder_but_not_with_another_mel():
    names = ("torch", "dali_wave", "dali_mel")
    ours, waves, mels = (tiny(f"frontend.backend={name}") for name in names)
    assert differences(ours, waves) == []
    assert differences(ours, mels) == [("frontend.backend", "torch", "dali_mel")]
    assert differences(mels, waves) == [("frontend.backend", "dali_mel", "dali_wave")]


def test_nothing_is_loaded_for_a_wrong_config(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(setup, "open_shards", lambda *_: pytest.fail("it opened the shards"))
    for override, message in (
        ("data.val=nowhere", r"data\.val must be existing folders of shards, got 'nowhere'"),
        ("train.engine=deepspeed", r"train\.engine must be 'plain' without .*launch"),
        (
            "train.offload=optimizer",
            r"train\.offload must be 'none' in plain .*launch with",
        ),
        ("log.wandb=true", r"log\.wandb must be off .*pip install wandb"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(settings(prepared, tmp_path, override))
    assert not any(tmp_path.iterdir())


def test_a_nan_stops_the_run_before_it_reaches_a_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = iter(range(1, 7))

    def poisoned(outputs, config):
        terms = total_loss(outputs, config)
        return {**terms, "total": terms["total"] * (float("nan") if next(steps) == 3 else 1)}

    monkeypatch.setattr(step_file, "total_loss", poisoned)
    message = r"at step 3; nothing was saved after it\. Lower .* train\.init_from=\S*flap to start"
    with pytest.raises(NotFinite, match=message):
        train(settings(prepared, tmp_path, "log.every_steps=10"))
    checkpoints = tmp_path / "flap/checkpoints"
    assert [f.name for f in sorted(checkpoints.iterdir())] == ["step-000002"]
    weights = load(tmp_path / "flap").model.state_dict().values()
    assert all(value.isfinite().all() for value in weights)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_costs_the_checkpoint_that_did_not_fit_and_no_other(
    file: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = tensor_files.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **rest: Any) -> None:
        if "000004" in str(path) and path.name == file:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **rest)

    config = settings(prepared, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        message = rf"{file} cannot be written: I/O error: No space .*; make room and .*--resume"
        with pytest.raises(OSError, match=message):
            train(config)
    names = {f.name for f in (tmp_path / "flap/checkpoints").iterdir()}
    assert names == {"step-000002", "step-000003", "best"}
    train(config, resume=True)
    assert rows(tmp_path / "flap")[-1]["step"] == 6


def test_validation_clips_without_a_caption_are_refused_before_a_run_begins(
    prepared: Path, tmp_path: Path
):
    (tmp_path / "a.wav").write_bytes(encode(tone(440, 1.0, 16_000), 16_000, "WAV"))
    rows = [{"audio": "a.wav", "labels": ["tone"], "split": "val"}]
    prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "data", show=False)
    config = settings(prepared, tmp_path / "runs", f"data.val={tmp_path}/data/val")
    with pytest.raises(
        ConfigError, match=r"data\.val, .*, must hold no clip without a caption, got 1"
    ):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_what_was_trained_outlives_validation_that_cannot_be_read(prepared: Path, tmp_path: Path):
    """With eval.every_steps=0 the first scoring is at the last step."""
    val = shutil.copytree(prepared / "val", tmp_path / "val")
    at = open_shards([val]).locations[3, 1]
    with (val / "0.tar").open("r+b") as tar:
        tar.seek(at)
        tar.write(bytes(16))
    config = settings(prepared, tmp_path, f"data.val={val}", "eval.every_steps=0")
    with pytest.raises(ShardError, match=rf"0\.tar at byte {at}"):
        train(config)
    assert latest(tmp_path / "flap/checkpoints") == tmp_path / "flap/checkpoints/step-000006"
    assert [row["step"] for row in rows(tmp_path / "flap")] == [1, 2, 3, 4, 5, 6]
    alone = settings(prepared, tmp_path, "data.val=[]", "eval.every_steps=0")
    assert train(alone, resume=True) is None
    shutil.copy(prepared / "val/0.tar", val)
    scores = train(config, resume=True)
    assert scores is not None
    assert "val/text_to_audio/R@5" in rows(tmp_path / "flap")[-1]
    assert (tmp_path / "flap/checkpoints/best").resolve().name == "step-000006"
    assert (tmp_path / "flap/eval.json").is_file()


@pytest.mark.parametrize(
    ("folder", "got"), [("", r"folders of them: train, val; name one"), ("empty", "none; write th")]
)
def test_validation_without_shards_is_refused_before_a_model_is_built(
    folder: str, got: str, prepared: Path, tmp_path: Path
):
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / "empty").mkdir()
    with pytest.raises(ShardError, match=rf"must hold \.tar shards, got {got}"):
        train(settings(data, tmp_path / "runs", f"data.val={data}/{folder}"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_that_is_interrupted_is_done_when_the_run_goes_on(
    step: int, whole: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As by a second Ctrl-C; at step 3, where no checkpoint is due, the steps are done again."""
    config, real = settings(prepared, tmp_path), Scorer._evaluate
    asked = iter(range(3, 9, 3))

    def interrupted(scorer: Scorer):
        if next(asked) == step:
            raise KeyboardInterrupt
        return real(scorer)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    last = latest(tmp_path / "flap/checkpoints")
    assert last is not None
    assert last.name == {3: "step-000002", 6: "step-000006"}[step]
    train(config, resume=True)
    assert rows(tmp_path / "flap") == rows(whole)
    state = json.loads((tmp_path / "flap/checkpoints/step-000006/state.json").read_text())
    assert state == json.loads((whole / "checkpoints/step-000006/state.json").read_text())
    assert state["scored"]


def test_masking_and_reconstruction_end_with_the_unmasked_tail(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: list[int | None] = []
    real = step_file.patch_mask_of

    def watched(*arguments):
        plan = real(*arguments)
        kept.append(plan.ids_keep.shape[1] if isinstance(plan, PatchMask) else None)
        return plan

    monkeypatch.setattr(step_file, "patch_mask_of", watched)
    rebuilding = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
    tail = ("mask.unmasked_tail_epochs=1", "eval.every_steps=0", "data.val=[]")
    train(settings(prepared, tmp_path, *rebuilding, *tail))
    assert kept == [30, 30, 30, None, None, None]  # 5 of 7 columns, 6 of 8 rows
    losses = [row["recon"] for row in rows(tmp_path / "flap")]
    assert all(loss > 0.1 for loss in losses[:3])
    assert losses[3:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "audio.lora_alpha=8",
            r"audio.lora_alpha must be left out with audio.lora_rank = 0, got 8",
        ),
        ("text.lora_alpha=8", "text.lora_alpha must be left out with text.lora_rank = 0, got 8"),
        (
            "train.steps=null train.epochs=2 mask.unmasked_tail_epochs=2",
            "must be below the run's 2 epochs, .* got 2",
        ),
        ("train.steps=6 mask.unmasked_tail_epochs=2", "must be below the run's 2 epochs, .* got 2"),
        (
            "train.steps=6 sched.name=wsd sched.decay_steps=5",
            r"decay_steps must be at most the run's 6 steps less sched.warmup_steps = 2, got 5",
        ),
        (
            "train.steps=null train.epochs=2 sched.name=wsd sched.decay_steps=5",
            r"decay_steps must be at most the run's 6 steps less sched.warmup_steps = 2, got 5",
        ),
    ],
)
def test_a_new_run_has_no_setting_without_effect(
    given: str, message: str, prepared: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        train(settings(prepared, tmp_path, *given.split()))
    assert not (tmp_path / "flap/metrics.jsonl").exists()


@pytest.mark.parametrize("frozen", [(), ("text.freeze=true",), ("text.freeze_blocks=1",)])
def test_the_settings_that_give_lora_alpha_an_effect_are_told(frozen: tuple[str, ...]):
    given = (*frozen, "text.lora_alpha=8")
    with pytest.raises(ConfigError, match="; set ") as error:
        check_effects(tiny(*given), 4, None)
    told = str(error.value).partition("; set ")[2].split()
    check_effects(tiny(*given, *told), 4, None)


def test_an_older_run_with_such_a_setting_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = ("audio.lora_alpha=8", "data.val=[]", "train.steps=2", "eval.every_steps=0")
    config = settings(prepared, tmp_path, *given)
    with monkeypatch.context() as before:
        before.setattr(setup, "check_effects", lambda *_: None)
        stop_after(1, before)
        with pytest.raises(Stopped):
            train(config)
    train(config, resume=True)
    assert [row["step"] for row in rows(tmp_path / "flap")] == [1, 2]


@pytest.mark.parametrize("target", ["clean", "augmented"])
def test_the_decoder_rebuilds_the_sound_before_specaug_or_after(target: str):
    config = tiny(f"loss.recon.target={target}", "loss.recon.weight=1", "specaug.freq_bins=99")
    ids = torch.zeros(4, 8, dtype=torch.int64)
    clean = torch.ones(4, 1, 112, 128)
    batch = Batch(
        clean, ids, ids, sample_index=torch.arange(4), clips=np.arange(4), epoch=0, micro_batches=1
    )
    inputs = step_file.model_inputs(batch, None, config)
    assert isinstance(inputs["media"], torch.Tensor)
    assert not torch.equal(inputs["media"], clean)
    assert inputs["target"] is (clean if target == "clean" else inputs["media"])


def test_a_broken_clip_is_replaced_and_noted(prepared: Path, tmp_path: Path):
    data = shutil.copytree(prepared, tmp_path / "data")
    at = open_shards([data / "train"]).locations[0, 1]
    with (data / "train/0.tar").open("r+b") as tar:
        tar.seek(at)
        tar.write(bytes(64))
    scores = train(settings(data, tmp_path, "ckpt.every_steps=0", "eval.every_steps=0"))
    assert scores is not None
    noted = [json.loads(n) for n in (tmp_path / "flap/bad_clips.jsonl").read_text().splitlines()]
    assert len(noted) == 2  # once an epoch
    assert noted[0]["clip"].endswith(f"0.tar at byte {at}")
    assert noted[0]["replaced_by"] != noted[0]["clip"]
    losses = [row["loss"] for row in rows(tmp_path / "flap") if "loss" in row]
    assert len(losses) == 6
