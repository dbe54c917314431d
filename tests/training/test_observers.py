"""Metrics and observers of a run."""

from __future__ import annotations

import json
import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.progress import Task

from flap_fast.data.batch import BadClip
from flap_fast.ranks import Ranks
from flap_fast.training.observers import (
    Metrics,
    NotFinite,
    Row,
    RunPace,
    TimeLeft,
    in_batch_recall,
    metrics_file,
    observers,
    report_bad_clips,
    tensorboard,
    terminal,
)
from flap_fast.training.run_folder import cut_after
from tests.tiny import tiny

OUTPUTS: Any = {"media": torch.eye(4), "text": torch.eye(4)[[0, 1, 3, 2]], "scale": torch.ones(())}


def terms(total: float = 2.0, norm: float = 1.0) -> dict[str, torch.Tensor]:
    return {"total": torch.tensor(total), "contrastive": torch.tensor(total),
            "grad_norm": torch.tensor(norm)}  # fmt: skip


def metrics(rows: list[Row], *overrides: str, steps: int = 100) -> Metrics:
    config = tiny("log.every_steps=2", "run.folder=nowhere", *overrides)
    return Metrics(config, Ranks(), steps, [rows.append])


def test_in_batch_recall_is_the_share_of_sounds_that_find_their_caption():
    assert in_batch_recall(OUTPUTS) == 0.5


def test_a_row_comes_every_so_many_steps_and_at_the_end():
    rows: list[Row] = []
    recorded = metrics(rows, steps=5)
    for step in range(1, 6):
        recorded.step(step, 0, 0.1, OUTPUTS, terms(), {})
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[0]["loss"] == rows[0]["contrastive"] == 2
    assert rows[0]["in_batch_R@1"] == 0.5


def test_waiting_for_data_and_clips_per_second_are_measured():
    rows: list[Row] = []
    recorded = metrics(rows)

    def slow():
        for batch in range(2):
            time.sleep(0.05)
            yield batch

    for step, _ in enumerate(recorded.timed(slow()), 1):
        time.sleep(0.05)
        recorded.step(step, 0, 0.1, OUTPUTS, terms(), {})
    assert 0.3 < rows[0]["data_wait"] < 0.7
    assert rows[0]["step_ms"] >= 100
    assert rows[0]["clips_per_s"] == pytest.approx(8 * 1000 / rows[0]["step_ms"], rel=0.01)


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (2.0, float("inf"))])
def test_the_first_step_that_is_not_finite_is_named(bad: tuple[float, float]):
    recorded = metrics([], steps=9)
    recorded.step(1, 0, 0.1, OUTPUTS, terms(), {})
    recorded.step(3, 0, 0.1, OUTPUTS, terms(*bad), {})
    recorded.step(5, 0, 0.1, OUTPUTS, terms(*bad), {})
    with pytest.raises(NotFinite, match=r"at step 3;.* in a new run: run\.name=ANOTHER$"):
        recorded.check_finite()


def test_a_resumed_run_writes_over_the_rows_it_repeats(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with ExitStack() as files:
        metrics_file(file, files, 2)({"step": 3, "loss": 1.0})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 1.0},
    ]
    cut_after(tmp_path / "none.jsonl", 3)  # nothing to cut is no error


def test_a_validation_set_of_any_name_is_shown_as_it_is(capsys):
    with ExitStack() as open_files:
        observe = terminal(tiny(), open_files, 0, 4)
        observe({"step": 2, "a[/b]\x1b[2J/audio_to_text/R@1": 0.5})
    assert r"step 2  a[/b]\x1b[2J/audio_to_text/R@1 0.500" in capsys.readouterr().err


def a_row(step: int, step_ms: float) -> Row:
    numbers = dict.fromkeys(("loss", "in_batch_R@1", "clips_per_s", "data_wait"), 0.25)
    return {"step": step, "step_ms": step_ms, **numbers}


