"""What is deleted or overwritten: only files that this project wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.commands.prepare import _write_sentences
from flap_fast.files import ManifestError, write_atomically
from flap_fast.preparation.prepare import prepare
from flap_fast.tools.embed_files import embed_files
from flap_fast.training.run_folder import begin
from tests.tiny import tiny


@pytest.mark.parametrize("name", ["a.json.notes.part", "a.json.v2.part", "b.json.0123abcd.part"])
def test_a_write_deletes_no_file_whose_name_only_begins_or_ends_as_its_own(tmp_path, name):
    (tmp_path / name).write_text("mine")
    left = tmp_path / "a.json.0123abcd.part"
    left.write_text("of a writer that was killed")
    write_atomically(tmp_path / "a.json", b"{}")
    assert (tmp_path / name).read_text() == "mine"
    assert not left.exists()


@pytest.mark.parametrize("name", ["embeddings.npy", "sounds.jsonl", "rejected.jsonl"])
def test_embeddings_do_not_replace_files_of_others(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"OUT must be new or made by flap embed, got .*{name}"):
        embed_files(tmp_path / "model", [], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["rejected.jsonl", "train/sizes.json", "train/0.idx"])
def test_shards_do_not_replace_files_of_others(tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    manifest = tmp_path / "m.jsonl"
    row = {"audio": str(manifest), "caption": "a tone", "split": "train"}
    manifest.write_text(json.dumps(row))
    with pytest.raises(ManifestError, match=rf"got '.*{name}', which is not one of them"):
        prepare(manifest, tmp_path / "out", show=False)
    assert file.read_text() == "mine"


def test_sentences_do_not_replace_a_file_of_the_same_name(tmp_path: Path):
    _write_sentences({"train": [{"a": 1}]}, tmp_path)
    _write_sentences({"train": [{"a": 1}]}, tmp_path)
    with pytest.raises(ConfigError, match=r"OUT must be new or hold the same .*train\.jsonl"):
        _write_sentences({"dev": [], "train": [{"a": 2}]}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_new_run_does_not_drop_the_rows_of_metrics_without_a_config(tmp_path: Path):
    config = tiny(f"run.folder={tmp_path}")
    config.run_folder.mkdir()
    (config.run_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"must hold the config\.yaml of its metrics\.jsonl"):
        begin(config, resume=False)
