"""The registry of sources: what lists them follows it, and one file and one line add one."""

from __future__ import annotations

import shutil
from typing import get_type_hints

from flap_fast.commands.prepare import prepare
from flap_fast.data.shards import open_shards
from flap_fast.preparation.sources import SOURCES, sources_table
from tests.copies import ROOT, flap
from tests.sounds import encode, tone

RECORD = '''
"""Birdcalls: a folder of sounds that are called as one hears them."""

from pathlib import Path

from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.layout import Source


def read(folder: Path) -> list[Entry]:
    files = sorted(folder.glob("*.wav"))
    return [Entry(n, file, [f"A {file.stem}."], file.stem) for n, file in enumerate(files, 1)]


BIRDCALLS = Source(name="birdcalls", kind="sounds", folder="*.wav", splits="train", read=read)
'''
LINE = "from flap_fast.preparation.sources.birdcalls import BIRDCALLS\n"


def test_the_page_on_data_and_the_help_list_every_source():
    assert sources_table() in (ROOT / "docs/data.md").read_text()
    hints = get_type_hints(prepare, include_extras=True, localns={"Prepared": object})
    (option,) = hints["source"].__metadata__
    assert f"{', '.join(SOURCES)};" in option.help


def test_each_source_is_registered_under_a_name_of_its_own():
    files = {file.stem for file in (ROOT / "flap_fast/preparation/sources").glob("*.py")}
    readers = files - {"__init__", "layout", "karpathy"}
    assert {source.read.__module__.rpartition(".")[2] for source in SOURCES.values()} == readers
    assert len(SOURCES) == len(readers) + 2  # MusicCaps is split in two ways, WavCaps read in two


def test_one_file_and_one_line_add_a_source(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(ROOT / "flap_fast", package / "flap_fast")
    sources = package / "flap_fast/preparation/sources"
    (sources / "birdcalls.py").write_text(RECORD)
    lines = (sources / "__init__.py").read_text().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if line.startswith("from "))
    (sources / "__init__.py").write_text("".join([*lines[: last + 1], LINE, *lines[last + 1 :]]))
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "cuckoo.wav").write_bytes(encode(tone(667, 0.3, 16_000), 16_000, "WAV"))

    flap(package, ("prepare", "--source", "birdcalls", folder, "out"))
    assert open_shards([package / "out/train"]).record(0)["text"] == ["A cuckoo."]
    asked = ("prepare", "--source", "birdsongs", folder, "out")
    (said,) = flap(package, asked, refused=True)
    assert "nli, birdcalls, got 'birdsongs'" in said
