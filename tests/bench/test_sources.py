"""bench/sources.py: what is left out is in no training, and finished trainings are not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import sources, sources_table
from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config
from flap_fast.files import read_rows

COUNTS = {"a": 6, "b": 5, "c": 4, "d": 3, "e": 2}


def manifest(folder: Path, sources: dict[str, int], val: int = 0) -> Path:
    """A manifest whose first `val` rows are of split val."""
    folder.mkdir()
    rows = [
        {"audio": f"{s}{n}.wav", "caption": f"{s} {n}", "source": s, "id": f"{s}{n}"}
        for s, count in sources.items()
        for n in range(count)
    ]
    rows = [row | {"split": "val" if n < val else "train"} for n, row in enumerate(rows)]
    file = folder / "manifest.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def flap(monkeypatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The commands that were run; a training leaves scores that tell the sources apart."""
    ran: list[tuple[str, ...]] = []

    def run(*arguments: str, threads: int | None = None) -> None:
        ran.append(arguments)
        if arguments[0] != "train":
            return
        given = dict(setting.split("=", 1) for setting in arguments[2:])
        folder = Path(given["run.folder"]) / given["run.name"]
        folder.mkdir(parents=True)
        if given.get("data.val", "[]") == "[]":
            return
        names = [Path(path).name for path in given["data.val"][1:-1].split(",")]
        chance = {way: {"R@10": 0.1} for way in sources.DIRECTIONS}
        scores = {
            name: {
                "audio_to_text": dict.fromkeys(sources.SCORES, 0.2),
                "text_to_audio": dict.fromkeys(sources.SCORES, 0.4),
                "chance": chance,
            }
            for name in names
        }
        (folder / "eval.json").write_text(json.dumps({"retrieval": scores}))
        steps = int(given["train.steps"])
        rows = [{"step": 1, "loss": 1.0}]
        rows += [
            {"step": step, "eval_s": 1.0}
            | {f"{name}/{way}/R@10": step / steps for name in names for way in sources.DIRECTIONS}
            for step in (steps // 2, steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(sources, "flap", run)
    monkeypatch.setattr(sources, "RESULTS", tmp_path / "results")
    return ran


def command(tmp_path: Path, *more: str) -> list[str]:
    own = ("--shards", str(tmp_path / "shards"), "--runs", str(tmp_path / "runs"))
    data = [o for file in tmp_path.glob("*/manifest.jsonl") for o in ("--data", str(file))]
    return ["run", "x", str(sources.ROOT / "configs/demo.yaml"), *data, *own, *more]


def test_what_is_left_out_is_in_no_training(tmp_path: Path, flap: list[tuple[str, ...]]):
    manifest(tmp_path / "own", COUNTS, val=2)
    sources.main(command(tmp_path, "--steps", "8", "--seeds", "1"))
    trainings = [arguments for arguments in flap if arguments[0] == "train"]
    assert len(trainings) == len(COUNTS)
    for arguments in trainings:
        config = load_config(Path(arguments[1]), arguments[2:])
        whole = [Path(str(place)) for place in config.data.val]
        trained = {Path(str(place)).name for place in config.data.train}
        (left_out,) = (path.name for path in whole if path.parent.name == "whole")
        assert trained == COUNTS.keys() - {left_out}
        # All sources are the first manifest's: none is left whose val training has not lost.
        assert len(whole) == 1


def test_the_first_manifests_val_is_scored_where_its_sources_were_trained_on(
    tmp_path: Path, flap: list[tuple[str, ...]]
):
    first, other = manifest(tmp_path / "a", {"a": 4}, val=2), manifest(tmp_path / "b", {"b": 3})
    shards = sources.prepared([first, other], tmp_path / "shards")
    assert shards.sources == {"a": 4, "b": 3}
    assert not any("val/val" in setting for setting in shards.settings(("a",)))
    assert any("val/val" in setting for setting in shards.settings(("b",)))
    rows = {p: [r for _, r in read_rows(tmp_path / f"shards/{p}.jsonl")] for p in ("train", "val")}
    assert [row["id"] for row in rows["val"]] == ["a0", "a1"]
    assert not {row["id"] for row in rows["train"]} & {"a0", "a1"}


def test_finished_trainings_are_not_repeated(tmp_path: Path, flap: list[tuple[str, ...]]):
    manifest(tmp_path / "own", COUNTS)
    sources.main(command(tmp_path, "--steps", "8", "--seeds", "1", "--only", "a", "b"))
    done = len(flap)
    sources.main(command(tmp_path, "--steps", "8", "--seeds", "1"))
    again = [arguments for arguments in flap[done:] if arguments[0] == "train"]
    assert len(again) == len(COUNTS) - 2
    for other in (("8", "--seconds", "5"), ("9",)):
        with pytest.raises(SystemExit, match="must hold the same recipe"):
            sources.main(command(tmp_path, "--steps", *other))
    (tmp_path / "own/manifest.jsonl").open("a").write("\n")
    with pytest.raises(SystemExit, match="data_sha256"):
        sources.main(command(tmp_path, "--steps", "8"))


def test_captions_of_training_are_enriched_and_no_others(
    tmp_path: Path, flap: list[tuple[str, ...]]
):
    manifest(tmp_path / "own", COUNTS)
    asked = ("--steps", "8", "--seeds", "1", "--enrich", "--model none")
    sources.main(command(tmp_path, *asked))
    enriched = [arguments for arguments in flap if arguments[0] == "enrich"]
    folders = [str(tmp_path / "shards/train" / source) for source in sorted(COUNTS)]
    assert enriched == [("enrich", folder, folder, "--model", "none") for folder in folders]
    with pytest.raises(SystemExit, match="must hold the same recipe"):
        sources.main(command(tmp_path, *asked[:-2]))


def test_a_run_before_has_the_same_sources_and_gives_the_tower(
    tmp_path: Path, flap: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
):
    manifest(tmp_path / "own", COUNTS)
    recon = "loss.contrastive.weight=0 loss.recon.weight=1"
    asked = command(tmp_path, "--steps", "8", "--seeds", "1", "--pretrain", recon)
    with pytest.raises(SystemExit):
        sources.main(asked)
    assert "--pretrain must come with --steps and --pretrain-steps" in capsys.readouterr().err
    sources.main([*asked, "--pretrain-steps", "5"])
    trainings = [
        load_config(Path(arguments[1]), arguments[2:])
        for arguments in flap
        if arguments[0] == "train"
    ]
    assert len(trainings) == 2 * len(COUNTS)
    for first, second in zip(trainings[::2], trainings[1::2], strict=True):
        assert first.data.train == second.data.train
        assert (first.train.steps, second.train.steps) == (5, 8)
        assert (first.loss.active.keys(), first.data.val) == ({"recon"}, ())
        assert str(second.train.init_audio_from) == str(first.run_folder)
        assert second.loss.active.keys() == {"contrastive"}
    text = sources_table.write_table(sources.RESULTS, tmp_path / "SOURCES.md")
    assert f", after 5 steps with `{recon}`" in text
    with pytest.raises(SystemExit, match="must hold the same recipe"):
        sources.main([*asked, "--pretrain-steps", "6"])


def test_a_training_that_fails_ends_the_others_and_loses_none(
    tmp_path: Path, flap: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
):
    manifest(tmp_path / "own", COUNTS)
    asked = command(tmp_path, "--steps", "8", "--seeds", "1")
    working = sources.flap

    def fails_third(*arguments: str, threads: int | None = None) -> None:
        working(*arguments, threads=threads)
        if sum(ran[0] == "train" for ran in flap) == 3:
            raise RuntimeError("killed")

    monkeypatch.setattr(sources, "flap", fails_third)
    with pytest.raises(RuntimeError, match="killed"):
        sources.main(asked)
    stored = json.loads((sources.RESULTS / "x.json").read_text())["runs"]
    assert len(stored) >= 2
    assert sum(ran[0] == "train" for ran in flap) <= 4  # one may have begun already
    monkeypatch.setattr(sources, "flap", working)
    sources.main(asked)
    stored = json.loads((sources.RESULTS / "x.json").read_text())["runs"]
    assert sorted(run["left_out"][0] for run in stored) == sorted(COUNTS)


def test_what_another_process_stores_meanwhile_stays(
    tmp_path: Path, flap: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
):
    manifest(tmp_path / "own", COUNTS)
    working, asked = sources.flap, command(tmp_path, "--steps", "8", "--seeds", "1", "--only")

    def among_another(*arguments: str, threads: int | None = None) -> None:
        if arguments[0] == "train":
            monkeypatch.setattr(sources, "flap", working)
            sources.main([*asked, "b", "c"])
        working(*arguments, threads=threads)

    monkeypatch.setattr(sources, "flap", among_another)
    sources.main([*asked, "a"])
    stored = json.loads((sources.RESULTS / "x.json").read_text())["runs"]
    assert sorted(run["left_out"][0] for run in stored) == ["a", "b", "c"]


def test_a_file_that_does_not_say_its_data_is_not_added_to(
    tmp_path: Path, flap: list[tuple[str, ...]]
):
    manifest(tmp_path / "own", COUNTS)
    asked = command(tmp_path, "--steps", "8", "--seeds", "1")
    sources.main([*asked, "--only", "a"])
    file = sources.RESULTS / "x.json"
    found = json.loads(file.read_text())
    del found["data_sha256"]
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="must hold the same recipe"):
        sources.main(asked)


def test_a_recipe_that_lacks_a_source_comes_last(tmp_path: Path, flap: list[tuple[str, ...]]):
    manifest(tmp_path / "own", COUNTS)
    asked = command(tmp_path, "--steps", "8", "--seeds", "1")
    sources.main(asked)
    asked[1] = "best"
    sources.main([*asked, "--only", "a"])
    file = sources.RESULTS / "best.json"
    file.write_text(file.read_text().replace("0.2", "0.9").replace("0.4", "0.9"))
    text = sources_table.write_table(sources.RESULTS, tmp_path / "SOURCES.md")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| 8 |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| x", "| best"]
    assert "| 0.900, 1 of 5 sources | 0.100 |  | " in rows[1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--only", "a", "z"), r"--only must be some of a, b, c, d, e, got '\{'z'\}'"),
        ((), "--shards must have no enriched captions without --enrich, got '.*/train/c'"),
    ],
)
def test_what_would_mislead_is_refused(
    tmp_path: Path, flap: list[tuple[str, ...]], asked: tuple[str, ...], message: str
):
    manifest(tmp_path / "own", COUNTS)
    if not asked:
        left = tmp_path / "shards/train/c/captions.jsonl"
        left.parent.mkdir(parents=True)
        left.touch()
    with pytest.raises(ConfigError, match=message):
        sources.main(command(tmp_path, "--steps", "8", *asked))
    assert not any(arguments[0] == "train" for arguments in flap)


