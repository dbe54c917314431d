"""`flap eval`, `embed`, `search` and `classify`: what they print, write and refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.commands.score import print_scores, read_classes
from flap_fast.commands.shard_range import work_division
from flap_fast.commands.use import _open
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import ShardRange
from flap_fast.tools.embedder import load
from tests.sounds import encode, tone, write_manifest
from tests.test_cli import flap
from tests.tiny import tiny

RATE = 16_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny("frontend.backend=torch", "frontend.threads=2")
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = tmp_path / "sounds"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.wav").write_bytes(encode(tone(300 + 200 * n, 1.0, RATE), RATE, "WAV"))
    (folder / "bad.ogg").write_bytes(b"no sound")
    return folder


def test_eval_writes_every_task_and_both_kinds_of_tables(
    checkpoint: Path, prepared: Path, tmp_path: Path, monkeypatch, capsys
):
    out, markdown, latex = (tmp_path / f"scores.{ending}" for ending in ("json", "md", "tex"))
    asked = ("--tasks", "retrieval,geometry,flops", "--out", out)
    tables = ("--markdown", markdown, "--latex", latex, "--crop", "multi:2")
    data = prepared / "val"
    assert flap("eval", checkpoint, data, *asked, *tables, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "chance R@10" in printed
    assert "uniformity, audio" in printed
    assert f"written to {latex}" in printed
    assert list(json.loads(out.read_text())) == ["retrieval", "geometry", "flops", "data"]
    assert markdown.read_text().startswith("### Retrieval, val: 6 clips, 15 captions")
    assert r"\toprule" in latex.read_text()
    assert not (checkpoint / "eval.json").exists()


def test_eval_counts_equal_captions_as_right_where_it_is_told_to(
    checkpoint: Path, sounds: Path, tmp_path: Path, monkeypatch, capsys
):
    captions = ("A tone.", "a  tone", "another")
    rows = [{"audio": f"{n}.wav", "caption": text} for n, text in enumerate(captions)]
    prepare(write_manifest(sounds / "m.jsonl", rows), tmp_path / "data", show=False)

    def scores(model: Path, *options: str) -> dict:
        arguments = ("eval", model, tmp_path / "data/train", "--out", tmp_path / "scores.json")
        assert flap(*arguments, *options, monkeypatch=monkeypatch) == 0
        return json.loads((tmp_path / "scores.json").read_text())["retrieval"]["train"]

    plain = scores(checkpoint)
    assert plain["equal_captions"] == 2
    assert not plain["equal_captions_are_right"]
    assert plain["chance"]["text_to_audio"]["R@1"] == 1 / 3
    assert "3 captions, 2 equal to another clip's (not counted as right)" in capsys.readouterr().out
    more = scores(checkpoint, "--equal-captions")
    assert more["equal_captions"] == 2
    assert more["equal_captions_are_right"]
    assert more["chance"]["text_to_audio"]["R@1"] == pytest.approx((2 + 2 + 1) / 9)
    # A config can say it, too.
    told, config = tmp_path / "told", tiny("frontend.backend=torch", "eval.equal_captions=true")
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(told, config, model, model.state_dict())
    assert scores(told) == more
    assert scores(told, "--no-equal-captions") == plain


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def test_eval_keeps_what_was_scored_before(own_checkpoint: Path, prepared: Path, monkeypatch):
    ours, data = own_checkpoint / "eval.json", prepared / "val"
    assert flap("eval", own_checkpoint, data, monkeypatch=monkeypatch) == 0
    first = json.loads(ours.read_text())
    asked = ("--tasks", "geometry,flops")
    assert flap("eval", own_checkpoint, data, *asked, monkeypatch=monkeypatch) == 0
    both = json.loads(ours.read_text())
    assert both["retrieval"] == first["retrieval"]
    assert set(both) == {"retrieval", "geometry", "flops", "data"}
    # A call that has nothing to score leaves it.
    assert flap("eval", own_checkpoint, monkeypatch=monkeypatch) == 2
    assert json.loads(ours.read_text()) == both


def test_eval_makes_the_folders_that_it_writes_into(
    checkpoint: Path, prepared: Path, tmp_path: Path, monkeypatch
):
    files = [tmp_path / f"{n}/deep/scores" for n in range(3)]
    targets = zip(("--out", "--markdown", "--latex"), files, strict=True)
    arguments = [word for target in targets for word in target]
    assert flap("eval", checkpoint, prepared / "val", *arguments, monkeypatch=monkeypatch) == 0
    assert all(file.is_file() for file in files)


@pytest.mark.parametrize("option", ["--out", "--markdown", "--latex", "eval.json"])
def test_what_eval_could_not_write_is_told_before_anything_is_embedded(
    option: str, own_checkpoint: Path, prepared: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr("flap_fast.evaluation.embed.evaluation_batches", None)
    call = ("eval", own_checkpoint, prepared / "val")
    if option == "eval.json":
        (own_checkpoint / "eval.json").write_text('{"geometry": NaN}')
    else:
        call = (*call, option, tmp_path)
    assert flap(*call, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert (
        f"error: {own_checkpoint}/eval.json must be" in said or f"error: {option} must be" in said
    )


def test_a_log_shows_a_long_name_on_one_line(capsys):
    name = "/".join(["recordings"] * 9)
    found = {"R@1": 0.25, "R@5": 0.5, "R@10": 1.0, "mAP@10": 0.375}
    both = {"audio_to_text": found, "text_to_audio": found}
    print_scores({"retrieval": {name: {**both, "chance": both, "clips": 4, "captions": 20}}})
    lines = capsys.readouterr().out.splitlines()
    assert sum(name in line and "0.375" in line for line in lines) == 2


def test_eval_writes_the_scores_before_it_prints_them(
    own_checkpoint: Path, prepared: Path, monkeypatch
):
    monkeypatch.setattr("flap_fast.commands.score.print_scores", lambda _: 1 / 0)
    assert flap("eval", own_checkpoint, prepared / "val", monkeypatch=monkeypatch) == 1
    assert "retrieval" in json.loads((own_checkpoint / "eval.json").read_text())


def test_eval_takes_a_text_encoder_alone(
    roberta_folder: Path, prepared: Path, tmp_path: Path, monkeypatch, capsys
):
    sts = tmp_path / "sts-dev.csv"
    lines = (f"g\tf\ty\t1\t{n}\ta dog barks\t{'rain ' * n}falls\n" for n in range(5))
    sts.write_text("".join(lines))
    assert flap("eval", roberta_folder, sts, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "STS, sts-dev.csv" in printed
    assert "written" not in printed
    assert not (roberta_folder / "eval.json").exists()
    assert flap("eval", roberta_folder, "--tasks", "flops", monkeypatch=monkeypatch) == 2
    assert "must have an encoder of sounds or images, got" in capsys.readouterr().err
    assert flap("eval", roberta_folder, prepared / "val", monkeypatch=monkeypatch) == 2
    assert "a text encoder alone embeds no clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "recall"), "a task must be one of retrieval, relevance"),
        (("--crop", "left"), "eval.crop must match pattern"),
        (("--batch", "0"), "eval.batch must be greater than or equal to 1"),
        (("--templates", "none", "--tasks", "zero_shot"), "eval.templates must contain {label}"),
        (("--classes", "nowhere.txt"), "--classes must name an existing file"),
    ],
)
def test_eval_refuses_what_it_cannot_do(
    arguments, message, checkpoint: Path, prepared: Path, monkeypatch, capsys
):
    data = prepared / "val"
    assert flap("eval", checkpoint, data, *arguments, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_classes_are_read_from_text_and_from_laions_json(tmp_path: Path):
    text, laion = tmp_path / "classes.txt", tmp_path / "classes.json"
    text.write_text("dog\nsea_waves\n\n")
    laion.write_text('{"sea waves": 1, "dog": 0}')
    assert read_classes(text) == read_classes(laion) == ("dog", "sea waves")
    assert read_classes(None) == ()
    text.write_bytes(b"\xef\xbb\xbfdog\r\nsea_waves\r\n")
    assert read_classes(text) == ("dog", "sea waves")
    for tree in ('"dog"', "[1, 2]", '[["dog"]]', "null", '["\\ud800"]', "[" * 100_000):
        laion.write_text(tree)
        with pytest.raises(ConfigError, match=r"classes.json must hold class names"):
            read_classes(laion)
    for content, message in (
        (
            b"dog\ncat\nsea_waves\ndog\nsea waves\n",
            "must name each class once, got 'dog, sea waves'",
        ),
        (b"\n", "must name classes, got 'none'"),
        ("café\n".encode("latin-1"), "--classes must be a UTF-8 text file"),
    ):
        text.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_classes(text)


def test_embed_writes_rows_and_their_names_and_goes_on(
    checkpoint: Path, sounds: Path, tmp_path: Path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = ("embed", sounds, "--out", out, "--model", checkpoint)
    assert flap(*arguments, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert "1 of 4 sounds cannot be read, see" in said.err
    (bad,) = (out / "rejected.jsonl").read_text().splitlines()
    assert "bad.ogg: unreadable" in json.loads(bad)["reason"]
    assert "3 sounds in embeddings.npy" in said.out
    rows = np.load(out / "embeddings.npy")
    names = [json.loads(line)["audio"] for line in (out / "sounds.jsonl").read_text().splitlines()]
    assert [Path(name).name for name in names] == ["0.wav", "1.wav", "2.wav"]
    wanted = load(checkpoint).embed_audio(names).numpy()
    assert np.abs(rows - wanted).max() < 1e-5
    # A second call decodes nothing.
    monkeypatch.setattr("flap_fast.tools.sounds.read_pieces", None)
    assert flap(*arguments, monkeypatch=monkeypatch) == 0
    assert np.array_equal(np.load(out / "embeddings.npy"), rows)


def test_ranks_of_a_launcher_share_what_shard_range_names(
    checkpoint: Path, sounds: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert work_division(None, "threads") == (ShardRange(2, 2), "threads")
    assert work_division("2/3", "threads") == (ShardRange(4, 6), "threads")
    out = ("--out", tmp_path / "out", "--model", checkpoint)
    assert flap("embed", sounds, *out, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "shard range 2/2 is done, 1 chunks of the others are not" in said
    assert not (tmp_path / "out/embeddings.npy").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert flap("embed", sounds, *out, "--distributor", "ray", monkeypatch=monkeypatch) == 2
    assert "--distributor ray must run in one process, got '2 ranks'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    both = (*out, "--distributor", "ray", "--shard-range", "1/2")
    assert flap("embed", sounds, *both, monkeypatch=monkeypatch) == 2
    assert "--shard-range must be left out with ray" in capsys.readouterr().err
    assert flap("embed", sounds, *out, "--batch", "0", monkeypatch=monkeypatch) == 2
    assert "--batch must be at least 1" in capsys.readouterr().err


def test_search_prints_the_nearest_sounds(
    checkpoint: Path, sounds: Path, tmp_path: Path, monkeypatch, capsys
):
    model = ("--model", checkpoint)
    assert flap("search", "a dog", "--audio", sounds, *model, monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    ours = load(checkpoint)
    wanted = (
        ours.embed_text(["a dog"]) @ ours.embed_audio([sounds / f"{n}.wav" for n in range(3)]).T
    )
    cosines, order = wanted[0].sort(descending=True)
    assert [line.split()[1] for line in lines] == [str(sounds / f"{n}.wav") for n in order.tolist()]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(cosines.tolist(), abs=6e-4)
    index = sounds / ".flap-index"
    # From the index alone; several queries under their names.
    both = ("search", "a dog", "rain", "--index", index, "--top", "1", *model)
    assert flap(*both, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["a dog", lines[0], "rain"]
    assert flap("search", "a dog", *model, monkeypatch=monkeypatch) == 2
    assert "--audio or --index must be given" in capsys.readouterr().err
    assert flap("search", "rain", " ", "--index", index, *model, monkeypatch=monkeypatch) == 2
    assert "QUERY must be the words to search for, got ' '" in capsys.readouterr().err
    for option in ("--crop", "--windows"):
        asked = ("search", "rain", "--index", index, *model, option, "1")
        assert flap(*asked, monkeypatch=monkeypatch) == 2
        assert f"{option} must be left out without --audio" in capsys.readouterr().err


def test_a_name_that_is_no_utf8_is_printed_as_it_is(checkpoint: Path, sounds: Path, monkeypatch):
    odd = os.fsencode(sounds) + b"/\xe9t\xe9.wav"
    (sounds / "0.wav").rename(os.fsdecode(odd))
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", printed)
    asked = ("search", "a dog", "--audio", sounds, "--model", checkpoint)
    assert flap(*asked, monkeypatch=monkeypatch) == 0
    printed.flush()
    assert odd in printed.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_name_with_control_characters_is_printed_harmlessly_on_one_line(
    checkpoint: Path, sounds: Path, monkeypatch, capsys
):
    odd = sounds / "a\x1b[2J\u202e\n.wav"
    (sounds / "0.wav").rename(odd)
    (sounds / "bad.ogg").rename(sounds / "b\x1b.ogg")
    shown = str(sounds) + r"/a\x1b[2J\u202e\n.wav"
    classes = "dog\x9b2J,rain"
    for asked in (
        ("search", "rain\x1b", "dog", "--audio", sounds, "--model", checkpoint),
        ("classify", sounds, "--labels", classes, "--top", "2", "--model", checkpoint),
        ("rank", checkpoint, odd, "a\x1b[2J\n", "b"),
    ):
        flap(*asked, monkeypatch=monkeypatch)
        said = capsys.readouterr()
        assert not {"\x1b", "\x9b", "\u202e"} & set(said.out + said.err)
        if asked[0] == "rank":
            assert len(said.out.splitlines()) == 2
        else:
            assert any(shown in line for line in said.out.splitlines())
            assert r"b\x1b.ogg: unreadable" in said.err


def test_classify_prints_a_line_a_sound_and_fails_on_bad_ones(
    checkpoint: Path, sounds: Path, tmp_path: Path, monkeypatch, capsys
):
    model = ("--model", checkpoint)
    asked = ("--labels", "dog, rain,dog", "--template", "A {label}.")
    assert flap("classify", sounds, *asked, *model, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr()
    assert "bad.ogg: unreadable" in said.err
    ours = load(checkpoint)
    lines = [line.split("\t") for line in said.out.splitlines()]
    for name, (file, label, share) in zip(("0", "1", "2"), lines, strict=True):
        assert file == str(sounds / f"{name}.wav")
        best = ours.classify(file, ["dog", "rain"], "A {label}.")[0]
        assert (label, float(share)) == (best[0], pytest.approx(best[1], abs=6e-4))
    labels = tmp_path / "labels.txt"
    labels.write_text("\ufeffa dog, barking\nrain\n")
    asked = ("--labels", labels, "--top", "2")
    assert flap("classify", sounds / "0.wav", *asked, *model, monkeypatch=monkeypatch) == 0
    found = {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()}
    assert found == {"a dog, barking", "rain"}
    alone = ("--labels", "dog")
    assert flap("classify", sounds / "0.wav", *alone, *model, monkeypatch=monkeypatch) == 2
    assert "--labels must name at least two classes" in capsys.readouterr().err


def test_without_a_name_the_run_trained_last_is_used(
    checkpoint: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs/ must hold a trained model"):
        _open(None, None)
    now = time.time()
    for name, age_s in (("older", 60), ("newer", 0), ("oldest", 90)):
        folder = tmp_path / "runs" / name / "checkpoints/step-000002"
        folder.mkdir(parents=True)
        for file in checkpoint.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "state.json").write_text("{}")
        os.utime(folder / "state.json", (now - age_s, now - age_s))
    assert _open(None, None).identity == load(checkpoint).identity
    assert "model: runs/newer, the newest in runs/" in capsys.readouterr().err


def test_an_index_that_cannot_be_written_is_told_before_anything_is_embedded(
    checkpoint: Path, sounds: Path, monkeypatch, capsys
):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("flap_fast.tools.sounds.read_pieces", None)
    arguments = ("search", "a dog", "--audio", sounds, "--model", checkpoint)
    assert flap(*arguments, monkeypatch=monkeypatch) == 2
    assert "name another file with --index" in capsys.readouterr().err
