"""The command: what it prints, what it refuses, how it exits."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import flap_fast
from flap_fast import __main__ as cli
from flap_fast.training.loop import train
from tests.sounds import encode, tone, write_manifest
from tests.tiny import tiny


def flap(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["flap", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    train(tiny(f"run.folder={tmp_path}", f"data.train={prepared}/train", "train.steps=1"))
    return tmp_path / "flap"


def test_config_show_prints_a_config_that_reads_back(monkeypatch, capsys, tmp_path: Path):
    assert flap("config", "show", "configs/tiny.yaml", "mask.kind=1d", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["mask"]["kind"] == "1d"
    (tmp_path / "again.yaml").write_text(printed)
    assert flap("config", "show", tmp_path / "again.yaml", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("config", "show", "nowhere.yaml"), "the config must be an existing YAML file"),
        (("train", "configs/tiny.yaml", "mask.kinds=1d"), "did you mean mask.kind"),
        (("train", "configs/tiny.yaml", "data.train=nowhere"), "flap prepare MANIFEST OUT"),
        (("eval", "nowhere", "data"), "the checkpoint must be a run's folder"),
        (("show", "configs/tiny.yaml", "--clip", "-1", "data.train=nowhere"), "nowhere"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(arguments, message, monkeypatch, capsys):
    assert flap(*arguments, monkeypatch=monkeypatch) != 0
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said


def test_prepare_counts_what_it_rejected_in_its_last_line(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "good.wav").write_bytes(encode(tone(440, 0.5, 16_000), 16_000, "WAV"))
    (tmp_path / "bad.wav").write_bytes(b"RIFF and nothing more")
    rows = [{"audio": f"{name}.wav", "caption": "A tone."} for name in ("good", "bad")]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    assert flap("prepare", manifest, tmp_path / "out", monkeypatch=monkeypatch) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1 clips in 1 shards, 1 of 2 rejected: 1 unreadable (reasons in" in last
    assert last.endswith("rejected.jsonl; --retry tries them again)")
    (tmp_path / "bad.wav").write_bytes((tmp_path / "good.wav").read_bytes())
    assert flap("prepare", manifest, tmp_path / "out", "--retry", monkeypatch=monkeypatch) == 0
    assert "2 clips in 1 shards, 0 of 2 rejected" in capsys.readouterr().out


def test_prepare_holds_clips_out_and_names_the_option_where_none_are(monkeypatch, capsys, tmp_path):
    rows = []
    for n in range(8):
        (tmp_path / f"{n}.wav").write_bytes(encode(tone(200 + n, 0.1, 16_000), 16_000, "WAV"))
        rows.append({"audio": f"{n}.wav", "caption": f"Number {n % 7}."})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    assert flap("prepare", manifest, tmp_path / "all", monkeypatch=monkeypatch) == 0
    assert (
        "to hold some out, prepare into another folder with --val-frac" in capsys.readouterr().err
    )
    half = ("--val-fraction", "0.4")
    assert flap("prepare", manifest, tmp_path / "out", *half, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    sizes = [json.loads((tmp_path / f"out/{n}/sizes.json").read_text()) for n in ("train", "val")]
    counts = [sum(size.values()) for size in sizes]
    assert f"{counts[0]} in train, {counts[1]} in val; 2 of them have a caption or a" in said.err
    assert "to hold some out" not in said.err
    assert sum(counts) == 8


def test_eval_prints_a_table_and_writes_the_json(run: Path, prepared: Path, monkeypatch, capsys):
    assert flap("eval", run, prepared / "val", "--batch", "4", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "audio to text" in printed
    assert "chance R@10" in printed
    assert json.loads((run / "eval.json").read_text())["retrieval"]["val"]["captions"] == 15


def test_rank_prints_the_best_caption_first(run: Path, tmp_path: Path, monkeypatch, capsys):
    sound = tmp_path / "tone.ogg"
    sound.write_bytes(encode(tone(440, 3, 44_100), 44_100, "OGG"))
    assert flap("rank", run, sound, "a tone", "noise", "a dog", monkeypatch=monkeypatch) == 0
    cosines = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(cosines) == 3
    assert cosines == sorted(cosines, reverse=True)
    other = ("--length", "variable")  # 3 s, of which the run's model takes 1 s
    assert (
        flap("rank", run, sound, "a tone", "noise", "a dog", *other, monkeypatch=monkeypatch) == 0
    )
    assert [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()] != cosines
    assert flap("rank", run, tmp_path / "no.ogg", "a tone", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert "no.ogg: missing" in said


def test_show_draws_what_masking_keeps(prepared: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep/masking.png"
    arguments = ("configs/tiny.yaml", f"data.train={prepared}/train", "--clip", "3", "--out", out)
    assert flap("show", *arguments, monkeypatch=monkeypatch) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_in_a_sentence(monkeypatch, capsys, tmp_path: Path):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "0.tar"))

    monkeypatch.setattr("flap_fast.preparation.prepare.prepare", full)
    assert flap("prepare", "m.jsonl", tmp_path, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "everything completed before it is kept" in said


def test_prepare_reads_a_source_shares_it_and_caches_it(monkeypatch, capsys, tmp_path: Path):
    folder = tmp_path / "ESC-50"
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    (folder / "meta/esc50.csv").write_text(
        "filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,1,car_horn\nc.wav,2,0,dog\n"
    )
    for name in "ab":
        sound = encode(tone(440, 0.5, 44_100), 44_100, "WAV")
        (folder / f"audio/{name}.wav").write_bytes(sound)
    out, mels = tmp_path / "out", tmp_path / "mels"
    half = ("prepare", "--source", "esc50", folder, out, "--shard-range")
    assert flap(*half, "2/2", monkeypatch=monkeypatch) == 0
    assert "shard range 2/2 is done, 1 shards of the others are not" in capsys.readouterr().out
    assert flap(*half, "1/2", monkeypatch=monkeypatch) == 0
    assert "2 clips in 1 shards, 1 of 3 rejected: 1 missing (" in capsys.readouterr().out
    # Shards need no --source; a config says which front end.
    cache = ("prepare", "--cache", "mel", "--config", "configs/tiny.yaml", out, mels)
    assert flap(*cache, monkeypatch=monkeypatch) == 0
    assert "2 clips in 1 shards, 0 of 2 rejected" in capsys.readouterr().out
    assert (mels / "fold1/frontend.json").is_file()


def test_prepare_writes_triples_as_json_lines(monkeypatch, capsys, tmp_path: Path):
    rows = [("entailment", "He left.", "He went."), ("contradiction", "He left.", "He stayed.")]
    keys = ("gold_label", "sentence1", "sentence2")
    (tmp_path / "snli_1.0_train.jsonl").write_text(
        "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    )
    arguments = ("prepare", "--source", "nli", tmp_path, tmp_path / "out")
    assert flap(*arguments, monkeypatch=monkeypatch) == 0
    assert "1 in train.jsonl" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/train.jsonl").read_text()) == {
        "premise": "He left.",
        "entailment": "He went.",
        "contradiction": "He stayed.",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--source", "audiocap"), "--source must be one of audiocaps, clotho, "),
        ((), "--source must be given for a folder, one of audiocaps, "),
        (("--cache", "wave"), "--cache must be mel, got 'wave'"),
        (("--shard-range", "0/8"), "--shard-range must be A/B, "),
        (("--distributor", "dask"), "--distributor must be one of threads, ray"),
        (("--distributor", "ray", "--shard-range", "1/2"), "--shard-range must be left out with"),
        (("--source", "nli", "--cache", "mel"), "--cache must be left out with --source nli"),
        (("--source", "nli", "--retry"), "--retry must be left out with --source nli"),
        (("--source", "clotho"), "Clotho must have clotho_captions_SPLIT.csv, got"),
        (("--shard-clips", "0"), "--shard-clips must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 0, got -1"),
    ],
)
def test_what_prepare_cannot_do_is_said(options, message, monkeypatch, capsys, tmp_path: Path):
    arguments = ("prepare", *options, tmp_path, tmp_path / "out")
    assert flap(*arguments, monkeypatch=monkeypatch) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_version_is_the_one_that_is_installed(monkeypatch, capsys):
    assert flap("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.strip() == flap_fast.__version__ == version("flap_fast")


def test_the_packages_names_are_the_public_ones():
    assert dir(flap_fast) == sorted([*flap_fast.__all__, "__version__"])
    assert all(hasattr(flap_fast, name) for name in dir(flap_fast))


def test_a_command_that_could_use_nothing_fails(run: Path, tmp_path: Path, monkeypatch, capsys):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    (sounds / "a.wav").write_bytes(b"RIFF, but not more")
    (tmp_path / "m.csv").write_text("audio,title\nsounds/a.wav,a dog\n")
    assert flap("prepare", tmp_path / "m.csv", tmp_path / "out", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr()
    assert "0 clips in 0 shards, 1 of 1 rejected: 1 captionless" in said.out
    assert "error: no clip can be used; captions are read from caption or captions" in said.err
    given = ("embed", sounds, "--out", tmp_path / "rows", "--model", run)
    assert flap(*given, monkeypatch=monkeypatch) == 1
    assert "1 of 1 sounds cannot be read, see" in capsys.readouterr().err
    given = ("search", "a dog", "--audio", sounds, "--model", run)
    assert flap(*given, monkeypatch=monkeypatch) == 1
    assert "1 of 1 sounds cannot be read" in capsys.readouterr().err
