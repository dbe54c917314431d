"""The registry of evaluations, and that a new one is a file and a line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from flap_fast.evaluation import TASKS, load_evaluation
from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.sheet import Sheet
from flap_fast.training.loop import train
from tests.copies import ROOT, flap
from tests.tiny import tiny

PARTS = {
    "name": "hubness",
    "data": "clips",
    "check": lambda model, texts: None,
    "score": lambda model, embeddings: {},
    "sheet": lambda name, found, path: Sheet("title", ("system",), [("this model",)]),
    "metrics": None,
}


@pytest.mark.parametrize("name", TASKS)
def test_every_file_holds_its_record(name: str):
    assert load_evaluation(name).name == name


def test_a_file_without_its_record_is_refused():
    with pytest.raises(TypeError, match=r"papers\.py must hold EVALUATION = Evaluation\(name='pap"):
        load_evaluation("papers")


def test_the_registry_loads_no_pytorch():
    code = "import sys, flap_fast.evaluation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("missing", PARTS)
def test_no_part_may_be_left_out(missing: str):
    with pytest.raises(TypeError, match=missing):
        Evaluation(**{name: part for name, part in PARTS.items() if name != missing})
    assert {field.name for field in fields(Evaluation)} == {*PARTS, "terminal", "selects", "pooled"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sheet": None}, "sheet of the evaluation hubness must be a function, got None"),
        ({"data": "sounds"}, "data of .* must be one of clips, sentences, settings, got 'sounds'"),
        ({"metrics": ("skew",)}, "metrics of .* must be a function or None"),
        ({"selects": "skew"}, "selects of .* must be a function or None"),
        ({"data": "settings", "metrics": dict}, "metrics of .* must be None unless data"),
        (
            {"data": "sentences", "pooled": True},
            "pooled of .* must be False unless data",
        ),
        ({"name": "data"}, "name of .* must be an identifier other than 'data'"),
    ],
)
def test_parts_of_another_kind_are_refused(wrong: dict, message: str):
    with pytest.raises(TypeError, match=message):
        Evaluation(**{**PARTS, **wrong})


@pytest.mark.parametrize(
    ("rows", "message"), [([], "must have a row"), ([("a", "b")], "must have 1 cells")]
)
def test_a_table_without_rows_or_cells_is_refused(rows: list, message: str):
    with pytest.raises(ValueError, match=message):
        Sheet("title", ("system",), rows)


HUBNESS = '''
"""Hubness: how unevenly clips are among the nearest of captions.

    skewness of N_k over clips, N_k how many captions have the clip among their k nearest

Source: Radovanovic et al., Hubs in Space, JMLR 11 (2010).
"""

from flap_fast.evaluation.record import Evaluation
from flap_fast.evaluation.geometry import require_captions
from flap_fast.evaluation.sheet import Sheet

K = 3


def check(model, texts):
    require_captions(len(texts.captions))


def score(model, e):
    nearest = (e.text @ e.media.T).topk(min(K, len(e.media))).indices
    counts = nearest.flatten().bincount(minlength=len(e.media)).double()
    spread = counts - counts.mean()
    skew = spread.pow(3).mean() / spread.square().mean().clamp(min=1e-9).pow(1.5)
    return {"skew": skew.item(), "k": K}


def sheet(name, found, path):
    ours = ("this model", str(found["k"]), f"{found['skew']:.3f}")
    return Sheet(f"Hubness, {name}", ("system", "k", "skew"), [ours], note="0 is even.")


EVALUATION = Evaluation(
    name="hubness",
    data="clips",
    check=check,
    score=score,
    sheet=sheet,
    metrics=lambda found: {"hubness": found["skew"]},
)
'''
LINE = "    # one line for each evaluation\n"


def test_a_new_evaluation_is_a_file_and_a_line(prepared: Path, tmp_path: Path):
    """As CONTRIBUTING says: evaluate/NAME.py, and NAME in `TASKS` of evaluate/__init__.py."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "flap_fast", tree / "flap_fast")
    (tree / "flap_fast/evaluation/hubness.py").write_text(HUBNESS)
    registry = tree / "flap_fast/evaluation/__init__.py"
    text = registry.read_text()
    assert text.count(LINE) == 1
    registry.write_text(text.replace(LINE, f'    "hubness",\n{LINE}'))
    data = (f"data.train={prepared}/train", f"data.val={prepared}/val", f"run.folder={tmp_path}")
    run, out = tmp_path / "flap", tmp_path / "scores"
    settings = ("train.steps=2", "log.tensorboard=false", "frontend.backend=torch")
    config = tiny(*data, *settings)
    train(config)

    again = tmp_path / "again"
    of_both = "eval.tasks=[retrieval,hubness]"
    of_markup = ("--markdown", f"{out}.md", "--latex", f"{out}.tex")
    explained, printed, *_ = flap(
        tree,
        ("eval", "--help"),
        ("eval", run, prepared / "val", "--tasks", "hubness,retrieval", *of_markup),
        ("train", run / "config.yaml", f"run.folder={tmp_path}", "run.name=again", of_both),
        ("report", again),
    )
    assert "hubness" in explained
    skew = json.loads((run / "eval.json").read_text())["hubness"]["val"]["skew"]
    assert "Hubness, val" in printed
    assert f"{skew:.3f}" in printed
    assert f"| this model | 3 | {skew:.3f} |" in Path(f"{out}.md").read_text()
    assert rf"this model & 3 & {skew:.3f} \\" in Path(f"{out}.tex").read_text()
    # Training there scores it on data.val, and the report shows it.
    rows = [json.loads(line) for line in (again / "metrics.jsonl").open()]
    assert rows[-1]["val/hubness"] == pytest.approx(skew, abs=1e-6)
    assert "<h3>Hubness, val</h3>" in (again / "report.html").read_text()