def test_a_source_must_be_trained_on_and_val_may_be_missing(
    tmp_path: Path, flap: list[tuple[str, ...]]
):
    file = manifest(tmp_path / "own", {"a": 3, "b": 3})
    shards = sources.prepared([file], tmp_path / "shards")
    assert [Path(arguments[2]).name for arguments in flap] == ["whole", "train"]
    assert "val/val" not in " ".join(shards.settings(("a",)))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"split": "val" if row["source"] == "b" else "train"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"each source must have rows of split train, got .*'b'"):
        sources.prepared([file], tmp_path / "shards")


def test_rows_without_a_source_are_refused(tmp_path: Path, flap: list[tuple[str, ...]]):
    file = manifest(tmp_path / "own", {"a": 2})
    file.write_text(file.read_text() + '{"audio": "x.wav", "caption": "x", "split": "train"}\n')
    with pytest.raises(ConfigError, match="have source and split, got '1 without'"):
        sources.prepared([file], tmp_path / "shards")


def test_folds_cover_each_source_once_and_are_of_like_size():
    found = sources.folds(COUNTS | {"f": 1}, 2)
    assert found == [("a", "f"), ("b", "e"), ("c", "d")]
    assert [len(fold) for fold in sources.folds(COUNTS, 1)] == [1] * 5


def test_the_table_is_the_mean_over_sources(tmp_path: Path, flap: list[tuple[str, ...]]):
    manifest(tmp_path / "own", COUNTS)
    sources.main(command(tmp_path, "--steps", "8", "--seeds", "2"))
    file = sources.RESULTS / "x.json"
    found = json.loads(file.read_text())
    # One source scored 1 both ways in one of two seeds: 0.2 + (1 - 0.2) / 5 / 2, and so on.
    for way in sources.DIRECTIONS:
        found["runs"][0]["scores"][found["runs"][0]["left_out"][0]][way]["R@10"] = 1.0
    file.write_text(json.dumps(found))
    text = sources_table.write_table(sources.RESULTS, tmp_path / "SOURCES.md")
    row = next(line for line in text.splitlines() if line.startswith("| x | 8"))
    assert "| 512 |" in row
    assert "| 0.280 / 0.460 | **0.370** | 0.100 | 0.440 0.300 | 0.500 |" in row
