"""`flap report`: what the page says, and that it needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flap_fast.config.file import dump_config
from flap_fast.preparation.prepare import prepare
from flap_fast.report import page as pages
from flap_fast.report.examples import RetrievalExamples, _extremes
from flap_fast.report.facts import duration
from flap_fast.report.figures import alignment_over_uniformity
from flap_fast.report.page import report
from flap_fast.report.run import read_run
from flap_fast.training.loop import train
from tests.sounds import write_manifest
from tests.test_cli import flap
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report(run).read_text()


def test_names_with_mathematics_tags_and_controls_are_shown_as_they_are(
    run: Path, prepared: Path, tmp_path: Path
):
    odd = "v$^$<i>\x1b[31m\u202e"
    (tmp_path / odd).symlink_to(prepared / "val")
    copy = tmp_path / "a$\\frac<b>\x1b\udce9"
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["val"] = [str(tmp_path / odd)]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    renamed = json.dumps(odd)[1:-1]
    rows = (copy / "metrics.jsonl").read_text()
    assert '"val/' in rows
    (copy / "metrics.jsonl").write_text(rows.replace('"val/', f'"{renamed}/'))
    scores = (copy / "eval.json").read_text()
    (copy / "eval.json").write_text(scores.replace('"val"', f'"{renamed}"'))
    html = report(copy).read_text()
    assert "v$^$&lt;i&gt;\\x1b[31m\\u202e" in html
    assert r"a$\frac&lt;b&gt;\x1b\udce9" in html
    assert not {"\x1b", "\u202e"} & set(html)
    assert not {"i", "b"} & {tag for tag, _ in Tags(html).found}


def section(html: str, name: str) -> str:
    """The part of a page below a heading."""
    return html.split(f'<h2 id="{name}">')[1].split("<h2")[0]


class Tags(HTMLParser):
    """Every tag with its attributes, and that those that open are closed."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_ids_are_unique(page: str):
    tags = Tags(page)
    assert tags.open == []
    ids = [attrs["id"] for _, attrs in tags.found if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert used <= set(ids)


def test_nothing_is_fetched(page: str):
    tags = Tags(page)
    for name in ("src", "href", "xlink:href"):
        for _, attrs in tags.found:
            assert (attrs.get(name) or "data:").startswith(("data:", "#"))
    assert "<script" not in page
    assert "@import" not in page


def test_scores_and_settings_are_those_of_the_run(run: Path, page: str):
    scores = json.loads((run / "eval.json").read_text())["retrieval"]["val"]
    for direction in ("text_to_audio", "audio_to_text"):
        assert f"<td>{100 * scores[direction]['mAP@10']:.2f}</td>" in page
    assert "4 of 4" in page  # steps
    assert "in_weight: 0.25" in page
    assert f"<td>{version('torch')}</td>" in page


def test_each_term_and_each_kept_checkpoint_is_drawn(page: str):
    for label in ("recon", "cyclic in", "contrastive", "step 2", "step 4"):
        assert f">{label}</text>" in page


def test_six_clips_give_three_best_and_three_worst_to_listen_to(page: str):
    assert page.count("<audio") == page.count("data:audio/ogg;base64,T2dnUw") == 6  # OggS
    assert "Similarity of 6 sounds and captions" in page


def test_best_are_first_by_position_and_then_by_cosine():
    own = torch.tensor([3, 0, 0, 9])
    cosines, clip_of_caption = (
        torch.tensor([0.9, 0.1, 0.2, 0.5, 0.0]),
        torch.tensor([0, 1, 1, 2, 3]),
    )
    assert _extremes(own, cosines, clip_of_caption) == ([2, 1], [3, 0])


def test_a_single_clip_has_no_uniformity_to_draw():
    geometry = {2: {"alignment": 1.0, "uniformity_audio": None, "uniformity_text": -1.0}}
    examples = RetrievalExamples("val", "audio", 1, np.ones((1, 1)), [], [], geometry)
    assert alignment_over_uniformity(examples).svg.count(">step 2</text>") == 1


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pages have these sections alone from here on: most of a page's time is its figures'."""

    def keep(*wanted: str) -> None:
        kept = [each for each in pages.SECTIONS if each.id in wanted]
        assert len(kept) == len(wanted)
        monkeypatch.setattr(pages, "SECTIONS", kept)

    return keep


def test_other_runs_stand_beside_it(run: Path, tmp_path: Path, monkeypatch, capsys, only):
    only("compute")
    other = tmp_path / "other"
    other.mkdir()
    config = (run / "config.yaml").read_text().replace("name: a.b", "name: no-masking")
    (other / "config.yaml").write_text(config)
    for file in ("metrics.jsonl", "eval.json"):
        (other / file).write_bytes((run / file).read_bytes())
    out = tmp_path / "page.html"
    assert flap("report", run, other, "--out", out, monkeypatch=monkeypatch) == 0
    assert "one file that fetches nothing" in capsys.readouterr().out
    assert section(out.read_text(), "compute").count(">no-masking</text>") == 2  # one a direction


def copied(run: Path, to: Path, name: str, **of_val: Any) -> Path:
    """A run of another name whose scores differ, in what `of_val` says, from those of `run`."""
    shutil.copytree(run, to, symlinks=True)
    config = (to / "config.yaml").read_text().replace("name: a.b", f"name: {name}")
    (to / "config.yaml").write_text(config)
    scores = json.loads((to / "eval.json").read_text())
    scores["data"]["val"] = of_val.pop("data", scores["data"]["val"])
    scores["retrieval"]["val"] |= of_val
    (to / "eval.json").write_text(json.dumps(scores))
    return to


def test_runs_scored_on_other_data_or_on_pictures_are_named_and_not_drawn(
    run: Path, tmp_path: Path, only
):
    only("compute")
    others = [
        copied(run, tmp_path / "1", "same"),
        copied(run, tmp_path / "2", "elsewhere", data="/other/clotho/val"),
        copied(run, tmp_path / "3", "larger", clips=9999),
        copied(run, tmp_path / "4", "wordier", captions=9999),
        copied(run, tmp_path / "5", "unscored"),
        copied(run, tmp_path / "6", "pictures"),
    ]
    (others[-2] / "eval.json").unlink()
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    clip = tiny_clip(f"data.train={data['train'][0]}", "run.name=pictures")
    (others[-1] / "config.yaml").write_text(dump_config(clip))
    text = report(run, tmp_path / "page.html", others=others).read_text()
    assert text.count(">same</text>") == 2  # one a direction
    for name in ("elsewhere", "larger", "wordier"):
        assert f">{name}</text>" not in text
        assert f"{name} is not drawn over GFLOPs on val: its scores are of " in text
    assert ">pictures</text>" not in text
    assert "unscored is not drawn over GFLOPs on val: it has no scores of that name" in text
    assert (
        "pictures is not drawn over GFLOPs on val: its encoder is of another modality, image"
        in text
    )


def test_captions_are_text_not_markup(run: Path, tmp_path: Path, monkeypatch, only):
    only("examples")
    monkeypatch.setattr(pages, "retrieval_examples", lambda run: ([], ["<b>data</b> & more"]))
    text = report(run, tmp_path / "page.html").read_text()
    assert "&lt;b&gt;data&lt;/b&gt; &amp; more" in text


def test_a_run_that_was_killed_has_a_page(run: Path, tmp_path: Path):
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(rows[:2]) + "\n" + rows[2][:20])
    assert len(read_run(killed).steps) + len(read_run(killed).scored) == 2
    text = report(killed).read_text()
    assert "no checkpoint yet" in text
    assert "no eval.json yet" in text


def test_a_run_on_pictures_shows_them(tmp_path: Path, only):
    rows = []
    for n in range(8):
        Image.new("RGB", (40, 30), (30 * n, 0, 0)).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": f"red {n}", "split": "train"})
    prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "data", show=False)
    data = (f"data.train={tmp_path}/data/train", f"data.val={tmp_path}/data/train")
    train(tiny_clip(f"run.folder={tmp_path}", "train.steps=1", *data))
    text = report(tmp_path / "flap").read_text()
    assert text.count("data:image/jpeg;base64,") == 8
    assert "<audio" not in text
    assert "<dt>image encoder</dt>" in text
    assert "Similarity of 8 images and captions" in text
    assert "a caption finds its image, %" in text
    assert "<dt>train: image to text</dt>" in text
    # As older versions wrote it.
    file = tmp_path / "flap/eval.json"
    old = json.loads(
        file.read_text().replace("image_to", "audio_to").replace("to_image", "to_audio")
    )
    old["retrieval"]["train"]["sense"] = "image"
    file.write_text(json.dumps(old))
    only("scores", "settings")  # the next heading ends the section
    again = report(tmp_path / "flap").read_text()
    assert section(again, "scores") == section(text, "scores")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "must be a folder with config.yaml"),
        ("", "must have reached its first row in metrics.jsonl"),
        ("nonsense\n{}\n", ":1 must be a JSON object with a step, got 'nonsense'"),
        ("[1]\n{}\n", ":1 must be a JSON object with a step, got '[1]'; take out the line"),
        (b"\xff\n{}\n", ":1 must be a JSON object with a step, got '\ufffd'"),
    ],
)
def test_what_is_no_run_is_refused(rows, message, run: Path, tmp_path: Path, monkeypatch, capsys):
    if rows is not None:
        (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
        (tmp_path / "metrics.jsonl").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    assert flap("report", tmp_path, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [('{"a', "be JSON: "), ("[]", "hold an object")])
def test_a_damaged_environment_is_named(
    text: str, message: str, run: Path, tmp_path: Path, monkeypatch, capsys
):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "environment.json").write_text(text)
    for command in ("report", "doctor"):
        assert flap(command, tmp_path, monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert f"error: {tmp_path}/environment.json must {message}" in said


def scored_once(run: Path, to: Path) -> Path:
    """A run as the demo is: scored at its last step alone, with one row of steps."""
    shutil.copytree(run, to, symlinks=True)
    rows = (to / "metrics.jsonl").read_text().splitlines(keepends=True)
    (to / "metrics.jsonl").write_text("".join(rows[-2:]))
    return to


def test_what_has_one_point_is_said_in_numbers(run: Path, page: str, tmp_path: Path, only):
    only("training")
    scores = json.loads((run / "eval.json").read_text())["retrieval"]["val"]
    text = section(report(scored_once(run, tmp_path / "once")).read_text(), "training")
    assert "<svg" not in text
    for direction in ("text_to_audio", "audio_to_text"):
        name, value = direction.replace("_", " "), 100 * scores[direction]["mAP@10"]
        assert f"<dt>val: {name}</dt><dd>{value:.2f} %</dd>" in text
    assert section(page, "training").count("<svg") == 10
    assert "<dl" not in section(page, "training")


def test_the_scores_of_every_task_are_drawn(run: Path, tmp_path: Path, only):
    only("training")
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    rows = [
        {"step": s, "val/zero_shot/top_1": s / 9, "val/geometry/uniformity_text": -s, "eval_s": 1}
        for s in (2, 4)
    ]
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text = report(tmp_path / "run").read_text()
    for title, last in (
        ("top 1 on data.val, %", "val: zero shot from 22.22 % to 44.44 %"),
        ("uniformity text on data.val", "val: geometry from -2 to -4"),
    ):
        assert f"<figcaption>{title}</figcaption>" in text
        assert f"{title} by step: {last}" in text
    assert "eval_s" not in section(text, "training")


def test_fractions_are_percent_on_the_whole_page(page: str):
    found = section(page, "training")
    for title in ("R@10 on data.val, %", "R@1 within a batch, %", "Time that waits for data, %"):
        assert f"<figcaption>{title}</figcaption>" in found
        label = re.search(f'aria-label="{re.escape(title)} by step: ([^"]*)"', found)
        assert label
        values = [float(v) for v in re.findall(r"([\d.]+) %", label[1])]
        assert len(values) >= 2
        assert any(1 < v <= 100 for v in values)
    assert "a caption finds its sound, %" in page


def test_one_run_alone_has_no_figure_of_runs_beside_each_other(page: str):
    assert 'id="compute"' not in page
    assert "GFLOPs of" not in page


def test_chance_stands_apart_from_the_model(page: str):
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">([^<]*)', section(page, "scores"))
    assert rows == [("ours", "this model"), ("chance", "chance")]


def test_the_run_says_its_command_code_duration_and_parameters(run: Path, tmp_path: Path, only):
    only("run", "settings")
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    found = {"command": "flap train <a>.yaml", "commit": "0123456789abcdef", "dirty": True}
    found |= {"duration_s": 3700.0, "outcome": "stopped after step 4", "started": "2026-11-01"}
    found |= {"parameters": 24_674_113, "parameters_trained": 2_108_737, "device": "H200"}
    earlier = {"started": "2026-10-30", "ranks": "8", "torch": "2.0"}  # as of before, or killed
    found |= {"ranks": "4", "torch": "2.14", "earlier_sessions": [earlier]}
    (copy / "environment.json").write_text(json.dumps(found))
    text = report(copy).read_text()
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", section(text, "run")))
    assert "flap train &lt;a&gt;.yaml" in section(text, "run")
    assert facts["code"] == "0123456789 with uncommitted changes"
    assert facts["duration"] == "at least 1 h 1 min in 2 sessions"
    assert facts["ended"] == "stopped after step 4"
    assert facts["parameters"] == "24.7 M, 2.11 M trained"
    assert facts["device"] == "4 ranks, each H200"
    settings = section(text, "settings")
    assert ">2026-10-30</th><td>-</td><td>not known</td>" in settings
    assert "earlier_sessions" not in settings
    (copy / "environment.json").write_text(json.dumps(earlier))
    old = report(copy).read_text()
    assert not {"code", "duration", "ended"} & set(re.findall("<dt>([^<]*)", section(old, "run")))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (12_000, "3 h 20 min"),
     (187_200, "2 d 4 h")],
)  # fmt: skip
def test_durations_are_said_in_their_own_units(seconds: float, said: str):
    assert duration(seconds) == said
