"""From a model and shards to the scores' JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.evaluation import crops_of, evaluation_batches
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import embed, read_texts
from flap_fast.evaluation.evaluated_model import EvaluatedModel, whole_model
from flap_fast.evaluation.run import (
    evaluate,
    flat_scores,
    names,
    score,
    selection_score,
)
from flap_fast.evaluation.scores_file import merged, write_scores
from flap_fast.evaluation.tables import sheets, terminal
from flap_fast.model.two_towers import TwoTowers
from flap_fast.places import place_of
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.ranks import on_ranks
from tests.sounds import encode, tone, write_manifest
from tests.tiny import tiny

CONFIG = tiny("eval.batch=4", "frontend.backend=torch")


def model() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(CONFIG)


def embeddings(folder: Path, world: int = 1, rank: int = 0):
    ranks = Ranks(rank=rank, world=world)
    return embed(model(), CONFIG, tokenizer(CONFIG.text), open_shards([folder]), ranks)


def embeddings_of_a_rank(folder: Path):
    import torch.distributed as dist

    e = embeddings(folder, dist.get_world_size(), dist.get_rank())
    return e.media, e.text, e.clip_of_caption


def test_every_clip_and_every_caption_is_embedded_once(prepared: Path):
    shards = open_shards([prepared / "train"])
    e = embeddings(prepared / "train")
    captions = [len(shards.record(clip)["text"]) for clip in range(len(shards))]
    assert len(e.media) == len(shards)
    assert len(e.text) == sum(captions)
    assert e.clip_of_caption.bincount().tolist() == captions
    assert torch.allclose(e.media.norm(dim=1), torch.ones(len(shards)))


def test_five_ranks_embed_what_one_embeds(prepared: Path):
    """24 clips and an uneven number of captions on 5 ranks: the last slices repeat some."""
    whole = embeddings(prepared / "train")
    for audio, text, clip_of_caption in on_ranks(5, embeddings_of_a_rank, prepared / "train"):
        torch.testing.assert_close(audio, whole.media, rtol=0, atol=1e-5)
        torch.testing.assert_close(text, whole.text, rtol=0, atol=1e-5)
        assert torch.equal(clip_of_caption, whole.clip_of_caption)


def test_evaluation_leaves_dropout_off_and_training_as_it_was(prepared: Path):
    trained = model().train()
    evaluate(trained, CONFIG, tokenizer(CONFIG.text), [prepared / "val"])
    assert trained.training
    a = embeddings(prepared / "val").media
    assert torch.equal(a, embeddings(prepared / "val").media)


def test_scores_are_named_after_their_folders(prepared: Path, tmp_path: Path):
    scores = evaluate(model(), CONFIG, tokenizer(CONFIG.text), [prepared / "val"])
    write_scores(tmp_path / "eval.json", scores)
    found = json.loads((tmp_path / "eval.json").read_text())["retrieval"]["val"]
    assert found["clips"] == 6
    assert 0 <= found["audio_to_text"]["R@10"] <= 1
    assert found["chance"]["text_to_audio"]["R@5"] == 5 / 6
    assert 0 <= selection_score(scores) <= 1
    (table,) = terminal(scores)
    assert isinstance(table, Table)
    assert table.row_count == 2


def spoilt(encode: Callable, row: int) -> Callable:
    """The same with NaN in one row of the first batch."""
    left = [row]

    def encoded(*arguments, **named):
        rows = encode(*arguments, **named).clone()
        if left:
            rows[left.pop()] = torch.nan
        return rows

    return encoded


def test_an_embedding_that_is_not_finite_is_named(prepared: Path, monkeypatch):
    shards, flap = open_shards([prepared / "val"]), model()
    with monkeypatch.context() as patch:
        patch.setattr(flap, "project_media", spoilt(flap.project_media, 2))
        with pytest.raises(ArithmeticError, match=rf"for 1 of 6, the first of {shards.name(2)};"):
            embed(flap, CONFIG, tokenizer(CONFIG.text), shards, Ranks())
    monkeypatch.setattr(flap, "embed_text", spoilt(flap.embed_text, 0))
    texts = whole_model(flap, CONFIG, tokenizer(CONFIG.text), Ranks()).texts
    with pytest.raises(ArithmeticError, match=r"for 1 of 2, the first of 'a dog'"):
        texts(["a dog barks twice", "a dog"])


def test_scores_that_are_no_json_are_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_scores(tmp_path / "eval.json", {"geometry": {"val": {"alignment": float("nan")}}})
    assert not any(tmp_path.iterdir())


def test_scores_join_those_of_other_tasks_and_data():
    data = {"val": "/a/val", "test": "/a/test"}
    before = {
        "retrieval": {"val": 1, "test": 2},
        "geometry": {"val": 3},
        "flops": [4],
        "data": data,
    }
    again = {"retrieval": {"val": 5}, "data": {"val": "/a/val"}}
    assert merged(before, again) == before | {"retrieval": {"val": 5, "test": 2}}
    assert merged({}, again) == again
    # Under a name that means other data now, nothing of the former stays.
    moved = {"retrieval": {"val": 5}, "flops": [6], "data": {"val": "/b/val"}}
    assert merged(before, moved) == {
        "retrieval": {"val": 5, "test": 2},
        "geometry": {},
        "flops": [6],
        "data": {"val": "/b/val", "test": "/a/test"},
    }


@pytest.mark.parametrize("name", ["data/audiocaps-16khz/test", "u[/val]", "val[a]"])
def test_the_table_keeps_every_digit_and_every_name_on_80_columns(name: str):
    found = {"R@1": 0.25, "R@5": 0.5, "R@10": 1.0, "mAP@10": 0.375, "mAP@16": 0.875}
    both = {"audio_to_text": found, "text_to_audio": found}
    values = {**both, "chance": both, "clips": 4, "captions": 20}
    console = Console(width=80, record=True)
    console.print(*terminal({"retrieval": {name: values}}))
    text = console.export_text()
    for number in ("0.250", "0.500", "0.375", "0.875"):
        assert text.count(number) == 2
    assert text.count("1.000") == 4  # R@10 and its chance
    assert f"{name}: 4 clips, 20 captions" in text
    assert "…" not in text
    assert all(letter in text for letter in name)


def test_folders_of_one_name_are_told_apart_by_their_parents():
    folders = [Path("a/val"), Path("b/val"), Path("b/test")]
    assert list(names(folders)) == ["a/val", "b/val", "test"]
    assert list(names([Path("a/val"), Path("a/val")])) == ["val"]


def with_a_broken_clip(prepared: Path, tmp_path: Path) -> Path:
    """Six clips, of which the fourth cannot be decoded."""
    folder = tmp_path / "broken"
    folder.mkdir()
    tar = bytearray((prepared / "val/0.tar").read_bytes())
    at = open_shards([prepared / "val"]).locations[3, 1]
    tar[at : at + 16] = bytes(16)
    (folder / "0.tar").write_bytes(tar)
    return folder


def test_a_clip_that_cannot_be_decoded_is_named_and_nothing_is_left_out(
    prepared: Path, tmp_path: Path
):
    folder = with_a_broken_clip(prepared, tmp_path)
    at = open_shards([folder]).locations[3, 1]
    with pytest.raises(ShardError, match=rf"0\.tar at byte {at}"):
        evaluate(model(), CONFIG, tokenizer(CONFIG.text), [folder])


def error_of_a_rank(folder: Path) -> str:
    import torch.distributed as dist

    try:
        embeddings(folder, dist.get_world_size(), dist.get_rank())
    except ShardError as error:
        return str(error)
    return "none"


def test_all_ranks_stop_at_a_clip_that_one_cannot_decode(prepared: Path, tmp_path: Path):
    folder = with_a_broken_clip(prepared, tmp_path)
    first, second = on_ranks(2, error_of_a_rank, folder, timeout_s=60)
    assert first == "a clip of another rank cannot be read; that rank says which"
    assert "cannot be decoded" in second


def evaluated(config: Config = CONFIG) -> EvaluatedModel:
    return whole_model(model().eval(), config, tokenizer(config.text), Ranks())


def two_tones(n: int) -> bytes:
    """A WAV of 3 s, the n-th of a kind, that changes in the middle."""
    wave = np.concatenate([tone(200 + 100 * n, 1.5, 16_000), tone(3000, 1.5, 16_000)])
    return encode(wave, 16_000, "WAV")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten tones of 3 s that change in the middle; the last two have labels and no caption."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for n in range(10):
        (folder / f"{n}.wav").write_bytes(two_tones(n))
        caption = {"caption": f"tone {n}"} if n < 8 else {}
        rows.append({"audio": f"{n}.wav", "labels": [("low_tone", "high  tone")[n % 2]], **caption})
    prepare(write_manifest(folder / "m.jsonl", rows), folder / "out", show=False)
    return folder / "out/train"


def test_labels_come_from_the_manifest_also_without_captions(labelled: Path):
    found = score(evaluated(), [labelled], ("zero_shot",))["zero_shot"]["train"]
    assert (found["clips"], found["classes"], found["templates"]) == (10, 2, 1)
    assert found["chance"]["top_1"] == 0.5
    assert found["top_5"] == 1
    assert embeddings(labelled).labels[:2] == (("low tone",), ("high tone",))
    with pytest.raises(ConfigError, match=r"10 sounds must have a caption .* got 2 without"):
        score(evaluated(), [labelled], ("retrieval",))


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tones of 3 s in two classes, their folds in the manifest, each fold a split."""
    folder = tmp_path_factory.mktemp("folded")
    rows = []
    for n in range(12):
        (folder / f"{n}.wav").write_bytes(two_tones(n))
        named = {"labels": ["low"] if n < 6 else ["high"], "source": f"source {n}"}
        named |= {"fold": n % 3 + 1, "split": f"fold{n % 3 + 1}"}
        rows.append({"audio": f"{n}.wav", **named})
    prepare(write_manifest(folder / "m.jsonl", rows), folder / "out", show=False)
    return folder / "out"


