"""The public functions, and the tutorial that shows them."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import flap_fast
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.ranks import join_ranks
from tests.ranks import on_ranks
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]


def settings(prepared: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"data.train={prepared}/train", f"data.val={prepared}/val"),
        *("frontend.backend=torch", "log.every_steps=1", "log.tensorboard=false", *overrides),
    )


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    flap_fast.train(settings(prepared, runs))
    return runs / "flap"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for name in ("demo", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/tutorial.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    assert len(names["losses"]) == 12 // names["config"].log.every_steps + (12 % 5 > 0)
    assert names["scores"]["retrieval"] == names["found"]["retrieval"]
    assert names["audio"].shape == names["text"].shape == (4, names["config"].joint.width)
    assert "text_to_audio {'R@1'" in capsys.readouterr().out


def test_observers_get_the_rows_of_metrics_jsonl(prepared: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = []
    flap_fast.train(settings(prepared, tmp_path), observers=[rows.append])
    assert rows == list(map(json.loads, (tmp_path / "flap/metrics.jsonl").open()))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_what_an_observer_does_to_its_row_no_other_sees(prepared: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = []
    observers = [dict.clear, lambda row: rows.append(dict(row)), dict.clear]
    flap_fast.train(settings(prepared, tmp_path), observers=observers)
    assert rows == list(map(json.loads, (tmp_path / "flap/metrics.jsonl").open()))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_an_observer_that_fails_is_named_and_left_out(prepared: Path, tmp_path: Path, capsys):
    calls = []

    def mine(row: dict[str, Any]) -> None:
        calls.append(row["step"])
        raise KeyError("loss of another project")

    assert flap_fast.train(settings(prepared, tmp_path), observers=[mine]) is not None
    assert calls == [1]
    assert "KeyError" in capsys.readouterr().err


def test_a_run_trains_on_another_thread(prepared: Path, tmp_path: Path):
    """Where Python lets nobody answer signals: as in a server or some notebooks."""
    found: list[Any] = []
    config = settings(prepared, tmp_path)
    thread = threading.Thread(target=lambda: found.append(flap_fast.train(config)))
    thread.start()
    thread.join()
    assert found[0]["retrieval"]


def test_evaluate_gives_what_training_found(run: Path, prepared: Path):
    ours = json.loads((run / "eval.json").read_text())["retrieval"]["val"]
    for model in (run, str(run), flap_fast.load(run, "cpu")):
        found = flap_fast.evaluate(model, prepared / "val")
        assert found["retrieval"]["val"] == ours
    both = flap_fast.evaluate(run, [prepared / "val", prepared / "train"], ["geometry"])
    assert both["geometry"].keys() == {"val", "train"}
    assert "retrieval" not in both


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "nowhere"}, "must be a run's folder or a folder with"),
        ({"tasks": "zero"}, "a task must be one of retrieval"),
        ({"classes": "dog"}, "classes must be a list of names, got 'dog'"),
        ({"crops": "whole"}, "eval.crops is not a setting"),
        ({"crop": "all"}, "eval.crop must"),
        *(({"model": wrong}, r"model must be .*load gives, got") for wrong in (None, 3, [1], b"x")),
        *(({"data": wrong}, r"data must be a place or a list") for wrong in (None, 3, b"x", True)),
        ({"data": [3]}, "data must be a path or a URL, got '3'"),
        *(
            ({"tasks": wrong}, "tasks must be a name or a list of names, got")
            for wrong in (None, 3)
        ),
        *(({"classes": wrong}, "classes must be a list of names, got") for wrong in (None, 3, [1])),
    ],
)
def test_what_cannot_be_scored_is_named(
    given: dict[str, Any], message: str, run: Path, prepared: Path
):
    arguments: dict[str, Any] = {"model": run, "data": prepared / "val"} | given
    with pytest.raises(ConfigError, match=message):
        flap_fast.evaluate(**arguments)


@pytest.mark.parametrize("file", [3, b"x", [1], {}, True])
def test_a_config_that_is_no_file_is_named(file: Any):
    with pytest.raises(ConfigError, match="the config must be a file's path, got"):
        flap_fast.load_config(file)


@pytest.mark.parametrize("overrides", [None, 3, [3], [None], b"x", True])
def test_overrides_that_are_none_are_named(overrides: Any):
    with pytest.raises(
        TypeError, match=r"overrides must be a list such as \['mask.kind=1d'\], got"
    ):
        flap_fast.load_config(None, overrides)


def test_what_cannot_be_trained_is_named():
    wrong: Any = "configs/demo.yaml"
    with pytest.raises(ConfigError, match="config must be a Config, got 'str'; read one with"):
        flap_fast.train(wrong)
    for wrong in (3, print, "wandb", None, [3]):
        with pytest.raises(ConfigError, match="observers must be a list of functions"):
            flap_fast.train(tiny(), observers=wrong)


def train_as_under_torchrun(port: int, configs: list[Config]) -> list[float]:
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    found = [flap_fast.train(config) for config in configs]
    join_ranks()  # `on_ranks` leaves them
    return [scores["retrieval"]["val"]["audio_to_text"]["mAP@10"] for scores in found if scores]


def test_a_script_under_torchrun_trains_several_runs(prepared: Path, tmp_path: Path):
    pytest.importorskip("deepspeed")
    same = "train.steps=1", "train.zero_stage=2"
    configs = [settings(prepared, tmp_path, f"run.name={name}", *same) for name in "ab"]
    # torchrun's store is its own, and outlives the ranks' process groups.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for first, second in on_ranks(2, train_as_under_torchrun, store.port, configs, timeout_s=40):
        assert first == second


def test_a_loaded_model_is_not_scored_at_another_length_in_silence(run: Path, prepared: Path):
    with pytest.raises(ConfigError, match=r"length must be left out .*got 'variable'"):
        flap_fast.evaluate(flap_fast.load(run), prepared / "val", length="variable")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shard_clips": -5}, "shard_clips must be at least 1.*, got -5"),
        ({"shard_clips": 2.5}, "shard_clips must be at least 1, a whole number, got 2.5"),
        ({"threads": -1}, "threads must be at least 0.*, got -1"),
        ({"sample_rate_hz": 0}, "sample_rate_hz must be a whole number of Hz from 1000 .*, got 0"),
        # libsndfile writes it, and cannot read it.
        ({"sample_rate_hz": 96_001}, "sample_rate_hz must .* a multiple of 10, got 96001"),
        ({"distributor": "ray2"}, "distributor must be one of threads, ray, got 'ray2'"),
        ({"shard_range": "1/2"}, r"shard_range must be a ShardRange, got '1/2'; write .*\(1, 8\)"),
        ({"cache": "mel"}, "cache must be the front end of a config, got 'mel'; load_config"),
        ({"val_fraction": "0.1"}, "val_fraction must be a number, got '0.1'"),
        *(
            ({"shard_clips": value}, "shard_clips must be .* a whole number")
            for value in (None, "8", True)
        ),
        *(({"threads": value}, "threads must be .* a whole number") for value in (None, 1.5)),
        *(
            ({"sample_rate_hz": value}, "sample_rate_hz must be a whole")
            for value in (None, "8", 1e4)
        ),
        ({"distributor": None}, "distributor must be one of threads, ray"),
    ],
)
def test_prepare_names_what_would_fail_later_or_leave_clips_out(
    wrong: dict[str, Any], said: str, tmp_path: Path
):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "caption": "x"}\n')
    with pytest.raises(ConfigError, match=said):
        flap_fast.prepare(tmp_path / "m.jsonl", tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "of"), [(0, 2), (3, 2), (-1, 2)])
def test_a_shard_range_that_would_leave_shards_out_cannot_be_made(number: int, of: int):
    with pytest.raises(ConfigError, match=f"the A-th of B, with A from 1 to B, got '{number}/{of}"):
        ShardRange(number, of)


@pytest.mark.parametrize("out", [None, 5, b"out", ""])
def test_prepare_names_an_out_that_is_no_path(out: Any, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^out must be the path of a folder, got "):
        flap_fast.prepare("m.jsonl", out)
