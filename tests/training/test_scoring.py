"""Evaluations during training: which there are, what the best is, and early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.preparation.prepare import prepare
from flap_fast.training import scorer
from flap_fast.training.loop import Stopped, train
from flap_fast.training.setup import check_run
from flap_fast.training.stop import Stop
from tests.sounds import encode, tone, write_manifest
from tests.tiny import tiny


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen tones, low or high by their labels; val/ has eight of them, bare/ no labels."""
    folder = tmp_path_factory.mktemp("labelled")
    rows: list[dict[str, Any]] = []
    for n in range(24):
        hz = 300 + 40 * n
        (folder / f"{n}.wav").write_bytes(encode(tone(hz, 1.0, 16_000), 16_000))
        split = ("train", "val", "bare")[n // 8]
        label = {} if split == "bare" else {"labels": ["low" if n % 2 else "high"]}
        rows.append({"audio": f"{n}.wav", "caption": f"{hz} hertz", "split": split, **label})
    out = folder / "out"
    prepare(write_manifest(folder / "manifest.jsonl", rows), out, threads=1, show=False)
    return out


def settings(data: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"data.train={data}/train", f"data.val={data}/val"),
        *("frontend.backend=torch", "log.every_steps=1", "log.tensorboard=false"),
        *("audio.depth=1", "text.depth=1", "train.steps=12", "sched.warmup_steps=0"),
        *("eval.every_steps=2", "ckpt.every_steps=5", *overrides),
    )


def rows(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / "flap/metrics.jsonl").read_text().splitlines()]


def state(runs: Path, step: int) -> dict[str, Any]:
    return json.loads((runs / f"flap/checkpoints/step-{step:06d}/state.json").read_text())


def test_each_task_is_scored_and_the_first_chooses(labelled: Path, tmp_path: Path):
    tasks = "eval.tasks=[zero_shot,retrieval,geometry]"
    train(settings(labelled, tmp_path, tasks, "train.steps=4"))
    scores = [row for row in rows(tmp_path) if "loss" not in row]
    assert [row["step"] for row in scores] == [2, 4]
    columns = ("zero_shot/top_1", "zero_shot/mAP", "geometry/alignment", "audio_to_text/R@10")
    assert all(f"val/{column}" in row for column in columns for row in scores)
    eval_json = json.loads((tmp_path / "flap/eval.json").read_text())
    assert {"zero_shot", "retrieval", "geometry"} <= eval_json.keys()
    saved = state(tmp_path, 4)
    assert saved["best"] == max(row["val/zero_shot/top_1"] for row in scores)
    assert saved["best_task"] == "zero_shot"


def test_retrieval_alone_is_the_default(labelled: Path, tmp_path: Path):
    train(settings(labelled, tmp_path, "train.steps=2"))
    score = next(row for row in rows(tmp_path) if "loss" not in row)
    assert {name.split("/")[1] for name in score if name not in ("step", "eval_s")} == {
        "audio_to_text",
        "text_to_audio",
    }
    both = (score["val/audio_to_text/mAP@10"] + score["val/text_to_audio/mAP@10"]) / 2
    assert state(tmp_path, 2)["best"] == pytest.approx(both)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("eval.tasks=zeroshot", "eval.tasks must name some of retrieval, .*, got 'zeroshot'"),
        ("eval.tasks=[retrieval,sts]", "eval.tasks must name some of retrieval, .*, got 'sts'"),
        ("eval.tasks=[geometry]", "eval.tasks must begin with one that chooses .*, got 'geometry'"),
        ("eval.tasks=[]", "eval.tasks must have at least 1 item"),
        ("eval.tasks=relevance", "eval.relevance must name an existing file"),
        ("eval.every_steps=0 eval.patience=2", "eval.every_steps must be above 0 with eval.pat"),
        (
            "data.val=[] eval.patience=2",
            "data.val must name data to evaluate on with eval.pat",
        ),
        ("data.val=bare eval.tasks=zero_shot", "zero-shot data must have labels, got 'none'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    given: str, message: str, labelled: Path, tmp_path: Path
):
    overrides = given.replace("val=bare", f"val={labelled}/bare").split(" ")
    with pytest.raises(ConfigError, match=message):
        check_run(settings(labelled, tmp_path, *overrides), resume=False)


# A learning rate at which no score changes: the first evaluation stays the best.
STILL = ("optim.lr=1e-30", "eval.patience=2")


def test_a_run_ends_when_patience_does(labelled: Path, tmp_path: Path, capsys):
    config = settings(labelled, tmp_path, *STILL)
    assert train(config) is not None
    assert rows(tmp_path)[-1]["step"] == 6
    said = capsys.readouterr().err
    assert "ended early, after step 6 of 12: 2 evaluations in a row were no better than" in said
    assert (tmp_path / "flap/checkpoints/best").resolve().name == "step-000002"
    assert (tmp_path / "flap/eval.json").is_file()
    # It has ended: to go on takes more patience.
    before = rows(tmp_path)
    train(config, resume=True)
    assert rows(tmp_path) == before
    train(settings(labelled, tmp_path, *STILL, "eval.patience=3"), resume=True)
    assert rows(tmp_path)[-1]["step"] == 8


@pytest.mark.parametrize("stop", [3, 5])
def test_a_stopped_run_has_the_patience_that_it_had(
    stop: int, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, asked = settings(labelled, tmp_path, *STILL), iter([False] * (stop - 1) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self: next(asked))
        with pytest.raises(Stopped):
            train(config)
    train(config, resume=True)
    assert rows(tmp_path)[-1]["step"] == 6
    assert state(tmp_path, 6)["since_best"] == 2


def test_a_better_score_renews_patience(labelled: Path, tmp_path: Path, monkeypatch):
    """Of 1, 1, 2, 2, 2 the last ends the run."""
    scores = iter([1.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(scorer, "selection_score", lambda *_: next(scores))
    train(settings(labelled, tmp_path, *STILL))
    assert rows(tmp_path)[-1]["step"] == 10
    assert state(tmp_path, 10)["best"] == 2.0


def test_a_best_score_of_another_task_is_none(labelled: Path, tmp_path: Path):
    train(settings(labelled, tmp_path, "train.steps=2", "ckpt.every_steps=1"))
    assert state(tmp_path, 2)["best_task"] == "retrieval"
    (tmp_path / "flap/checkpoints/step-000002/state.json").unlink()  # to go on from step 1
    train(settings(labelled, tmp_path, "train.steps=2", "eval.tasks=zero_shot"), resume=True)
    assert state(tmp_path, 2)["best_task"] == "zero_shot"
