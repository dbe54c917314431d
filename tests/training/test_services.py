"""Observers that fail, and Weights & Biases: training goes on, whatever they do."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.ranks import Ranks
from flap_fast.training.guarded import Guarded
from flap_fast.training.loop import train
from flap_fast.training.observers import Metrics, metrics_file, observers
from flap_fast.training.run_folder import begin, in_session
from flap_fast.training.run_lock import run_lock
from flap_fast.training.weights_and_biases import wandb_id, weights_and_biases
from tests.tiny import tiny

Wandb = Callable[..., list[Any]]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """Puts a stand-in for wandb in place, whose calls named are replaced; gives what it gets."""

    def install(**calls: Callable[..., Any]) -> list[Any]:
        got: list[Any] = []
        run = SimpleNamespace(
            log=calls.get("log", lambda row, step: got.append((step, row))),
            finish=calls.get("finish", lambda: got.append("finish")),
        )
        module: Any = ModuleType("wandb")
        module.init = calls.get("init", lambda **settings: got.append(settings) or run)
        module.__spec__ = SimpleNamespace(name="wandb")
        monkeypatch.setitem(sys.modules, "wandb", module)
        return got

    return install


def ours(folder: Path, *overrides: str) -> Config:
    named = (f"run.folder={folder}", "log.tensorboard=false", "log.wandb=true")
    config = tiny(*named, "log.wandb_timeout_s=0.2", *overrides)
    config.run_folder.mkdir(exist_ok=True)
    return config


def rows_of(config: Config, *, first: int = 0, steps: int = 3) -> list[int]:
    """Steps in metrics.jsonl after a run of rows."""
    row = dict.fromkeys(("loss", "in_batch_R@1", "clips_per_s", "data_wait"), 0.5)
    with ExitStack() as files:
        active = observers(config, Ranks(), files, first=first, steps=steps)
        for step in range(first + 1, steps + 1):
            for observe in active:
                observe({"step": step, **row})
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("refused\n  by the host")


def leave(*_: Any, **__: Any) -> None:
    raise SystemExit(1)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def hang(*_: Any, **__: Any) -> None:
    time.sleep(3)


def test_weights_and_biases_gets_rows_and_the_config(tmp_path: Path, wandb: Wandb):
    got = wandb()
    named = (
        "log.wandb_project=p",
        "log.wandb_entity=e",
        "log.wandb_group=g",
        "data.train=https://ann:s@h/a?b",
    )
    with ExitStack() as files:
        observe = weights_and_biases(ours(tmp_path, *named), files)
        observe({"step": 3, "loss": 1.0})
    assert got[0]["config"]["train"]["global_batch"] == 8
    assert got[0]["config"]["data"]["train"] == ["https://h/a"]
    assert [got[0][name] for name in ("project", "entity", "group")] == ["p", "e", "g"]
    assert got[0]["settings"]["init_timeout"] == 0.1
    assert got[1:] == [(3, {"step": 3, "loss": 1.0}), "finish"]


def test_a_run_has_an_id_of_its_own_that_it_keeps(tmp_path: Path, wandb: Wandb):
    got = wandb()
    for folder, first in (("a", 0), ("a", 2), ("b", 0)):
        with ExitStack() as files:
            (tmp_path / folder).mkdir(exist_ok=True)
            weights_and_biases(ours(tmp_path / folder), files, first=first)
    begun, resumed, other = (call["id"] for call in got if call != "finish")
    assert begun == resumed != other
    assert re.fullmatch(r"[0-9a-f]{16}", begun)


def test_a_run_from_before_ids_goes_on_under_its_name(tmp_path: Path):
    config = ours(tmp_path)
    (config.run_folder / "wandb").mkdir()
    assert wandb_id(config, first=4) == config.run.name


@pytest.mark.parametrize("fault", [refuse, leave, interrupt, hang])
@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_training_goes_on_without_a_service_that_fails(
    call: str, fault: Callable[..., None], tmp_path: Path, wandb: Wandb, capsys
):
    wandb(**{call: fault})
    before = time.perf_counter()
    assert rows_of(ours(tmp_path)) == [1, 2, 3]
    assert time.perf_counter() - before < 1
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: log.wandb is left out of the rest of this run, got ")
    words = {refuse: "refused by the host", hang: "no answer in log.wandb_timeout_s = 0.2 s"}
    assert words.get(fault, "") in said[0]


def test_the_service_that_failed_gets_nothing_more(tmp_path: Path, wandb: Wandb, capsys):
    asked: list[int] = []

    def log(row: Any, step: int) -> None:
        asked.append(step)
        refuse()

    wandb(log=log)
    rows_of(ours(tmp_path))
    assert asked == [1]


def test_a_prompt_for_a_key_reads_nothing(tmp_path: Path, wandb: Wandb, monkeypatch):
    monkeypatch.setattr(sys, "stdin", kept := SimpleNamespace(isatty=lambda: True))
    read: list[Any] = []
    wandb(init=lambda **_: read.append((sys.stdin.isatty(), sys.stdin.read())))
    with ExitStack() as files:
        weights_and_biases(ours(tmp_path), files)
        files.pop_all()
    assert read == [(False, "")]
    assert sys.stdin is kept


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "a" * 40])
def test_training_goes_on_where_weights_and_biases_refuses_a_connection(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv(
        "WANDB_API_KEY", raising=False
    )
    before = time.perf_counter()
    assert rows_of(ours(tmp_path, "log.wandb_timeout_s=30")) == [1, 2, 3]
    assert time.perf_counter() - before < 30
    assert "warning: log.wandb is left out" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [refuse, leave])
def test_any_observer_that_fails_is_named_once_and_left_out(fault: Callable[..., None], capsys):
    rows: list[dict[str, Any]] = []
    config = tiny("log.every_steps=1", "run.folder=nowhere")
    recorded = Metrics(config, Ranks(), 9, [fault, rows.append])
    vectors: Any = {"media": torch.eye(4), "text": torch.eye(4), "scale": torch.ones(())}
    terms = {name: torch.ones(()) for name in ("total", "grad_norm")}
    for step in (1, 2):
        recorded.step(step, 0, 0.1, vectors, terms, {})
        recorded.scores(step, {"val/R@1": 0.5})
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert f"warning: {fault.__name__} is left out" in said


def test_an_observer_that_fails_is_closed_and_a_closed_stderr_stops_nothing(monkeypatch):
    closed: list[bool] = []

    def start(files: ExitStack) -> Callable[..., None]:
        files.callback(closed.append, True)
        files.callback(refuse)
        return refuse

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=refuse, flush=refuse))
    observe = Guarded("one", start)
    observe({"step": 1})
    observe.close()
    assert closed == [True]


def test_a_damaged_file_of_the_run_is_still_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1 must be a JSON object"):
        Guarded("rows", lambda files: metrics_file(tmp_path / "metrics.jsonl", files, 0))


@pytest.fixture
def stepless(tmp_path: Path) -> Config:
    """Of a run that ended after its folder was made."""
    config = ours(tmp_path)
    with in_session(config, {"started": "now"}):
        pass
    for name in ("checkpoints", "wandb/run-1", "tensorboard", "text_vectors"):
        (config.run_folder / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "bad_clips.jsonl", "bad_clips.rank1.jsonl"):
        (config.run_folder / name).touch()
    return config


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_step_is_begun_anew_with_other_settings(resume: bool, stepless: Config):
    mended = ours(stepless.run.folder, "log.wandb=false", "optim.lr=0.5")
    assert begin(mended, resume=resume) is None


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "bad_clips.rank1.jsonl",
        "checkpoints/step-000002",
        "checkpoints/step-000001.old",
        "checkpoints/best",
        "model.safetensors",
        "eval.json",
    ],
)
def test_a_folder_with_anything_of_a_step_is_not_begun_anew(name: str, stepless: Config):
    (stepless.run_folder / name).write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"run\.name must be new"):
        begin(stepless, resume=False)


def test_a_run_without_a_step_that_another_process_trains_is_left_alone(
    prepared: Path, stepless: Config, wandb: Wandb
):
    wandb()
    before = (stepless.run_folder / "config.yaml").read_bytes()
    mended = ours(stepless.run.folder, f"data.train={prepared}/train")
    with run_lock(stepless, Ranks()):
        with pytest.raises(ConfigError, match="by one process at a time"):
            train(mended)
        assert (stepless.run_folder / "lock").is_file()
    assert (stepless.run_folder / "config.yaml").read_bytes() == before


def test_a_config_that_no_run_wrote_is_not_replaced(stepless: Config):
    (stepless.run_folder / "environment.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.name must be new"):
        begin(stepless, resume=False)
