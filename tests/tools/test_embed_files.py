"""Many sounds to one array: the same bytes whoever does it, however often it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.waveform import BadSound, Unread, read_pieces
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.tools.embed_files import Embedded, embed_files
from flap_fast.tools.embedder import Embedder, load
from flap_fast.tools.search import find_sounds
from tests.sounds import encode, tone
from tests.tiny import tiny

RATE = 16_000
SOUNDS = 12


def model(folder: Path, seed: int) -> Path:
    config = tiny("frontend.threads=2")
    torch.manual_seed(seed)
    flap = TwoTowers(config)
    save_model(folder, config, flap, flap.state_dict())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Tones, of which every fourth is none; one has a name that is no UTF-8."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for n in range(SOUNDS):
        data = encode(tone(200 + 50 * n, 1.0, RATE), RATE, "WAV")
        (folder / f"{n:02d}.wav").write_bytes(data if n % 4 else b"no sound")
    (folder / "01.wav").rename(os.fsdecode(os.fsencode(folder) + b"/01-\xe9t\xe9.wav"))
    return folder


class Progress:
    """Counts the sounds that a call should embed and embedded; stops it at the `stop`-th."""

    def __init__(self, stop: int | None = None):
        self.total, self.seen, self.stop = 0, 0, stop

    @contextmanager
    def __call__(self, what, total: int) -> Iterator:
        self.total = total
        yield self.advance

    def advance(self, sounds: int) -> None:
        self.seen += sounds
        if self.seen == self.stop:
            raise KeyboardInterrupt


def run(checkpoint: Path, sounds: Path, out: Path, **kwargs) -> Embedded:
    """Embed in chunks of three sounds on average, in batches of two."""
    settings: dict[str, Any] = {"batch": 2, "chunk_sounds": 3} | kwargs
    return embed_files(checkpoint, find_sounds([sounds]), out, **settings)


def contents(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def chunks(out: Path) -> set[str]:
    return {file.name for file in (out / ".embed").iterdir()}


def names(file: Path) -> list[str]:
    return [json.loads(line)["audio"] for line in file.read_text().splitlines()]


def test_rows_are_the_sounds_that_can_be_read_in_their_order(checkpoint, sounds, tmp_path):
    out = tmp_path / "out"
    assert run(checkpoint, sounds, out) == Embedded(9, 3)
    good = names(out / "sounds.jsonl")
    assert good == [str(f) for f in find_sounds([sounds]) if f.stat().st_size > 100]
    assert [Path(name).name for name in names(out / "rejected.jsonl")] == [
        "00.wav",
        "04.wav",
        "08.wav",
    ]
    rows = np.load(out / "embeddings.npy")
    assert rows.dtype == np.float32
    assert np.abs(rows - load(checkpoint).embed_audio(good).numpy()).max() < 1e-5
    assert 2 < len(chunks(out)) < SOUNDS


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_of_several_machines_are_the_bytes_of_one(checkpoint, sounds, tmp_path, order):
    run(checkpoint, sounds, tmp_path / "one")
    out = tmp_path / "parts"
    done = []
    for number in order:
        assert not (out / "embeddings.npy").exists()
        done.append(run(checkpoint, sounds, out, shard_range=ShardRange(number, 3)))
    assert done[0].unfinished > done[1].unfinished > 0
    assert done[2] == Embedded(9, 3)
    assert contents(out) == contents(tmp_path / "one")


def test_a_resumed_call_gives_the_same_bytes(checkpoint, sounds, tmp_path):
    run(checkpoint, sounds, tmp_path / "one")
    out = tmp_path / "stopped"
    first, second, third = Progress(stop=8), Progress(), Progress()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, sounds, out, progress=first)
    assert 0 < len(chunks(out)) < len(chunks(tmp_path / "one"))
    run(checkpoint, sounds, out, progress=second)
    assert first.total == SOUNDS
    assert second.seen == second.total < SOUNDS
    assert contents(out) == contents(tmp_path / "one")
    run(checkpoint, sounds, out, progress=third)
    assert third.total == 0


def test_sounds_added_removed_or_changed_affect_only_their_chunks(checkpoint, sounds, tmp_path):
    run(checkpoint, sounds, tmp_path / "out")
    (sounds / "03.wav").write_bytes(encode(tone(5000, 0.5, RATE), RATE, "WAV"))
    (sounds / "06.wav").unlink()
    (sounds / "00.wav").write_bytes(encode(tone(900, 1.0, RATE), RATE, "WAV"))
    watch = Progress()
    assert run(checkpoint, sounds, tmp_path / "out", progress=watch) == Embedded(9, 2)
    assert 0 < watch.total < SOUNDS - 1
    run(checkpoint, sounds, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_another_model_crop_or_batch_embeds_all_again(checkpoint, sounds, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, sounds, out)
    was = chunks(out)
    other = model(tmp_path / "other", 1)
    for path, kwargs in ((checkpoint, {"crop": "whole"}), (checkpoint, {"batch": 3}), (other, {})):
        watch = Progress()
        run(path, sounds, out, progress=watch, **kwargs)
        assert watch.total == SOUNDS
        assert not chunks(out) & was
        was = chunks(out)


def test_a_chunk_with_a_sound_that_the_system_failed_to_read_is_pending(
    checkpoint, sounds, tmp_path, monkeypatch
):
    def refusing(file: Path, *rest):
        if file.name == "06.wav":
            raise Unread("unreadable: System error.")
        return read_pieces(file, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("flap_fast.tools.sounds.read_pieces", refusing)
        assert run(checkpoint, sounds, out) == Embedded(8, 4)
    assert "06.wav" in {Path(name).name for name in names(out / "rejected.jsonl")}
    watch = Progress()
    assert run(checkpoint, sounds, out, progress=watch) == Embedded(9, 3)
    assert 0 < watch.total < SOUNDS
    run(checkpoint, sounds, tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def test_weights_that_changed_under_their_path_are_seen(checkpoint, sounds, tmp_path):
    changing = model(tmp_path / "model", 0)
    run(changing, sounds, tmp_path / "out")
    watch = Progress()
    run(model(changing, 1), sounds, tmp_path / "out", progress=watch)
    assert watch.total == SOUNDS


def test_no_sound_that_can_be_read_is_an_array_of_no_rows(checkpoint, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"")
    assert run(checkpoint, tmp_path / "bad.wav", tmp_path / "out") == Embedded(0, 1)
    width = load(checkpoint).config.joint.width
    assert np.load(tmp_path / "out/embeddings.npy").shape == (0, width)


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_writes_the_bytes_of_one_machine(checkpoint, sounds, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    run(checkpoint, sounds, tmp_path / "one")
    paths = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=paths, log_to_driver=False)
    try:
        monkeypatch.chdir(tmp_path)
        watch = Progress()
        out = tmp_path / "ray"
        relative = checkpoint, sounds.relative_to(tmp_path)
        assert run(*relative, Path("ray"), distributor="ray", progress=watch) == Embedded(9, 3)
        assert watch.seen == watch.total == SOUNDS
        assert chunks(out) == chunks(tmp_path / "one")
        array = (tmp_path / "one/embeddings.npy").read_bytes()
        assert (out / "embeddings.npy").read_bytes() == array
    finally:
        ray.shutdown()


def huge(file: Path) -> Path:
    """A sound of finite samples whose power is beyond float32."""
    soundfile.write(file, 1e30 * tone(300, 1.0, RATE), RATE, subtype="FLOAT")
    return file


def poisoned(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all embeddings of a batch NaN in which a clip is silent, as a mask of 0 x NaN does."""
    real = type(embedder)._embed_waves

    def embed(self: Embedder, waves: list[np.ndarray]) -> torch.Tensor:
        quiet = any(not wave.any() for wave in waves)
        return real(self, waves) * (float("nan") if quiet else 1)

    monkeypatch.setattr(Embedder, "_embed_waves", embed)


