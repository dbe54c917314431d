"""Negatives on their way from a manifest to the tokenizer: drawn by seed and step alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flap_fast.config import Config
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.negatives import Negatives, negatives_of
from flap_fast.data.pair_ids import pair_ids
from flap_fast.data.shards import ShardError, Shards, open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.data.test_enriched import Seen
from tests.sounds import write_corpus, write_manifest
from tests.tiny import tiny

WANTED = ("loss.contrastive.negatives=2", "frontend.backend=torch")


def write_negatives(folder: Path, *, without: int | None = None) -> Path:
    """Shards of 12 clips, clip n with the captions `wrong n 0`, `wrong n 1` ... of it."""
    manifest = write_corpus(folder, 12)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for n, row in enumerate(rows):
        if n != without:
            row["negatives"] = [f"wrong {n} {m}" for m in range(1 + n % 4)]
    prepare(write_manifest(manifest, rows), folder / "out", shard_clips=5, show=False)
    return folder / "out" / "train"


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_negatives(tmp_path_factory.mktemp("negatives"))


def texts_of(
    config: Config, rank: int = 0, world: int = 1, steps: tuple[int, int] = (0, 3)
) -> tuple[list[Any], list[list[str]]]:
    """The batches of some steps, and the texts as they came to the tokenizer."""
    inner = tokenizer(config.text).inner
    inner.seen = []
    ranks = Ranks(rank, world, world)
    shards = open_shards(config.data.train)
    loader = TrainingLoader(config, shards, Seen(inner, 77), ranks)
    return list(loader.batches(*steps)), inner.seen


def groups(texts: list[str], names: int = 3) -> list[list[str]]:
    size = len(texts) // names
    return [texts[at : at + size] for at in range(0, len(texts), size)]


def test_each_row_has_its_own_clips_negatives_group_by_group_after_the_captions(shards_folder):
    config = tiny(f"data.train={shards_folder}", *WANTED)
    shards = open_shards([shards_folder])
    batches, seen = texts_of(config)
    for batch, texts in zip(batches, seen, strict=True):
        captions, *wrong = groups(texts)
        assert len(batch.ids) == 3 * 8
        for row, clip in enumerate(batch.clips.tolist()):
            record = shards.record(clip)
            assert captions[row] in record["text"]
            listed, drawn = record["negatives"], [group[row] for group in wrong]
            assert set(drawn) <= set(listed)
            assert len(set(drawn)) == min(2, len(listed))  # without replacement where they do
    every = {text for texts in seen for group in groups(texts)[1:] for text in group}
    assert len(every) > 20  # of 30: none is always left out


def test_a_clips_negatives_all_come_before_one_comes_again(shards_folder):
    shards = open_shards([shards_folder])
    negatives = Negatives(tiny("loss.contrastive.negatives=5"), shards)
    u = np.random.default_rng(0).random((40, 5)).tolist()
    drawn = [negatives.of(0, {"negatives": ["a", "b", "c"]}, row) for row in u]
    assert all(set(some[:3]) == {"a", "b", "c"} and some[3] != some[4] for some in drawn)
    assert {tuple(some[:3]) for some in drawn} == {tuple(p) for p in
        ("abc", "acb", "bac", "bca", "cab", "cba")}  # fmt: skip


def test_ranks_micro_batches_and_restarts_draw_what_one_process_draws(shards_folder):
    data = f"data.train={shards_folder}"
    _, whole = texts_of(tiny(data, *WANTED))
    _, restarted = texts_of(tiny(data, *WANTED), steps=(2, 3))
    assert restarted == whole[2:]
    parts = [texts_of(tiny(data, *WANTED, "train.micro_batch=2"), rank, 2)[1] for rank in (0, 1)]
    for step in range(3):
        mine = [groups(some) for part in parts for some in part[2 * step : 2 * step + 2]]
        joined = [[text for some in mine for text in some[n]] for n in range(3)]
        assert joined == groups(whole[step])
    _, other = texts_of(tiny(data, *WANTED, "run.seed=1"))
    assert other != whole


def test_captions_crops_and_order_are_those_without_negatives(shards_folder):
    data = (f"data.train={shards_folder}", "frontend.backend=torch")
    with_some, texts = texts_of(tiny(*data, *WANTED))
    without, captions = texts_of(tiny(*data))
    assert [groups(some)[0] for some in texts] == captions
    assert all((a.media == b.media).all() for a, b in zip(with_some, without, strict=True))


def test_ids_are_of_the_negatives_that_the_rows_have(shards_folder):
    config = tiny(f"data.train={shards_folder}", *WANTED, "loss.contrastive.duplicates=mask")
    for batch, texts in zip(*texts_of(config), strict=True):
        captions, *wrong = groups(texts)
        expected = pair_ids(batch.clips, captions, list(zip(*wrong, strict=True)))
        assert batch.pair_ids.equal(expected)
        assert batch.pair_ids.shape == (8, 4)


def test_a_clip_that_replaces_another_brings_its_negatives(tmp_path: Path):
    data = write_negatives(tmp_path)
    at = open_shards([data]).locations[2, 1]
    with (data / "0.tar").open("r+b") as tar:
        tar.seek(at)
        tar.write(bytes(64))
    batches, seen = texts_of(tiny(f"data.train={data}", *WANTED))
    clips = np.concatenate([batch.clips for batch in batches]).tolist()
    assert 2 not in clips
    drawn = [text for texts in seen for text in groups(texts)[1]]
    assert [int(text.split()[1]) for text in drawn] == clips


def test_a_clip_without_negatives_is_named_with_the_remedy(tmp_path: Path):
    data = write_negatives(tmp_path, without=7)
    config = tiny(f"data.train={data}", *WANTED)
    says = (
        r"^'clip-7' \(.*1\.tar at byte \d+\) must have `negatives`, captions that are wrong for "
        r"it, for loss\.contrastive\.negatives = 2, got none; give its row of the manifest some "
        r"and prepare it again, or set 0$"
    )
    with pytest.raises(ShardError, match=says):
        texts_of(config)


def test_a_folder_without_negatives_is_refused_before_a_step(shards_folder, prepared: Path):
    folders = [shards_folder, prepared / "train"]
    given = f"data.train=[{','.join(map(str, folders))}]"
    asked = ("loss.sigmoid.weight=1", "loss.sigmoid.negatives=1", given, *WANTED)
    config = tiny(*asked)
    with pytest.raises(ShardError, match=r"'clip-0'.*contrastive\.negatives = 2 and loss\.sig.* 1"):
        TrainingLoader(config, open_shards(folders), tokenizer(config.text), Ranks())


def test_nothing_is_read_where_no_loss_asks(monkeypatch: pytest.MonkeyPatch, prepared: Path):
    shards = open_shards([prepared / "train"])
    monkeypatch.setattr(Shards, "record", lambda *_: pytest.fail("read"))
    assert Negatives(tiny(), shards).of(0, {}, []) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, []),
        ("one", ["one"]),
        (["b", " a ", "b", "", 3, "half an emoji \ud83d"], ["b", "a", "half an emoji \ufffd"]),
    ],
)
def test_the_negatives_of_foreign_shards_are_read_as_captions_are(value: Any, found: list[str]):
    assert negatives_of({"negatives": value}) == found