def test_a_probe_takes_the_folds_of_shards_that_are_named_as_one_place(folded: Path):
    whole = place_of("data", f"{folded}/fold{{1..3}}/*.tar")
    scores = score(evaluated(), [whole], ("probe", "zero_shot"))
    (found,) = scores["probe"].values()
    assert (found["clips"], found["folds"]) == (12, "the data's 3 folds")
    assert found["fold_names"] == ["1", "2", "3"]
    assert found["chance"] == {"accuracy": 0.5, "std": 0.0, "of_fold": [0.5] * 3}
    columns = flat_scores(scores)
    (column,) = (name for name in columns if name.endswith("/probe/pooled/linear"))
    assert (
        columns[column] == found["pooled"]["linear"]["accuracy"] == selection_score(scores, "probe")
    )
    (sheet,) = sheets({"probe": {"tones": found}})
    assert sheet.title == "Probe, tones: 12 clips, 2 classes, the data's 3 folds"
    assert [row[0] for row in sheet.ours][::4] == ["joint, linear", "chance"]
    assert sheet.ours[-1] == ("chance", "50.00", "0.00", "50.00", "50.00")


def test_sources_are_read_from_the_manifest_and_one_fold_alone_is_refused(folded: Path):
    texts = read_texts(open_shards([folded / "fold2"]))
    assert texts.folds == ("2",) * 4
    assert texts.sources == ("source 1", "source 4", "source 7", "source 10")
    with pytest.raises(ConfigError, match=r"folds of a probe's clips .* got '1 \(2\)'"):
        score(replace(evaluated(), clips=no_embeddings), [folded / "fold2"], ("probe",))


