"""A trace of a running job's steps, asked for by a file in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from flap_fast.config import Config
from flap_fast.ranks import Ranks
from flap_fast.training import trace
from flap_fast.training.trace import tracing
from tests.tiny import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = tiny(f"run.folder={tmp_path}", "log.every_steps=2")
    made.run_folder.mkdir()
    return made


def run(config: Config, *, steps: int = 8, ranks: Ranks | None = None) -> Iterator[int]:
    """Some work in each step; pauses after each."""
    with ExitStack() as files:
        after = tracing(config, ranks or Ranks(), files)
        for step in range(1, steps + 1):
            with torch.profiler.record_function(f"work of step {step}"):
                torch.ones(4, 4).mm(torch.ones(4, 4))
            after({"step": step})
            yield step


def traced(config: Config) -> dict[str, list[int]]:
    """The steps in each file."""
    found = {}
    for file in sorted((config.run_folder / "traces").glob("*")):
        names = {event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]}
        found[file.name] = sorted(int(n.split()[-1]) for n in names if n.startswith("work of"))
    return found


def test_the_next_steps_are_traced_and_the_request_is_taken(config: Config, capsys):
    asked = config.run_folder / "trace"
    for step in run(config):
        if step == 1:
            asked.write_text("3\n")
    assert traced(config) == {"step-000003.json": [3, 4, 5]}
    assert not asked.exists()
    assert "step-000003.json: open it in ui.perfetto.dev" in capsys.readouterr().err


def test_a_run_that_ends_before_writes_what_there_is(config: Config):
    (config.run_folder / "trace").write_text("50")
    list(run(config, steps=4))
    assert traced(config) == {"step-000003.json": [3, 4]}


def test_one_request_after_another_and_one_rank_alone(config: Config):
    asked = config.run_folder / "trace"
    for step in run(config, steps=10):
        if step in (1, 4):
            asked.write_text("2")
    assert traced(config) == {"step-000003.json": [3, 4], "step-000007.json": [7, 8]}
    asked.write_text("2")
    list(run(config, ranks=Ranks(rank=1, world=2)))
    assert asked.exists()


@pytest.mark.parametrize("text", ["", "0", "51", "all", "-1", "1.5"])
def test_another_text_is_named_and_traces_nothing(text: str, config: Config, capsys):
    (config.run_folder / "trace").write_text(text)
    list(run(config))
    said = capsys.readouterr().err
    assert said.count("trace must hold a number of steps from 1 to 50, got") == 1
    assert traced(config) == {}


def test_training_goes_on_where_the_trace_cannot_be_written_or_is_too_large(
    config: Config, monkeypatch, capsys
):
    asked, folder = config.run_folder / "trace", config.run_folder / "traces"
    asked.write_text("1")
    monkeypatch.setattr(trace, "_MOST_EVENTS", 0)
    assert list(run(config)) == list(range(1, 9))
    assert "traces/step-000003.json must have at most 0 events, got " in capsys.readouterr().err
    monkeypatch.undo()
    folder.write_text("no folder")
    asked.write_text("1")
    assert list(run(config)) == list(range(1, 9))
    said = capsys.readouterr().err
    assert said.count("warning: the trace of steps is left out of the rest of this run, got") == 1


def test_steps_that_are_not_traced_look_for_no_file(config: Config, monkeypatch):
    looked: list[Path] = []
    monkeypatch.setattr(Path, "is_file", lambda file: bool(looked.append(file)))
    list(run(config))
    assert len(looked) == 4  # every second of 8
