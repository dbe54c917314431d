"""A run with every term on: it logs them, learns them, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.training import setup
from flap_fast.training.loop import train
from tests.tiny import tiny
from tests.training.stopping import train_stopped_after
from tests.triples import write_triples

TERMS = {
    "contrastive": 1.0,
    "sigmoid": 0.5,
    "cyclic_cross": 0.25,
    "cyclic_in": 0.25,
    "simcse": 0.1,
    "nli": 0.2,
    "recon": 0.5,
}
EVERY = (
    *("loss.sigmoid.weight=0.5", "loss.sigmoid.duplicates=positive"),
    "loss.contrastive.duplicates=mask",
    *("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25"),
    *("loss.simcse.weight=0.1", "loss.nli.weight=0.2", "text.dropout=0.1"),
    *("loss.recon.weight=0.5", "decoder.width=16", "decoder.depth=1", "decoder.heads=2"),
)
TIMES = ("clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s")


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 triples: at batches of 8 they begin anew after two steps."""
    return write_triples(tmp_path_factory.mktemp("nli"), 20)


def settings(prepared: Path, triples: Path, runs: Path, name: str, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"run.name={name}", f"data.train={prepared}/train"),
        *(f"data.nli={triples}", "log.every_steps=1", "log.tensorboard=false", "train.steps=5"),
        *("frontend.backend=torch", *EVERY, *overrides),
    )


def rows(config: Config) -> list[dict[str, Any]]:
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(n).items() if k not in TIMES} for n in lines]


@pytest.mark.parametrize("micro", [(), ("train.micro_batch=4", "loss.simcse.on=nli")])
def test_a_run_with_every_term_logs_them_and_resumes_bit_for_bit(
    micro: tuple[str, ...],
    prepared: Path,
    triples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    whole = settings(prepared, triples, tmp_path, "whole", *micro)
    train(whole)
    logged = rows(whole)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    for row in logged:
        assert all(row[name] > 0 for name in TERMS)
        total = sum(weight * row[name] for name, weight in TERMS.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)

    halted = settings(prepared, triples, tmp_path, "halted", *micro)
    train_stopped_after(3, halted)
    train(halted, resume=True)
    assert rows(halted) == logged


def test_sentence_losses_fall_when_they_are_trained_on(
    prepared: Path, triples: Path, tmp_path: Path
):
    alone = ("loss.contrastive.weight=0", "loss.cyclic.cross_weight=0", "loss.cyclic.in_weight=0")
    alone += ("loss.sigmoid.weight=0",)
    long = ("loss.recon.weight=0", "train.steps=40", "optim.lr=3e-3", "sched.warmup_steps=0")
    config = settings(prepared, triples, tmp_path, "alone", *alone, *long)
    train(config)
    logged = rows(config)
    for name in ("simcse", "nli"):
        first, last = (sum(row[name] for row in part) for part in (logged[:4], logged[-4:]))
        assert last < 0.8 * first, f"{name}: {first:.2f} to {last:.2f}"


def test_a_run_that_lacks_sentences_is_refused_before_anything_is_loaded(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(setup, "open_shards", lambda *_: pytest.fail("it opened the shards"))
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=r"data\.nli must be existing files or folders of them"):
        train(settings(prepared, nowhere, tmp_path, "nowhere"))
    for only in (("loss.nli.weight=0", "loss.simcse.on=nli"), ("loss.simcse.weight=0",)):
        with pytest.raises(ConfigError, match=r"data\.nli must name files of sentences for loss"):
            train(settings(prepared, nowhere, tmp_path, "nothing", "data.nli=[]", *only))
    assert not any(tmp_path.iterdir())
