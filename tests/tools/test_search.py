"""An index of sounds: only what is new is embedded, and what is nearest is found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.waveform import Unread, read_pieces
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.search import (
    File,
    Index,
    Rows,
    find_sounds,
    open_index,
    plan_update,
    update_index,
)
from tests.sounds import encode, tone
from tests.tiny import tiny

RATE = 16_000


def make(seed: int) -> Embedder:
    config = tiny("frontend.threads=2")
    torch.manual_seed(seed)
    return Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return make(0)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Four tones in two folders, a sound that is none, and a text."""
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    for n, name in enumerate(("a.wav", "b.FLAC", "deep/c.ogg", "d.wav")):
        kind = name.rpartition(".")[2].upper()
        (folder / name).write_bytes(encode(tone(300 + 100 * n, 1.0, RATE), RATE, kind))
    (folder / "broken.mp3").write_bytes(b"no sound at all")
    (folder / "notes.txt").write_text("no sound")
    return folder


def update(file: Path, embedder: Embedder, folders: Sequence[Path], crop: str = "center"):
    """The index, and how many sounds were embedded for it."""
    seen: list[int] = []
    planned = plan_update(file, embedder, find_sounds(folders), crop)
    index = update_index(file, embedder, planned, crop=crop, advance=lambda: seen.append(1))
    return index, len(seen)


def names(index: Index) -> list[str]:
    return [path.name for path in index.paths]


