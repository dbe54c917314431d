"""Ids of a batch's pairs: clips by number, captions by their words; only where a loss asks."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.pair_ids import caption_id, pair_ids
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.equal_captions import text_numbers
from flap_fast.ranks import Ranks
from flap_fast.training.setup import clip_tokens
from tests.data.test_enriched import Seen, write_captions
from tests.tiny import tiny

ASKED = "loss.contrastive.duplicates=mask"


def test_a_captions_id_is_the_digest_of_its_words():
    """The same in every process and for ever: a run may be resumed on another machine."""
    assert caption_id("A dog, barks.") == caption_id("a dog\tBARKS") == 3495832801826945676
    assert caption_id("\ufeffa dog\u200b barks\u200e") == caption_id("a dog barks")
    assert caption_id("a dog barked") != caption_id("a dog barks")
    assert caption_id("half an emoji \ud83d") != caption_id("half an emoji \ud83e")
    assert {type(caption_id(text)) for text in ("", "?!", "♪")} == {int}


def test_captions_have_one_id_exactly_where_evaluation_calls_them_equal():
    captions = [
        "A dog  barks.",
        "a dog barks",
        "a dog barked",
        "Straße",
        "STRASSE",
        "?!",
        "..",
        "♪",
    ]
    ids, numbers = [caption_id(caption) for caption in captions], text_numbers(captions)
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in numbers] for a in numbers]


def test_pairs_have_two_ids_in_the_order_of_the_rows():
    found = pair_ids(np.array([5, 3, 5]), ["rain", "a dog", "Rain."])
    assert (found.shape, found.dtype) == ((3, 2), torch.int64)
    assert found[:, 0].tolist() == [5, 3, 5]
    assert found[0, 1] == found[2, 1] != found[1, 1]


def read(config: Config, rank: int = 0, world: int = 1) -> tuple[list[Batch], list[list[str]]]:
    """The batches of three steps, and the captions as they came to the tokenizer."""
    inner = tokenizer(config.text).inner
    inner.seen = []
    shards, ranks = open_shards(config.data.train), Ranks(rank, world, world)
    tokens = clip_tokens(config, shards, Ranks())
    loader = TrainingLoader(config, shards, Seen(inner, 77), ranks, tokens)
    return list(loader.batches(0, 3)), inner.seen


def ids_of(batch: Batch) -> torch.Tensor:
    assert batch.pair_ids is not None
    return batch.pair_ids


@pytest.fixture
def repeating(prepared: Path, tmp_path: Path) -> Path:
    """The corpus with enriched captions that all say the same, so that captions repeat."""
    folder = write_captions(shutil.copytree(prepared / "train", tmp_path / "train"))
    file = folder / "captions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ends = ["A sound.", "a sound", "Another sound"]
    rows = [row | {"caption": ends[n % 3]} for n, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "overrides", [("data.captions=concat",), ("data.captions=mix",), ("data.captions=original",)]
)
def test_ids_are_of_the_clip_and_the_caption_of_each_row(overrides: tuple, repeating: Path):
    config = tiny(f"data.train={repeating}", "frontend.backend=torch", ASKED, *overrides)
    batches, captions = read(config)
    for batch, texts in zip(batches, captions, strict=True):
        assert torch.equal(ids_of(batch), pair_ids(batch.clips, texts))
    if overrides == ("data.captions=mix",):
        equal = {caption_id("a sound"), caption_id("another sound")}
        assert equal <= set(torch.cat([ids_of(b)[:, 1] for b in batches]).tolist())
    other = tiny(
        *(f"data.train={repeating}", "frontend.backend=torch", ASKED, *overrides),
        "text.encoder=clip",
    )
    of_parts = [read(other, rank, 2)[0] for rank in range(2)]
    for step, batch in enumerate(batches):
        assert torch.cat([ids_of(part[step]) for part in of_parts]).equal(ids_of(batch))


def test_packed_clips_keep_the_ids_of_the_batchs_rows(prepared: Path):
    variable = ("audio.length=variable", "audio.max_duration_s=2", "train.micro_tokens=200")
    config = tiny(f"data.train={prepared}/train", "frontend.backend=torch", ASKED, *variable)
    batches, captions = read(config)
    assert len(batches) > 3
    for batch, texts in zip(batches, captions, strict=True):
        assert torch.equal(ids_of(batch), pair_ids(batch.clips, texts))


def test_a_replaced_clip_has_the_ids_of_what_replaced_it(prepared: Path, tmp_path: Path):
    data = shutil.copytree(prepared / "train", tmp_path / "train")
    at = open_shards([data]).locations[0, 1]
    with (data / "0.tar").open("r+b") as tar:
        tar.seek(at)
        tar.write(bytes(64))
    batches, captions = read(tiny(f"data.train={data}", "frontend.backend=torch", ASKED))
    clips = np.concatenate([batch.clips for batch in batches]).tolist()
    assert 0 not in clips
    assert clips.count(1) == 2
    for batch, texts in zip(batches, captions, strict=True):
        assert torch.equal(ids_of(batch), pair_ids(batch.clips, texts))


def test_without_a_loss_that_asks_nothing_is_computed(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flap_fast.data.loader.pair_ids", lambda *_: pytest.fail("computed"))
    batches, _ = read(tiny(f"data.train={prepared}/train", "frontend.backend=torch"))
    assert [batch.pair_ids for batch in batches] == [None] * 3
    assert "pair_ids" in {field.name for field in fields(Batch)}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A dog's bark", "a dog\u2019s bark.", True),
        ("\u201cRain\u201d falls\u2026", "rain falls", True),
        ("\u72d7\u53eb\u3002", "\u72d7\u53eb", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("beeps for 1.5 s", "beeps for 15 s", False),
        ("beeps for 1.5 s.", "Beeps, for 1.5 s", True),
        ("!?", "...", False),
    ],
)
def test_captions_are_equal_by_their_words(one: str, other: str, equal: bool):
    assert (caption_id(one) == caption_id(other)) == equal