def test_an_embedding_that_is_not_finite_is_rejected_and_its_neighbours_are_kept(
    checkpoint, sounds, tmp_path, monkeypatch
):
    out, silent = tmp_path / "out", sounds / "02.wav"
    wanted = embed_files(checkpoint, find_sounds([sounds]), tmp_path / "before")
    silent.write_bytes(encode(0 * tone(300, 1.0, RATE), RATE, "WAV"))
    embedder = load(checkpoint)
    poisoned(embedder, monkeypatch)
    done = embed_files(checkpoint, find_sounds([sounds]), out)
    rows = np.load(out / "embeddings.npy")
    assert np.isfinite(rows).all()
    assert (done.rows, done.rejected) == (wanted.rows - 1, wanted.rejected + 1)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    (row,) = [row for row in rejected if row["audio"] == str(silent)]
    assert row["reason"] == f"{silent}: not finite: its embedding has NaN or infinity"
    with pytest.raises(BadSound, match=r"02\.wav: not finite"):
        embedder.rank(silent, ["a tone"])
    with pytest.raises(BadSound, match="sound number 1: not finite"):
        embedder.embed_audio([tone(300, 1.0, RATE), 0 * tone(300, 1.0, RATE)])


def test_samples_of_any_size_leave_no_row_of_nan(checkpoint, tmp_path):
    embedded = embed_files(checkpoint, [huge(tmp_path / "huge.wav")], tmp_path / "out")
    assert np.isfinite(np.load(tmp_path / "out/embeddings.npy")).all()
    assert embedded.rows + embedded.rejected == 1


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_chunk_that_changed_is_named(checkpoint, sounds, tmp_path, value):
    embed_files(checkpoint, find_sounds([sounds]), tmp_path)
    (file,) = (tmp_path / ".embed").glob("*.safetensors")
    with safe_open(file, "pt") as chunk:
        rows, about = chunk.get_tensor("embeddings"), chunk.metadata()
    rows[0, 0] = value
    file.write_bytes(save({"embeddings": rows}, about))
    with pytest.raises(
        ConfigError, match=r"safetensors must hold embeddings .*; delete it and run"
    ):
        embed_files(checkpoint, find_sounds([sounds]), tmp_path)
    file.unlink()
    embed_files(checkpoint, find_sounds([sounds]), tmp_path)


