"""bench/speedrun.py: a record is the median of all seeds, and only of a target that was reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import speedrun
from flap_fast.config.file import load_config


@pytest.fixture
def trainings(monkeypatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Trainings that each leave the same scores."""
    ran: list[tuple[str, ...]] = []

    def run(*arguments: str, threads: int | None = None) -> None:
        ran.append(arguments)
        assert threads == 2
        folder = Path(next(s for s in arguments if s.startswith("run.folder=")).partition("=")[2])
        score = {"audio_to_text": {"R@10": 0.9}, "text_to_audio": {"R@10": 0.8}}
        (folder / "run").mkdir()
        (folder / "run/eval.json").write_text(json.dumps({"retrieval": {"val": score}}))

    monkeypatch.setattr(speedrun, "flap", run)
    monkeypatch.setattr(speedrun, "machine", lambda device: MACHINE)
    monkeypatch.setattr(speedrun, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    return ran


MACHINE = {
    "device": "x",
    "driver": None,
    "cuda": None,
    "cpu": "x",
    "threads": 2,
    "memory_gib": 1.0,
    "load": 0.0,
    "system": "x",
    "python": "3",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "dirty": False,
    "date": "2026-11-29T00:00:00Z",
}


def test_a_target_that_is_reached_both_ways_is_stored(
    trainings: list[tuple[str, ...]], tmp_path: Path
):
    assert speedrun.main(["demo-80", "--write", "the first"]) == 0
    assert [next(s for s in c if s.startswith("run.seed=")) for c in trainings] == [
        f"run.seed={seed}" for seed in speedrun.SEEDS
    ]
    (file,) = speedrun.RESULTS.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["reached"]
    assert stored["change"] == "the first"
    table = (tmp_path / "bench/SPEEDRUN.md").read_text()
    assert "| 0.900 / 0.800 | 5 | the first | abc | 2026-11-29 |" in table
    assert "## audiocaps" in table
    assert "Not measured. `python -m bench.speedrun audiocaps`." in table


def test_a_target_missed_in_one_direction_is_no_record(trainings: list[tuple[str, ...]]):
    assert speedrun.main(["demo-90", "--write", "faster"]) == 1
    assert not speedrun.RESULTS.exists() or not list(speedrun.RESULTS.glob("*.json"))


def test_a_slower_run_is_no_record(
    trainings: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    working = speedrun.trained

    def took(seconds: float) -> None:
        monkeypatch.setattr(speedrun, "trained", lambda *a: (seconds, working(*a)[1]))

    took(7.0)
    assert speedrun.main(["demo-80", "--write", "the first"]) == 0
    took(9.0)
    assert speedrun.main(["demo-80", "--write", "slower"]) == 1
    assert "demo-80: no record, 7.0 s is; nothing is stored" in capsys.readouterr().out
    (file,) = speedrun.RESULTS.glob("*.json")
    assert json.loads(file.read_text())["change"] == "the first"


def test_a_record_takes_all_seeds(trainings: list[tuple[str, ...]], capsys):
    with pytest.raises(SystemExit):
        speedrun.main(["demo-80", "--seeds", "2", "--write", "luck"])
    assert "--write must come with all 5 seeds, got 2" in capsys.readouterr().err
    assert not trainings


@pytest.mark.parametrize("name", speedrun.TRACKS)
def test_the_tracks_are_trainings_that_a_config_describes(name: str):
    track = speedrun.TRACKS[name]
    config = load_config(Path(track.config), track.settings)
    assert config.data.train
    assert config.data.val