def test_the_time_left_stays_between_rows_however_far_apart_they_are(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = RunPace(first=0, steps=100)
    column, task = TimeLeft(pace), cast("Task", None)
    assert column.render(task).plain == ""
    for step in (10, 20):
        now[0] += 40
        pace.add(a_row(step, 4000))
    assert pace.left_s() == pytest.approx(80 * 4)
    now[0] += 300  # rich forgets a bar's steps after 30 s
    assert column.render(task).plain == "0:00:20 left"
    now[0] += 300
    assert column.render(task).plain == "0:00:00 left"


def test_the_time_left_is_smoothed_and_counts_evaluations():
    pace = RunPace(first=100, steps=200)
    for step in range(101, 111):
        pace.add(a_row(step, 1000))
    pace.add(a_row(111, 11_000))  # one slow row
    assert pace.left_s() == pytest.approx(89 * 2.0, abs=0.1)
    pace.add({"step": 111, "val/audio_to_text/R@1": 0.5, "eval_s": 22.0})  # 2 s a step so far
    assert pace.left_s() == pytest.approx(89 * 4.0, abs=0.1)


def test_a_log_has_the_time_left_in_each_row(capsys):
    with ExitStack() as open_files:
        observe = terminal(tiny(), open_files, 0, 4)
        observe(a_row(2, 30_000))
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(r"^step 2/4  loss .*  0:01:00 left$", said.err, re.MULTILINE)


def test_tensorboard_shows_every_number(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with ExitStack() as files:
        config = tiny(f"run.folder={tmp_path}", "log.tensorboard=true")
        config.run_folder.mkdir()
        for observe in observers(config, Ranks(), files, first=0, steps=4):
            observe(
                {
                    "step": 2,
                    "loss": 1.5,
                    **dict.fromkeys(("in_batch_R@1", "clips_per_s", "data_wait"), 0.25),
                }
            )
            observe({"step": 4, "val/audio_to_text/R@1": 0.75})
    events = EventAccumulator(str(config.run_folder / "tensorboard")).Reload()
    (loss,), (score,) = events.Scalars("loss"), events.Scalars("val/audio_to_text/R@1")
    assert (loss.step, loss.value) == (2, 1.5)
    assert (score.step, score.value) == (4, 0.75)


@pytest.mark.parametrize("first", [0, 2])
def test_tensorboard_shows_a_step_that_was_done_again_once(first: int, tmp_path: Path):
    """As --resume does it, from the checkpoint of a step or, without one, from the start."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, value in ((0, 1.0), (first, 2.0)):
        with ExitStack() as files:
            observe = tensorboard(tmp_path, files, begun)
            for step in range(begun + 1, 5):
                observe({"step": step, "loss": value})
        for file in tmp_path.glob("events.out.tfevents.[0-9]*"):  # of a second ago, by its name
            file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))
    points = [(e.step, e.value) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]
    assert points == [(step, 1.0 if step <= first else 2.0) for step in range(1, 5)]


def test_only_the_first_rank_writes(tmp_path: Path):
    with ExitStack() as files:
        config = tiny(f"run.folder={tmp_path}")
        assert observers(config, Ranks(rank=1, world=2), files, first=0, steps=4) == []


def test_bad_clips_are_noted_by_rank_and_said_once(tmp_path: Path, capsys):
    bad = [BadClip(4, "0.tar at byte 512", "unreadable", "0.tar at byte 9216")]
    report_bad_clips(tmp_path, Ranks(), bad)
    assert bad == []
    said = capsys.readouterr().err
    assert "step 5: 0.tar at byte 512 cannot be used (unreadable)" in said
    report_bad_clips(tmp_path, Ranks(rank=3, world=4), [BadClip(1, "a", "b", "c")])
    noted = {f.name: json.loads(f.read_text())["step"] for f in tmp_path.iterdir()}
    assert noted == {"bad_clips.jsonl": 5, "bad_clips.rank3.jsonl": 2}


def test_a_resumed_run_notes_a_bad_clip_again_in_place_of_the_first_time(tmp_path: Path):
    config = tiny(f"run.folder={tmp_path}", "log.tensorboard=false")
    config.run_folder.mkdir()
    files = [config.run_folder / name for name in ("bad_clips.jsonl", "bad_clips.rank3.jsonl")]
    for file in files:
        file.write_text('{"step": 2}\n{"step": 3}\n')
    with ExitStack() as open_files:
        observers(config, Ranks(), open_files, first=2, steps=4)
    assert [file.read_text() for file in files] == ['{"step": 2}\n'] * 2
