"""What may be enriched: training captions, of shards and manifests, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.data.shards import open_shards, pack
from flap_fast.tools.enrich.sources import open_source
from tests.sounds import encode, tone, write_manifest


def test_a_manifest_gives_its_training_captions_alone(corpus: Path):
    source = open_source(corpus)
    assert [clip.id for clip in source.clips] == [f"clip-{n}" for n in range(24)]
    assert source.clips[0].captions == ["A steady tone of 200 hertz.", "A 200 Hz beep."]
    assert source.left == 15
    assert source.captions == 45
    assert len(source.clips[0].read(8000)) == pytest.approx(0.4 * 8000, abs=1)


def test_shards_give_the_clips_of_their_manifest(corpus: Path, prepared: Path):
    """By their own folder, or the one that holds the splits."""
    wanted = [(clip.id, clip.captions) for clip in open_source(corpus).clips]
    for place in (prepared / "train", prepared):
        source = open_source(place)
        assert [(clip.id, clip.captions) for clip in source.clips] == wanted
        assert len(source.clips[0].read(16_000)) == pytest.approx(0.4 * 16_000, abs=1)


@pytest.mark.parametrize(
    "name",
    [
        "val",
        "Evaluation",
        "eval",
        "my_val",
        "val-mel",
        "clotho-evaluation",
        "test2",
        "validate",
        "dev",
    ],
)
def test_evaluation_captions_are_never_touched(corpus: Path, prepared: Path, tmp_path, name):
    with pytest.raises(ConfigError, match=f"^--split must be for training: .*, got '{name}'"):
        open_source(corpus, name)
    (tmp_path / name).symlink_to(prepared / "val")
    shutil.copytree(prepared / "val", tmp_path / f"x/{name}")
    for folder in (tmp_path / name, tmp_path / f"x/{name}", prepared / "val"):
        with pytest.raises(ConfigError, match=r"^the folder's name must be for training"):
            open_source(folder)


def test_a_development_split_is_of_training(corpus: Path, prepared: Path, tmp_path: Path):
    shutil.copytree(prepared / "train", tmp_path / "clotho-development")
    assert open_source(tmp_path / "clotho-development").captions == 45
    with pytest.raises(ConfigError, match="must hold captions of the split 'development'"):
        open_source(corpus, "development")


def shard(folder: Path, tar: bytes, index: str) -> Path:
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar)
    (folder / "0.idx").write_text(index)
    return folder


def test_clips_without_a_name_are_known_by_their_place(tmp_path: Path):
    sound = encode(tone(440, 0.5, 16_000), 16_000)
    tar, index, _ = pack([(f"{n}", sound, {"text": text}) for n, text in enumerate(("a", [], "b"))])
    folder = shard(tmp_path / "mine", tar, index)
    source = open_source(folder)
    first, last = open_shards([folder]).place[[0, 2], 1].tolist()
    assert [clip.id for clip in source.clips] == [f"0.tar@{first}", f"0.tar@{last}"]
    assert [clip.captions for clip in source.clips] == [["a"], ["b"]]


def test_a_name_for_two_clips_is_refused(tmp_path: Path):
    tar, index, _ = pack([(f"{n}", b"", {"text": "a", "id": "x"}) for n in range(2)])
    folder = shard(tmp_path / "mine", tar, index)
    with pytest.raises(ConfigError, match=r"must name each clip once, got the id 'x' twice"):
        open_source(folder)


def test_the_first_captions_may_be_taken_alone(corpus: Path):
    source = open_source(corpus)
    assert source.first(None) is source
    for captions in (1, 2, 3, 44, 45, 500):
        first = source.first(captions)
        wanted = [text for clip in source.clips for text in clip.captions][:captions]
        assert [text for clip in first.clips for text in clip.captions] == wanted


def test_nothing_to_enrich_is_said(tmp_path: Path, corpus: Path, prepared: Path):
    with pytest.raises(ConfigError, match=r"^SOURCE must hold captions of the split 'other'"):
        open_source(corpus, "other")
    with pytest.raises(ConfigError, match=r"^SOURCE must be a manifest, .*; there is no folder"):
        open_source(prepared, "other")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "none.wav", "caption": "a"}])
    (clip,) = open_source(manifest).clips
    with pytest.raises(BadSound, match="missing"):
        clip.read(8000)