def test_pooled_features_are_what_the_head_is_given_averaged_over_crops(folded: Path):
    shards, flap = open_shards([folded / "fold1"]), model().eval()
    given = flap, CONFIG, tokenizer(CONFIG.text), shards, Ranks()
    e = embed(*given, pooled=True)
    assert embed(*given).pooled is None
    assert e.pooled is not None
    assert flap.head is not None
    torch.testing.assert_close(functional.normalize(flap.head(e.pooled), dim=1), e.media)
    torch.testing.assert_close(e.media, embed(*given).media)
    both = tiny("eval.batch=4", "frontend.backend=torch", "eval.crop=multi:2")
    means = embed(flap, both, tokenizer(CONFIG.text), shards, Ranks(), pooled=True).pooled
    assert means is not None
    crops = [
        flap.pool_media(batch)
        for batch, _ in evaluation_batches(both, shards, crops_of(both, shards, Ranks()), Ranks())
    ]
    torch.testing.assert_close(means, torch.cat(crops).unflatten(0, (4, 2)).mean(1))


def test_what_the_texts_lack_is_said_before_anything_is_embedded(labelled: Path, prepared: Path):
    without_embeddings = replace(evaluated(), clips=no_embeddings)
    with pytest.raises(ConfigError, match="zero-shot data must have labels"):
        score(without_embeddings, [labelled, prepared / "val"], ("zero_shot",))
    with pytest.raises(ConfigError, match=r"a label must be one of the 1 classes, got 'high tone'"):
        score(replace(without_embeddings, classes=("low tone",)), [labelled], ("zero_shot",))
    with pytest.raises(ConfigError, match=r"eval\.templates must contain"):
        score(
            replace(without_embeddings, config=tiny("eval.templates=nothing")),
            [labelled],
            ("zero_shot",),
        )
    with pytest.raises(ConfigError, match=r"got 2 without"):
        score(without_embeddings, [prepared / "val", labelled], ("retrieval",))


def no_embeddings(*_):
    pytest.fail("it embedded")


