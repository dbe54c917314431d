"""Faults of runs are named: curves, weights, embeddings; a run without them is not accused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.data.tar_members import ShardError
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.places import Url
from flap_fast.tensors import save_tensors
from flap_fast.tools.doctor import towers
from flap_fast.tools.doctor.curves import chance_loss
from flap_fast.tools.doctor.examine import examine, findings
from flap_fast.tools.doctor.records import Embedded, Examined
from tests.test_cli import flap
from tests.tiny import tiny
from tests.tools.hub import serving

Weights = dict[str, Tensor]


def rows(**changes: Callable[[int], float]) -> list[dict[str, float]]:
    """The metrics of 40 steps that learn, in batches of 8."""
    healthy: dict[str, Callable[[int], float]] = {
        "loss": lambda n: math.log(8) * 0.95**n,
        "contrastive": lambda n: math.log(8) * 0.95**n,
        "grad_norm": lambda n: 1 + 1 / n,
        "scale": lambda n: 14 + n / 10,
        "in_batch_R@1": lambda n: min(1, 1 / 8 + n / 50),
        "lr": lambda n: 1e-3 / n,
        "data_wait": lambda n: 0.05,
    }
    return [
        {"step": n, **{k: change(n) for k, change in (healthy | changes).items()}}
        for n in range(1, 41)
    ]


def write_run(folder: Path, config: Config, metrics: list[dict[str, float]]) -> Path:
    """A run's folder without checkpoints."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def checkpoint(run: Path, step: int, config: Config, weights: Weights) -> None:
    """Write a checkpoint of a run, without its optimizer."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    save_model(folder, config, TwoTowers(config, weights=False), weights)
    (folder / "state.json").write_text("{}")


def accused(run: Path) -> list[str]:
    """The checks that found errors or warnings in a run."""
    found = findings(examine([run], threads=1, show=False))
    return [one.check.name for one in found if one.found.severity != "note"]


CURVES: dict[str, tuple[str, list[dict[str, float]]]] = {
    "the loss stays at ln(batch)": ("loss at chance", rows(contrastive=lambda n: math.log(8))),
    "recall stays at chance": ("recall at chance", rows(**{"in_batch_R@1": lambda n: n % 8 / 30})),
    "the scale is at its clamp": ("scale at its clamp", rows(scale=lambda n: min(100, 40 * n))),
    "the learning rate is 0": ("no steps", rows(lr=lambda n: 0)),
    "there are no gradients": ("no steps", rows(grad_norm=lambda n: 0)),
    "steps wait for data": ("waiting for data", rows(data_wait=lambda n: 0.8)),
    "the loss rises again": (
        "a loss that rises again",
        rows(contrastive=lambda n: math.log(8) * (0.95**n if n < 25 else 0.8)),
    ),
    "a score is not a number": (
        "values not finite",
        [*rows(), {"step": 40, "val/score": math.nan}],
    ),
    "the loss is not a number": ("values not finite", rows(loss=lambda n: math.nan)),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_with_a_fault_is_named(name: str, tmp_path: Path):
    check, metrics = CURVES[name]
    assert accused(write_run(tmp_path / "run", still(), metrics)) == [check]


def test_the_loss_of_chance_counts_what_is_compared():
    local = ("train.accumulation=local", "train.micro_batch=2")
    prefixes = ("loss.contrastive.prefixes=[4,16]", "loss.contrastive.prefix_weights=[1,0.5]")
    assert chance_loss(tiny(), 2) == pytest.approx(math.log(8))
    assert chance_loss(tiny(*local), 2) == pytest.approx(math.log(4))
    assert chance_loss(tiny(*prefixes), 1) == pytest.approx(1.5 * math.log(8))
    negatives = tiny("loss.contrastive.negatives=1")
    assert chance_loss(negatives, 1) == pytest.approx((math.log(16) + math.log(8)) / 2)


@pytest.fixture(scope="module")
def first() -> Weights:
    """The weights of `still` at random."""
    torch.manual_seed(0)
    return TwoTowers(still()).state_dict()


def still(*overrides: str) -> Config:
    """A run whose data are gone."""
    return tiny("data.train=nowhere", "sched.warmup_steps=2", *overrides)


def trained(weights: Weights, *towers: str) -> Weights:
    """The weights after steps that move some towers."""
    return {n: v + 1e-3 if n.startswith(towers) else v for n, v in weights.items()}


def test_a_tower_that_does_not_move_is_named_unless_it_is_frozen(tmp_path: Path, first: Weights):
    for name, frozen in (("run", "false"), ("frozen", "true")):
        config = still(f"text.freeze={frozen}")
        run = write_run(tmp_path / name, config, rows())
        checkpoint(run, 20, config, first)
        checkpoint(run, 40, config, trained(first, "audio."))
        wanted = [] if frozen == "true" else ["a tower that does not move"]
        assert accused(run) == wanted


def test_a_tower_without_gradients_is_named_by_the_optimizer(tmp_path: Path, first: Weights):
    run = write_run(tmp_path / "run", still(), rows())
    checkpoint(run, 40, still(), first)
    file = run / "checkpoints/step-000040/optimizer.safetensors"
    moments = {f"{n}/exp_avg": torch.ones(1) * n.startswith("text.") for n in first}
    save_tensors(file, moments)
    (found,) = findings(examine([run], threads=1, show=False))
    assert found.check.name == "a tower that does not move"
    assert "the audio tower" in found.found.got


def test_weights_that_are_not_finite_are_named(tmp_path: Path, first: Weights):
    run, name = write_run(tmp_path / "run", still(), rows()), next(iter(first))
    checkpoint(run, 40, still(), {**first, name: first[name] * math.nan})
    assert accused(run) == ["weights not finite"]


def test_another_front_end_than_the_first_weights_is_named(tmp_path: Path, first: Weights):
    (tmp_path / "begin").mkdir()
    (tmp_path / "begin/config.yaml").write_text(dump_config(still("audio.mean=-5")))
    config = still(f"train.init_audio_from={tmp_path / 'begin'}")
    run = write_run(tmp_path / "run", config, rows())
    checkpoint(run, 40, config, first)
    assert accused(run) == ["another front end than the weights'"]


def test_the_front_end_of_weights_on_the_hub_is_compared(
    tmp_path: Path, first: Weights, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "begin").mkdir()
    (tmp_path / "begin/config.yaml").write_text(dump_config(still("audio.mean=-5")))
    (tmp_path / "begin/model.safetensors").write_bytes(b"large")
    config = still("train.init_from=hf://me/clap")
    run = write_run(tmp_path / "run", config, rows())
    checkpoint(run, 40, config, first)
    with serving(monkeypatch, tmp_path / "cache") as hub:
        (note,) = findings(examine([run], threads=1, show=False))
        assert note.found.severity == "note"
        assert "train.init_from cannot be compared: hf://me/clap must be a repo" in note.found.got
        hub.put("me/clap", tmp_path / "begin")
        assert accused(run) == ["another front end than the weights'"]
        assert hub.sent == ["config.yaml"]


def test_weights_to_begin_with_that_are_gone_are_noted(tmp_path: Path, first: Weights):
    config = still(f"train.init_from={tmp_path / 'gone'}")
    run = write_run(tmp_path / "run", config, rows())
    checkpoint(run, 40, config, first)
    (note,) = findings(examine([run], threads=1, show=False))
    assert note.found.severity == "note"
    assert f"must be an existing YAML file, got '{tmp_path}/gone/config.yaml'" in note.found.got


def test_data_at_a_url_that_is_gone_are_named_at_once(
    tmp_path: Path, first: Weights, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("a doctor must not wait"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/{0..3}.tar"
    config = still(f"data.val=['{url}']", f"data.train={tmp_path}")
    run = write_run(tmp_path / "run", config, rows(loss=lambda n: math.nan))
    checkpoint(run, 40, config, first)
    e = examine([run], threads=1, show=False)
    why = "http://127.0.0.1:9/0.tar cannot be read: .* refused.*; try again later$"
    assert re.match(why, e.lacking["sounds"])
    assert [one.check.name for one in findings(e)] == ["values not finite"]
    with pytest.raises(ShardError, match=f"^{why}"):
        examine([Url(url)], threads=1, show=False)


def unit(seed: int, spread: float) -> Tensor:
    """64 unit rows around one direction."""
    made = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(torch.eye(16)[:1] + spread * made, dim=1)


EMBEDDINGS = {
    "pairs": (unit(0, 1), unit(0, 1) + 0.1 * unit(1, 1), []),
    "the text tower collapsed": (unit(0, 1), unit(0, 0.01), ["a collapsed tower"]),
    "the audio tower collapsed, to chance": (
        unit(0, 0.01),
        unit(0, 1),
        ["a collapsed tower", "pairs at chance"],
    ),
    "captions of other clips": (unit(0, 1), unit(1, 1), ["pairs at chance"]),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_with_a_fault_are_named(name: str):
    media, text, wanted = EMBEDDINGS[name]
    text = torch.nn.functional.normalize(text, dim=1)
    sample = Embedded("val", media, text, [f"caption {n}" for n in range(64)])
    e = Examined(tiny(), [], embedded=sample)
    checks = (towers.COLLAPSED, towers.UNRELATED)
    assert [check.name for check in checks if list(check.find(e))] == wanted


def test_the_mean_cosine_is_that_of_all_pairs():
    rows = unit(3, 0.5)
    pairs = (rows @ rows.T).triu(1).sum() / (64 * 63 / 2)
    assert towers.mean_cosine(rows) == pytest.approx(pairs.item(), abs=1e-6)


@pytest.fixture
def run(prepared: Path, tmp_path: Path, first: Weights) -> Path:
    """A run with its data, whose text tower collapsed."""
    config = still(f"data.train={prepared}/train", f"data.val=[{prepared}/val]")
    head = max(n for n in first if n.startswith("text_head.") and n.endswith("weight"))
    folder = write_run(tmp_path / "run", config, rows())
    checkpoint(folder, 40, config, {**first, head: torch.zeros_like(first[head])})
    return folder


def test_a_run_is_examined_with_its_data_and_its_model(run: Path):
    e = examine([run], threads=1, show=False)
    assert [(split.name, len(split.picked)) for split in e.splits] == [("train", 24), ("val", 6)]
    collapsed = next(f for f in findings(e) if f.check.name == "a collapsed tower")
    assert (collapsed.found.severity, collapsed.found.where) == ("error", "the text tower")
    assert e.lacking == {}


def test_embeddings_that_are_not_finite_are_an_error_beside_the_others(run: Path, first: Weights):
    large = {n: v * 1e38 if n.startswith("audio.blocks.0.mlp.fc1") else v for n, v in first.items()}
    config = load_config(run / "config.yaml")
    checkpoint(run, 41, config, large)
    e = examine([run], threads=1, show=False)
    (bad,) = (f.found for f in findings(e) if f.check.name == "embeddings not finite")
    assert bad.severity == "error"
    assert "got NaN or infinity for 6 of 6, the first of " in bad.got
    assert e.lacking == {"embeddings": "they are not finite"}


def test_what_was_found_is_written_into_a_run_and_not_into_a_model(run: Path, monkeypatch):
    model = run / "checkpoints/step-000040"
    before = sorted(file.name for file in model.iterdir())
    assert flap("doctor", model, "--embed", "0", monkeypatch=monkeypatch) == 0
    assert sorted(file.name for file in model.iterdir()) == before
    assert flap("doctor", run, monkeypatch=monkeypatch) == 1
    answer = json.loads((run / "doctor.json").read_text())
    assert answer["counts"]["error"] == 1
    assert answer["not looked at"] == {}


def test_a_run_beside_another_or_with_another_config_is_refused(run: Path):
    with pytest.raises(ConfigError, match="a run's folder must be named once, before all DATA"):
        examine([run, run], show=False)
    with pytest.raises(ConfigError, match="--config must be left out with a run"):
        examine([run], config=run / "config.yaml", show=False)