def test_sounds_are_found_below_a_folder_and_by_name(sounds: Path, tmp_path: Path):
    found = find_sounds([sounds])
    assert [f.name for f in found] == ["a.wav", "b.FLAC", "broken.mp3", "d.wav", "c.ogg"]
    assert find_sounds([sounds / "d.wav", sounds])[0].name == "d.wav"
    assert len(find_sounds([sounds / "d.wav", sounds])) == 5
    with pytest.raises(ConfigError, match="a sound must be an existing file or folder"):
        find_sounds([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"got 'none in {tmp_path}/empty'"):
        find_sounds([tmp_path / "empty"])


def test_linked_folders_are_searched_too_each_once(sounds: Path, tmp_path: Path):
    """Also what leads back to itself; a folder's own name is above those of links to it."""
    away = tmp_path / "away"
    away.mkdir()
    (away / "e.wav").write_bytes(b"")
    (sounds / "ab").symlink_to(away)
    (sounds / "aa").symlink_to(sounds / "deep")
    (away / "back").symlink_to(sounds)
    (sounds / "nowhere.wav").symlink_to(tmp_path / "nowhere")
    found = [str(f.relative_to(sounds)) for f in find_sounds([sounds])]
    assert found == ["a.wav", "ab/e.wav", "b.FLAC", "broken.mp3", "d.wav", "deep/c.ogg"]


def test_an_index_in_a_linked_folder_knows_where_its_sounds_are(
    sounds: Path, embedder: Embedder, tmp_path: Path, monkeypatch
):
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/deep")
    index, _ = update(tmp_path / "link/index", embedder, [sounds])
    assert index.paths[0] == sounds / "a.wav"
    # Seen from the working folder, as the index was named.
    monkeypatch.chdir(sounds / "deep")
    index, _ = update(Path("index"), embedder, [sounds])
    assert index.paths[0] == Path("../a.wav")


def test_only_what_is_new_or_changed_is_embedded(sounds: Path, embedder: Embedder, tmp_path: Path):
    file = tmp_path / "index"
    index, embedded = update(file, embedder, [sounds])
    assert embedded == 5
    assert names(index) == ["a.wav", "b.FLAC", "d.wav", "c.ogg"]
    assert [f.path for f in index.rejected] == ["sounds/broken.mp3"]
    assert "broken.mp3: unreadable" in str(index.rejected[0].error)
    assert torch.allclose(index.embeddings, embedder.embed_audio(index.paths), atol=1e-5)
    # Again: nothing, not even the broken one; and the file is left as it is.
    before = file.stat().st_mtime_ns
    again, embedded = update(file, embedder, [sounds])
    assert embedded == 0
    assert torch.equal(again.embeddings, index.embeddings)
    assert file.stat().st_mtime_ns == before
    # One is changed, one goes, one comes.
    (sounds / "a.wav").write_bytes(encode(tone(5000, 1.0, RATE), RATE, "WAV"))
    (sounds / "d.wav").unlink()
    (sounds / "broken.mp3").write_bytes(encode(tone(900, 1.0, RATE), RATE, "MP3"))
    changed, embedded = update(file, embedder, [sounds])
    assert embedded == 2
    assert names(changed) == ["a.wav", "b.FLAC", "broken.mp3", "c.ogg"]
    assert torch.allclose(changed.embeddings, embedder.embed_audio(changed.paths), atol=1e-5)
    assert not changed.rejected
    assert torch.equal(open_index(file).embeddings, changed.embeddings)
    assert open_index(file).paths == changed.paths


def test_a_search_of_one_sound_keeps_the_index_of_the_others(
    sounds: Path, embedder: Embedder, tmp_path: Path
):
    file = tmp_path / "index"
    whole, _ = update(file, embedder, [sounds])
    one, embedded = update(file, embedder, [sounds / "a.wav"])
    assert (names(one), embedded, one.rejected) == (["a.wav"], 0, [])
    # Also where that one is embedded again; of the others one is gone.
    (sounds / "a.wav").write_bytes(encode(tone(5000, 1.0, RATE), RATE, "WAV"))
    (sounds / "d.wav").unlink()
    one, embedded = update(file, embedder, [sounds / "a.wav"])
    assert (names(one), embedded) == (["a.wav"], 1)
    assert names(open_index(file)) == ["a.wav", "b.FLAC", "c.ogg"]
    again, embedded = update(file, embedder, [sounds])
    assert (names(again), embedded) == (["a.wav", "b.FLAC", "c.ogg"], 0)
    assert torch.equal(again.embeddings[1:], whole.embeddings[[1, 3]])


def test_what_the_system_does_not_let_us_read_is_tried_again(
    sounds: Path, embedder: Embedder, tmp_path: Path, monkeypatch
):
    def refusing(file: Path, *rest):
        if file.name == "b.FLAC":
            raise Unread("unreadable: System error.")
        return read_pieces(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("flap_fast.tools.sounds.read_pieces", refusing)
        index, _ = update(tmp_path / "index", embedder, [sounds])
        assert [Path(file.path).name for file in index.rejected] == ["b.FLAC", "broken.mp3"]
        assert update(tmp_path / "index", embedder, [sounds])[1] == 1
    index, embedded = update(tmp_path / "index", embedder, [sounds])
    assert embedded == 1
    assert names(index) == ["a.wav", "b.FLAC", "d.wav", "c.ogg"]
    assert update(tmp_path / "index", embedder, [sounds])[1] == 0


def test_another_model_or_crop_embeds_all_again(sounds: Path, embedder: Embedder, tmp_path: Path):
    file = tmp_path / "index"
    update(file, embedder, [sounds])
    planned = plan_update(file, make(1), find_sounds([sounds]), "center")
    assert (len(planned.kept), len(planned.new), planned.rebuild_reason) == (
        0,
        5,
        "another model made it",
    )
    planned = plan_update(file, embedder, find_sounds([sounds]), "whole")
    assert (len(planned.new), planned.rebuild_reason) == (5, "its crops are center")


def test_an_interruption_keeps_what_was_done(sounds: Path, embedder: Embedder, tmp_path: Path):
    file = tmp_path / "index"
    seen = 0

    def stop_at_the_third() -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    planned = plan_update(file, embedder, find_sounds([sounds]), "center")
    with pytest.raises(KeyboardInterrupt):
        update_index(file, embedder, planned, batch=1, advance=stop_at_the_third)
    assert len(open_index(file).rows) == 3
    index, embedded = update(file, embedder, [sounds])
    assert embedded == 2
    assert torch.allclose(index.embeddings, embedder.embed_audio(index.paths), atol=1e-5)


def test_an_index_moves_with_its_sounds(sounds: Path, embedder: Embedder, tmp_path: Path):
    update(sounds / ".flap-index", embedder, [sounds])
    moved = tmp_path / "moved"
    os.rename(sounds, moved)
    index, embedded = update(moved / ".flap-index", embedder, [moved])
    assert embedded == 0
    assert index.paths[0] == moved / "a.wav"


def test_what_is_no_index_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="the index must be an existing file"):
        open_index(tmp_path / "no")
    (tmp_path / "bad").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="bad must be an index of flap, delete it"):
        open_index(tmp_path / "bad")