def test_a_text_encoder_alone_is_refused_before_anything_is_embedded(prepared: Path):
    text_only = replace(evaluated(), clips=no_embeddings, text_only=True)
    with pytest.raises(ConfigError, match=r"must have an encoder of sounds or images, got 'a text"):
        score(text_only, [], ("flops",))
    with pytest.raises(ConfigError, match="a text encoder alone embeds no clips"):
        score(text_only, [prepared / "val"], ("retrieval", "flops"))


def test_sentences_are_checked_before_anything_is_embedded(prepared: Path, tmp_path: Path):
    sts = tmp_path / "sts.csv"
    sts.write_text("g\tf\ty\t1\tno number\ta\tb\n")
    without_embeddings = replace(evaluated(), clips=no_embeddings)
    with pytest.raises(ConfigError, match=r"sts\.csv:1 must be a scored pair"):
        score(without_embeddings, [prepared / "val", sts], ("retrieval", "sts"))
    with pytest.raises(ConfigError, match="must be SentEval's folder"):
        score(without_embeddings, [prepared / "val", sts], ("retrieval", "transfer"))


def test_templates_of_the_settings_count(labelled: Path):
    config = tiny("eval.templates=audio29", "frontend.backend=torch")
    found = score(evaluated(config), [labelled], ("zero_shot",))["zero_shot"]["train"]
    assert found["templates"] == 29


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_several_crops_are_the_mean_of_their_embeddings(labelled: Path, backend: str):
    """Three crops of 1 s from 3 s: the begin, the middle and the end."""
    several = tiny("eval.crop=multi:3", "eval.batch=4", f"frontend.backend={backend}")
    shards = open_shards([labelled])
    found = embed(model(), several, tokenizer(several.text), shards, Ranks()).media
    flap, mel = model().eval(), kaldi_log_mel(several.audio)
    for clip in (0, 7):
        wave = read_sound(shards.encoded(clip), 16_000)
        cut = torch.from_numpy(np.stack([wave[at : at + 16_000] for at in (0, 16_000, 32_000)]))
        with torch.no_grad():
            rows = flap.embed_media(normalise(mel(cut), several.audio)[:, None])
        mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
        assert (found[clip] - mean).abs().max() < 1e-5
        assert (found[clip] - rows[1]).abs().max() > 1e-3


def test_all_tasks_in_one_call(prepared: Path, tmp_path: Path):
    sts = tmp_path / "sts-test.csv"
    sts.write_text("".join(f"g\tf\ty\t1\t{n}\ta {n}\tb {2 * n}\n" for n in range(5)))
    asked = ("retrieval", "geometry", "flops", "sts")
    found = score(evaluated(), [prepared / "val", sts], asked)
    assert (
        found["retrieval"]
        == evaluate(model(), CONFIG, tokenizer(CONFIG.text), [prepared / "val"])["retrieval"]
    )
    assert set(found["geometry"]["val"]) == {"alignment", "uniformity_audio", "uniformity_text"}
    assert found["sts"]["sts-test.csv"]["sts-test"]["pairs"] == 5
    assert len(found["flops"]) == 20
    assert found["data"] == {"val": str(prepared / "val"), "sts-test.csv": str(sts)}
    # What the data is for, when nothing is asked.
    assert set(score(evaluated(), [sts])) == {"sts", "data"}


def test_data_is_stored_as_a_path_that_means_the_same_anywhere(prepared: Path, monkeypatch):
    monkeypatch.chdir(prepared)
    assert score(evaluated(), [Path("val")], ("geometry",))["data"] == {
        "val": str(prepared / "val")
    }


def test_sentences_may_be_embedded_by_the_tower_alone():
    joint, tower = evaluated(), evaluated(tiny("eval.sentences=tower"))
    assert joint.sentences(["a", "b"]).shape == (2, 16)
    assert tower.sentences(["a", "b"]).shape == (2, 32)
    assert tower.sentences([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("data", "tasks", "message"),
    [
        ((), (), "DATA or --tasks must say what to score, got 'neither'"),
        (("val",), ("recall",), "a task must be one of retrieval, relevance, .*, got 'recall'"),
        (("val",), ("sts",), "the data of sts must name a file or folder of sentences"),
        (("val",), ("flops",), "val must be wanted by a task, one of retrieval"),
        (("sts.csv",), ("retrieval",), "the data of retrieval must name a folder of shards"),
        (("val", "sts.csv"), ("retrieval",), "sts.csv must be wanted by a task, one of sts"),
    ],
)
def test_tasks_and_data_must_fit(data, tasks, message, prepared: Path, tmp_path: Path):
    (tmp_path / "sts.csv").touch()
    (tmp_path / "val").symlink_to(prepared / "val")
    with pytest.raises(ConfigError, match=message):
        score(evaluated(), [tmp_path / name for name in data], tasks)
