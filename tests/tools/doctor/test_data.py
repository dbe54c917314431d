"""Faults planted into data are named, and data without them are not accused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flap_fast import __main__ as cli
from flap_fast.places import Place
from flap_fast.preparation.prepare import prepare
from flap_fast.tools.doctor import CHECKS
from flap_fast.tools.doctor.caption_text import is_markup, is_mojibake
from flap_fast.tools.doctor.examine import examine, findings
from flap_fast.tools.doctor.language import other_language
from flap_fast.tools.doctor.records import Check, Examined, Found
from tests.serving import serving
from tests.sounds import write_manifest
from tests.tools.doctor.faults import FAULTS
from tests.tools.doctor.sets import SOUND_SETS, write


def accused(*paths: Place, config: Path | None = None) -> dict[str, str]:
    """The checks that found errors or warnings, and the first value of each."""
    found = findings(examine(paths, config=config, threads=1, show=False))
    bad = [f for f in reversed(found) if f.found.severity != "note"]
    return {one.check.name: f"{one.found.where}: {one.found.got}" for one in bad}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("text: {max_tokens: 128}\n")
    return file


@pytest.mark.parametrize("name", SOUND_SETS)
def test_sound_data_are_not_accused(name: str, tmp_path: Path, config: Path):
    assert accused(write(tmp_path / "data", SOUND_SETS[name]()), config=config) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_no_other(name: str, tmp_path: Path, config: Path):
    check, planted = FAULTS[name]
    found = accused(write(tmp_path / "data", planted()), config=config)
    assert list(found) == [check], found


@pytest.mark.parametrize("project", ["fluid", "sonicpi"])
def test_sounds_of_the_demo_are_not_accused(project: str, tmp_path: Path):
    rows = map(json.loads, Path("demo/manifest.jsonl").read_text().splitlines())
    some = [row for row in rows if row["id"].startswith(project)][:60:2]
    rows = ({**row, "audio": str(Path("demo", row["audio"]).resolve())} for row in some)
    assert accused(write_manifest(tmp_path / "manifest.jsonl", rows)) == {}


def test_a_check_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def find(e: Examined) -> list[Found]:
        return [Found("error", split.name, f"{split.clips.count} clips") for split in e.splits]

    check = Check("few clips", "sounds", "be many", "record more", find)
    monkeypatch.setattr("flap_fast.tools.doctor.examine.CHECKS", (*CHECKS, check))
    manifest = write(tmp_path / "data", SOUND_SETS["noises"]())
    assert accused(manifest) == {"few clips": "train: 24 clips"}


def test_shards_are_examined_as_the_manifest_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = write(tmp_path / "data", FAULTS["a recording in two splits"][1]())
    prepare(manifest, tmp_path / "shards", threads=1, show=False)
    both = [accused(manifest), accused(tmp_path / "shards")]
    folders = accused(tmp_path / "shards/train", tmp_path / "shards/val")
    assert both[0] == both[1] == folders
    tars = accused(tmp_path / "shards/train/0.tar", tmp_path / "shards/val/{0..0}.tar")
    assert list(tars) == list(folders)
    with serving(tmp_path / "shards") as served:
        assert accused(served.url / "train", served.url / "val") == folders
    assert both[0] == {"sounds in two splits": "train, val: 3 of the 8 clips of val are in both"}


def test_a_sample_of_each_split_is_examined(tmp_path: Path):
    manifest = write(tmp_path / "data", SOUND_SETS["noises"]())
    e = examine([manifest], sample=5, threads=1, show=False)
    assert [(split.clips.count, len(split.picked)) for split in e.splits] == [(24, 5), (8, 5)]


@pytest.mark.parametrize(("planted", "status"), [("a recording in two splits", 1), ("German", 0)])
def test_the_command_ends_with_1_where_there_are_errors(
    planted: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    check, make = FAULTS[planted]
    manifest, file = write(tmp_path / "data", make()), tmp_path / "found.json"
    arguments = ["flap", "doctor", str(manifest), "--threads", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert int(end.value.code or 0) == status
    answer = json.loads(file.read_text())
    (found,) = [row for row in answer["findings"] if row["severity"] != "note"]
    assert found["check"] == check
    assert answer["splits"]["val"]["clips"] == 8
    printed = capsys.readouterr().out
    assert f"{check}: must {found['rule']}; {found['remedy']}" in printed
    assert "not looked at: tokens (no --config was named)" in printed


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac_roman", "cp437", "cp850"])
def test_utf8_read_as_another_encoding_is_broken(encoding: str):
    assert is_mojibake("it\u2019s a café".encode().decode(encoding))
    assert not is_mojibake("“Été” à la Ænima \u2013 √2, “Äpfel”…")


@pytest.mark.parametrize("text", ["it&#x27;s a dog", "from youtu.be/abc", "a <b>dog</b>"])
def test_entities_links_and_tags_are_markup(text: str):
    assert is_markup(text)
    assert not is_markup("a dog and/or a cat. Be quiet; it is 1/2 as loud & clear")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Pes štěká a pták zpívá na zahradě", "one with accents"),
        ("Seekor anjing menggonggong dan hujan turun di jalan", "Indonesian"),
        ("Un câine latră și o pasăre cântă în grădină", "Romanian"),
        ("một con chó sủa trong khi trời mưa", "one with accents"),
        ("wa\u0308hrend es regnet, bellt der Hund", "German"),
        ("A café's door in the house of José Peña is opened", None),
        ("Röda bells", None),
    ],
)
def test_other_languages_are_told_by_function_words_and_accents(text: str, language: str | None):
    assert other_language(text) == language