def fake_index(rows: torch.Tensor) -> Index:
    files: Rows = {File(f"{n:03d}.wav", 1, 1): row for n, row in enumerate(rows)}
    return Index(Path("index"), "model", "center", files)


def test_an_index_that_changed_in_one_bit_is_named_or_says_the_same(tmp_path: Path):
    torch.manual_seed(0)
    index = fake_index(torch.randn(3, 8))
    index.file = tmp_path / ".flap-index"
    index.save()
    good, refused = index.file.read_bytes(), 0
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        index.file.write_bytes(changed)
        try:
            found = open_index(index.file)
        except ConfigError:
            refused += 1
            continue
        assert (found.model, found.crop, list(found.rows)) == ("model", "center", list(index.rows))
        assert torch.equal(found.embeddings, index.embeddings)
    assert refused > 0.95 * len(good)  # the rest is in the name of the format


@pytest.mark.parametrize("rows", [torch.empty(0, 8), torch.ones(2, 8)])
def test_an_index_is_read_as_it_was_written_also_without_digest(rows: torch.Tensor, tmp_path: Path):
    index = fake_index(rows)
    index.file = tmp_path / "index"
    index.save()
    assert list(open_index(index.file).rows) == list(index.rows)
    about = {"model": "model", "crop": "center", "files": [asdict(file) for file in index.rows]}
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file({"embeddings": index.embeddings, "about": text}, index.file)
    assert list(open_index(index.file).rows) == list(index.rows)


@pytest.mark.parametrize("faiss", [True, False])
def test_the_nearest_are_the_same_with_faiss_and_without(faiss: bool, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    draws = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(300, 16, generator=draws), dim=1)
    rows[100:104] = rows[7]  # equal ones: by their paths
    queries = torch.cat([rows[7:8], torch.randn(2, 16, generator=draws)])
    found = fake_index(rows).nearest(queries, 5)
    assert [path.name for path, *_ in found[0]] == [f"{n:03d}.wav" for n in (7, 100, 101, 102, 103)]
    for query, answers in zip(queries, found, strict=True):
        cosines = rows.double() @ query.double()
        best = cosines.argsort(descending=True, stable=True)[:5].tolist()
        assert [path.name for path, *_ in answers] == [f"{n:03d}.wav" for n in best]
        assert [match.cosine for match in answers] == pytest.approx(
            cosines[best].tolist(), abs=1e-9
        )


@pytest.mark.parametrize("faiss", [True, False])
def test_of_many_equal_sounds_the_first_by_path_are_found(faiss: bool, monkeypatch):
    if faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    rows = torch.eye(16)[:1].repeat(300, 1)
    rows[250, 1] = 1.0  # nearer to the second query by 2^-30, which float32 does not see
    queries = torch.tensor([[1.0, 0.0], [1.0, 2.0**-30]])
    found = fake_index(rows).nearest(torch.nn.functional.pad(queries, (0, 14)), 4)
    assert [[path.name for path, *_ in some] for some in found] == [
        ["000.wav", "001.wav", "002.wav", "003.wav"],
        ["250.wav", "000.wav", "001.wav", "002.wav"],
    ]


def test_fewer_sounds_than_asked_and_none(embedder: Embedder):
    assert len(fake_index(torch.eye(16)[:3]).nearest(torch.eye(16)[:1], 10)[0]) == 3
    assert fake_index(torch.empty(0, 16)).nearest(torch.eye(16)[:2]) == [[], []]
