"""Windows: each is embedded as a sound of its own, kept in the index, and found with its time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embed_files import embed_files
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.search import File, Index, find_sounds, open_index, plan_update, update_index
from flap_fast.tools.windows import WindowRows, suppress, time_text, window_policy, window_starts
from tests.sounds import noise
from tests.test_commands import flap
from tests.tiny import tiny

RATE = 16_000
WAVE = noise(0, 3.3, RATE) * np.linspace(0.2, 2, 52_800, dtype=np.float32)


def make(*overrides: str) -> Embedder:
    config = tiny("frontend.threads=2", *overrides)
    torch.manual_seed(0)
    return Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return make()


@pytest.fixture(scope="module")
def checkpoint(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, embedder.config, embedder.model, embedder.model.state_dict())
    return folder


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = tmp_path / "sounds"
    folder.mkdir()
    soundfile.write(folder / "long.wav", WAVE, RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", WAVE[:8000], RATE, subtype="FLOAT")
    (folder / "bad.wav").write_bytes(b"no sound")
    return folder


def windows_of(embedder: Embedder, sound: object, windows: str, batch: int = 1) -> WindowRows:
    (found,) = embedder.embed_windows([sound], windows, batch)
    assert isinstance(found, WindowRows)
    return found


def test_windows_cover_a_sound_and_the_last_ends_with_it():
    assert window_starts(10, 4, 2) == [0, 2, 4, 6]
    assert window_starts(11, 4, 2) == [0, 2, 4, 6, 7]
    assert window_starts(9, 4, 4) == [0, 4, 5]
    assert window_starts(3, 4, 2) == [0]
    assert window_starts(100_001, 100_000, 50_000) == [0]  # a rounded length is no window more


@pytest.mark.parametrize("length", ["fixed", "variable"])
@pytest.mark.parametrize("windows", ["1:0.5", "0.7:0.3"])
def test_a_windows_embedding_is_that_of_the_same_cut_in_a_file_of_its_own(
    windows: str, length: str, sounds: Path, tmp_path: Path
):
    embedder = make(f"audio.length={length}")
    found = windows_of(embedder, sounds / "long.wav", windows)
    seconds, hop = (float(part) for part in windows.split(":"))
    starts_s = [hop * n for n in range(int((3.3 - seconds) / hop + 1e-9) + 1)]
    starts_s += [3.3 - seconds] if 3.3 - seconds - starts_s[-1] > 1e-6 else []
    assert found.spans_s[:, 0].tolist() == pytest.approx(starts_s)
    assert found.spans_s[:, 1].tolist() == pytest.approx([start + seconds for start in starts_s])
    for n, (start, end) in enumerate((found.spans_s * RATE).round().long().tolist()):
        soundfile.write(tmp_path / "cut.wav", WAVE[start:end], RATE, subtype="FLOAT")
        assert torch.equal(embedder.embed_audio([tmp_path / "cut.wav"], 1)[0], found.rows[n])
    assert torch.unique(found.rows, dim=0).shape == found.rows.shape


def test_many_sounds_are_embedded_in_order_and_a_bad_one_is_named(embedder: Embedder, sounds: Path):
    each = [sounds / "long.wav", sounds / "bad.wav", sounds / "short.wav", WAVE[:20_000]]
    long, bad, short, wave = embedder.embed_windows(each, batch=4)
    assert isinstance(bad, BadSound)
    assert "bad.wav: unreadable" in str(bad)
    for found, sound in ((long, each[0]), (short, each[2]), (wave, each[3])):
        assert isinstance(found, WindowRows)
        alone = windows_of(embedder, sound, "auto:0.5")
        assert torch.equal(found.spans_s, alone.spans_s)
        assert torch.allclose(found.rows, alone.rows, atol=1e-5)
    assert isinstance(short, WindowRows)
    assert short.spans_s.tolist() == [[0, 0.5]]


def test_windows_that_make_no_sense_are_refused(embedder: Embedder):
    for windows, error in (
        ("x", r"windows must be SECONDS\[:HOP\] or auto\[:HOP\], such as 5 or 5:2.5, got 'x'"),
        ("1:", "windows must be SECONDS"),
        ("2", r"a window must be in \[0.02, 1\] s, which the model takes at a time, got 2"),
        ("nan", "a window must be in"),
        ("1:0", "the hop of windows must be in .*, got 0"),
        ("0.5:0.6", r"the hop of windows must be in \[0.01, 0.5\] s"),
    ):
        with pytest.raises(ConfigError, match=error):
            window_policy(windows, embedder.config)
    assert window_policy("auto", embedder.config) == window_policy("1:0.5", embedder.config)


def test_of_windows_that_overlap_in_one_file_the_best_stands_for_all():
    files = torch.tensor([0, 0, 1, 0, 0])
    spans_s = torch.tensor([[2.0, 4], [1, 3], [1, 3], [4, 6], [3, 5]])
    assert list(suppress(files, spans_s)) == [0, 2, 3]
    assert time_text((12.5, 17.5)) == "12.5-17.5 s"
    assert time_text((100.0, 100.254)) == "100-100.25 s"


def test_as_many_sounds_are_found_as_asked_behind_many_windows_of_one(tmp_path: Path):
    draws = torch.Generator().manual_seed(0)
    near = torch.nn.functional.normalize(
        torch.eye(8)[:1] + 0.1 * torch.rand(200, 8, generator=draws)
    )
    starts = torch.arange(200, dtype=torch.float64) / 1000  # all overlap
    rows = {
        File("a.wav", 1, 1): WindowRows(torch.stack([starts, starts + 1], 1), near),
        File("b.wav", 1, 1): WindowRows(
            torch.tensor([[0.0, 1], [1, 2]]).double(), torch.eye(8)[:2]
        ),
        File("c.wav", 1, 1): WindowRows(torch.tensor([[0.0, 1]]).double(), torch.eye(8)[2:3]),
    }
    index = Index(tmp_path / "index", "model", "windows:1:0.5", dict(rows))
    (found,) = index.nearest(torch.eye(8)[:1], 4)
    assert [match.path.name for match in found] == ["b.wav", "a.wav", "b.wav", "c.wav"]
    assert [match.cosine for match in found[::2]] == [1, 0]
    assert [match.span_s for match in found[::2]] == [(0, 1), (1, 2)]
    assert found[1].cosine == pytest.approx(near[:, 0].max().item())
    assert len(index.nearest(torch.eye(8)[:1], 9)[0]) == 4


def test_an_index_keeps_windows_and_embeds_only_what_is_new(
    embedder: Embedder, sounds: Path, tmp_path: Path
):
    def updated() -> tuple[Index, int]:
        seen: list[int] = []
        policy = window_policy("1:0.5", embedder.config)
        plan = plan_update(tmp_path / "index", embedder, find_sounds([sounds]), policy)
        advance = lambda: seen.append(1)  # noqa: E731
        return update_index(plan_file, embedder, plan, crop=policy, advance=advance), len(seen)

    plan_file = tmp_path / "index"
    index, embedded = updated()
    assert embedded == 3
    assert index.counts.tolist() == [6, 1]
    assert [file.path for file in index.rejected] == ["sounds/bad.wav"]
    soundfile.write(sounds / "new.wav", WAVE[:16_000], RATE)
    again, embedded = updated()
    assert embedded == 1
    found = open_index(plan_file)
    assert found.counts.tolist() == again.counts.tolist() == [6, 1, 1]
    assert torch.equal(found.embeddings, again.embeddings)
    assert torch.equal(found.embeddings[:6], index.embeddings[:6])
    assert found.spans_s is not None
    assert index.spans_s is not None
    assert torch.equal(found.spans_s[:6], index.spans_s[:6])
    data = bytearray(plan_file.read_bytes())
    data[data.index(found.spans_s.numpy().tobytes()) + 6] ^= 1
    plan_file.write_bytes(data)
    with pytest.raises(ConfigError, match="it changed since it was written"):
        open_index(plan_file)


def test_rows_of_files_have_their_windows_times(
    checkpoint: Path, embedder: Embedder, sounds: Path, tmp_path: Path
):
    files, out = find_sounds([sounds]), tmp_path / "out"
    done = embed_files(checkpoint, files, out, windows="1")
    assert (done.rows, done.windowed, done.rejected) == (7, 2, 1)
    rows = [json.loads(line) for line in (out / "sounds.jsonl").read_text().splitlines()]
    assert [Path(row["audio"]).name for row in rows] == ["long.wav"] * 6 + ["short.wav"]
    wanted = windows_of(embedder, sounds / "long.wav", "1")
    assert [[row["start_s"], row["end_s"]] for row in rows[:6]] == wanted.spans_s.tolist()
    array = np.load(out / "embeddings.npy")
    assert np.allclose(array[:6], wanted.rows.numpy(), atol=1e-5)
    assert embed_files(checkpoint, files, out, windows="1") == done
    assert np.array_equal(np.load(out / "embeddings.npy"), array)
    assert embed_files(checkpoint, files, out).rows == 2


def test_commands_print_times(
    checkpoint: Path, embedder: Embedder, sounds: Path, monkeypatch, capsys
):
    model = ("--windows", "1:0.5", "--model", checkpoint)
    asked = ("search", "a dog", "--audio", sounds, "--top", "3", *model)
    assert flap(*asked, monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert flap(*asked, "--format", "json", monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert flap(*asked, "--format", "csv", monkeypatch=monkeypatch) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    windows = windows_of(embedder, sounds / "long.wav", "1:0.5")
    cosines = windows.rows @ embedder.embed_text(["a dog"])[0]
    for line, row, cells in zip(lines, rows, table, strict=True):
        shown = f"{row['cosine']:6.3f}  {row['file']}  {time_text((row['start_s'], row['end_s']))}"
        assert line == shown
        assert cells == {name: str(value) for name, value in row.items()}
        if row["file"].endswith("long.wav"):
            n = windows.spans_s[:, 0].tolist().index(row["start_s"])
            assert row["cosine"] == pytest.approx(cosines[n].item(), abs=1e-5)
    assert flap("search", "a dog", "--index", sounds / ".flap-index-windows", *model[2:],
                "--top", "3", monkeypatch=monkeypatch) == 0  # fmt: skip
    assert capsys.readouterr().out.splitlines() == lines
    asked = ("classify", sounds / "long.wav", "--labels", "dog,rain", *model)
    assert flap(*asked, monkeypatch=monkeypatch) == 0
    cells = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in cells] == [time_text(tuple(s)) for s in windows.spans_s.tolist()]
    labels = embedder.embed_labels(["dog", "rain"], "This is a sound of {label}.")
    best = embedder.probabilities(windows.rows, labels).max(1)
    assert [row[2] for row in cells] == [("dog", "rain")[n] for n in best.indices.tolist()]
    assert [float(row[3]) for row in cells] == pytest.approx(best.values.tolist(), abs=6e-4)
    assert flap(*asked, "--crop", "whole", monkeypatch=monkeypatch) == 2
    assert "--crop must be left out with --windows" in capsys.readouterr().err
