"""Training steps: each case is a config of the project, and its numbers reach the targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import training_step
from bench.report_gpu import gpu_sections
from bench.targets import TARGETS
from flap_fast.config.file import load_config

TINY = training_step.Case("tiny", "configs/tiny.yaml", ("train.global_batch=4",), 1)


@pytest.mark.parametrize("case", training_step.CASES, ids=lambda case: case.name)
def test_every_case_is_a_config(case):
    config = load_config(Path(case.config), list(case.settings))
    assert config.train.global_batch in (288, 4608)


def test_a_case_is_profiled_and_one_that_fails_says_why(tmp_path: Path, monkeypatch):
    absent = training_step.Case("absent", "configs/tiny.yaml", ("no.such=1",))
    monkeypatch.setattr(training_step, "CASES", (TINY, absent))
    file = tmp_path / "results"
    training_step.main([str(file)])
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    (row,) = first["training_steps"]
    assert row["clips_per_s"] == pytest.approx(4 / row["step_ms"] * 1000)
    assert first["figures"] == {"tflops": row["tflops"], "clips_per_s": row["clips_per_s"]}
    assert second["training_steps"][0]["reason"].startswith("failed: ")
    assert "no is not a setting" in second["training_steps"][0]["reason"]
    assert second["figures"] == {}
    text = "\n".join(gpu_sections({"training_steps": [row, *second["training_steps"]]}))
    assert "| tiny |" in text
    assert "| absent | failed: " in text


def test_the_targets_of_a_step_are_figures_of_its_cases():
    row = {"tflops": 401.0, "clips_per_s": 1.0, "global_batch": 4608}
    cases = [{"name": case.name, **row} for case in training_step.CASES]
    figures = {name: x for case in cases for name, x in training_step.figures(case).items()}
    result = {"rows": [], "figures": figures}
    values = [t.value(result) for t in TARGETS if "step" in t.what or t.unit == "clips"]
    assert values == [401.0, 4608]