def other_rejected(file: Path) -> None:
    """Another sound is the one that cannot be read: all names after it move by one row."""
    with safe_open(file, "pt") as opened:
        rows, about = opened.get_tensor("embeddings"), json.loads(opened.metadata()["about"])
    rejected = about["rejected"]
    first = min(rejected, key=int)
    rejected[str(int(first) + 1)] = rejected.pop(first)
    file.write_bytes(save({"embeddings": rows}, {"about": json.dumps(about)}))


def of_another_chunk(file: Path) -> None:
    """Equally many rows, of other sounds."""
    other = next(path for path in file.parent.glob("*.safetensors") if path != file)
    shutil.copy(other, file)


DAMAGE = {
    "rejected": other_rejected,
    "another": of_another_chunk,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:200]),
    "empty": lambda file: file.write_bytes(b""),
    "no metadata": lambda file: file.write_bytes(save({"embeddings": torch.zeros(1, 16)})),
    "no object": lambda file: file.write_bytes(
        save({"embeddings": torch.zeros(1, 16)}, {"about": "[]"})
    ),
    "fewer rows": lambda file: file.write_bytes(
        save({"embeddings": torch.zeros(1, 16)}, {"about": '{"rejected": {}, "again": false}'})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_chunk_whose_rows_would_be_other_sounds_is_named_and_its_remedy_works(
    checkpoint, sounds, tmp_path, kind
):
    found, out = find_sounds([sounds])[:4], tmp_path / "out"
    embed_files(checkpoint, found, out, chunk_sounds=1 if kind == "another" else 512)
    before = contents(out)
    file = min((out / ".embed").glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    DAMAGE[kind](file)
    with pytest.raises(ConfigError, match=f"{file} must hold .*; delete it and run"):
        embed_files(checkpoint, found, out, chunk_sounds=1 if kind == "another" else 512)
    file.unlink()
    embed_files(checkpoint, found, out, chunk_sounds=1 if kind == "another" else 512)
    assert contents(out) == before
