"""The page's section of what `flap doctor` found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.report.doctor import doctor_section
from flap_fast.report.page import report
from flap_fast.tools.doctor.records import Check, Examined, Finding, Found
from flap_fast.tools.doctor.tables import as_json
from flap_fast.training.loop import train
from tests.tiny import tiny

CHECK = Check("a <b>fault</b>", "sounds", "be right", "mend it", lambda e: [])


def answer(*found: Found) -> str:
    return json.dumps(as_json(Examined(tiny(), []), [Finding(CHECK, one) for one in found]))


def test_the_page_has_errors_with_their_remedies_and_no_section_without(
    prepared: Path, tmp_path: Path
):
    train(tiny(f"run.folder={tmp_path}", f"data.train={prepared}/train", "train.steps=1"))
    run = tmp_path / "flap"
    assert "What flap doctor found" not in report(run).read_text()
    error, note = (
        Found("error", "val", "2 of 3", examples=("x < y",)),
        Found("note", "train", "one"),
    )
    (run / "doctor.json").write_text(answer(error, note))
    page = report(run).read_text()
    assert "a &lt;b&gt;fault&lt;/b&gt;, val: 2 of 3" in page
    assert "must be right; mend it. For example x &lt; y" in page
    assert "1 errors, 0 warnings, 1 notes" in page


@pytest.mark.parametrize("text", ["", "[]", '{"findings": 3}', '{"findings": [{}], "counts": {}}'])
def test_another_file_of_that_name_is_refused(text: str, tmp_path: Path):
    (tmp_path / "doctor.json").write_text(text)
    with pytest.raises(ConfigError, match=r"doctor\.json must be an answer of flap doctor: "):
        doctor_section(tmp_path)
