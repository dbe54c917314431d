"""Sentences beside the captions: read from files, in an order of their own, the same over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.sampler import Sampler
from flap_fast.data.sentences import Sentences, read_triples
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.files import ManifestError
from flap_fast.ranks import Ranks
from tests.tiny import tiny
from tests.triples import write_triples

ALL = ("loss.simcse.weight=0.1", "loss.nli.weight=0.1", "text.dropout=0.1")
NAMES = ("text", "text_again", "premise", "entailment", "contradiction")
TRIPLE = ("A man sings.", "Someone sings.", 'Nobody "sings".')


def settings(nli: Path, *overrides: str) -> Config:
    return tiny(f"data.nli={nli}", *ALL, *overrides)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps(dict(zip(NAMES[2:], TRIPLE, strict=True))) + "\n\n"),
        ("a.tsv", "premise\tentailment\tcontradiction\tgenre\n" + "\t".join(TRIPLE) + "\tnews\n"),
        # As SimCSE publishes SNLI and MultiNLI.
        ("a.csv", 'sent0,sent1,hard_neg\nA man sings.,Someone sings.,"Nobody ""sings""."\n'),
    ],
)
def test_triples_are_read_from_each_format_and_from_a_folder_of_them(
    name: str, text: str, tmp_path: Path
):
    (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not one of them")
    assert read_triples([tmp_path / name]) == [TRIPLE] == read_triples([tmp_path])
    assert read_triples([tmp_path, tmp_path / name]) == [TRIPLE] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"premise": "a", "entailment": "b"}', r"a\.jsonl:2: contradiction must be a text .*None"),
        ('{"premise;sent": "a"}', r"got None; its columns are 'premise;sent'$"),
        ('{"premise": " ", "sent1": "b", "hard_neg": "c"}', r"a\.jsonl:2: premise must be .*' '"),
        ("premise", r"a\.jsonl:2 is not JSON"),
    ],
)
def test_a_row_without_its_three_sentences_is_refused_by_its_line(
    text: str, message: str, tmp_path: Path
):
    good = json.dumps(dict(zip(NAMES[2:], TRIPLE, strict=True)))
    (tmp_path / "a.jsonl").write_text(f"{good}\n{text}\n")
    with pytest.raises(ManifestError, match=message):
        read_triples([tmp_path])


def test_half_an_emoji_in_a_sentence_is_a_mark_in_its_place(tmp_path: Path):
    row = {**dict(zip(NAMES[2:], TRIPLE, strict=True)), "premise": "a dog \ud83d"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read_triples([tmp_path]) == [("a dog \ufffd", *TRIPLE[1:])]


def test_a_folder_without_sentences_and_too_few_of_them_are_refused(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"data\.nli must hold \.jsonl, \.tsv, \.csv files"):
        read_triples([tmp_path])
    write_triples(tmp_path, 7)
    with pytest.raises(ConfigError, match=r"global_batch must be at most the 7 triples of data\.n"):
        Sentences(settings(tmp_path))


def test_sentences_stand_group_by_group_and_captions_come_first(tmp_path: Path):
    write_triples(tmp_path, 20)
    sentences = Sentences(settings(tmp_path))
    texts = sentences(3, np.arange(2, 5), ["x", "y", "z"])
    groups = [texts[at : at + 3] for at in range(0, 15, 3)]
    assert groups[0] == groups[1] == ["x", "y", "z"]
    numbers = [premise.split()[-1] for premise in groups[2]]
    assert groups[3] == [f"it follows from {n}" for n in numbers]
    assert groups[4] == [f"it contradicts {n}" for n in numbers]
    premises = Sentences(settings(tmp_path, "loss.simcse.on=nli", "loss.nli.weight=0"))
    assert premises(3, np.arange(2, 5), ["x", "y", "z"]) == [*groups[0], *groups[2] * 2]


def test_without_a_loss_of_text_captions_stand_alone_and_no_file_is_read():
    assert Sentences(tiny("data.nli=nowhere"))(0, np.arange(2), ["x", "y"]) == ["x", "y"]


def premises(sentences: Sentences, step: int) -> list[str]:
    return sentences(step, np.arange(8), ["x"] * 8)[16:24]


def test_triples_cycle_in_an_order_that_the_seed_and_the_step_decide(tmp_path: Path):
    write_triples(tmp_path, 20)
    sentences = Sentences(settings(tmp_path))
    steps = [premises(sentences, step) for step in range(8)]
    for first in range(0, 8, 2):  # 20 triples are two batches of 8
        assert len({*steps[first], *steps[first + 1]}) == 16
    assert len({tuple(step) for step in steps}) == 8
    again = Sentences(settings(tmp_path))
    assert [premises(again, step) for step in (5, 2, 7)] == [steps[5], steps[2], steps[7]]
    assert premises(Sentences(settings(tmp_path, "run.seed=1")), 0) != steps[0]
    as_clips = Sampler(np.zeros(20, np.int64), 8, settings(tmp_path).run.seed).samples(0)
    assert [int(premise.split()[-1]) for premise in steps[0]] != as_clips.tolist()


def test_ranks_and_micro_batches_read_the_sentences_of_one_process(prepared: Path, tmp_path: Path):
    write_triples(tmp_path, 20)
    data = (f"data.train={prepared}/train", "frontend.backend=torch")

    def read(rank: int, world: int, *overrides: str) -> list[list[str]]:
        config = settings(tmp_path, *data, *overrides)
        loader = TrainingLoader(
            config,
            open_shards(config.data.train),
            tokenizer(config.text),
            Ranks(rank=rank, world=world),
        )
        decode = tokenizer(config.text).inner.batch_decode
        batches = list(loader.batches(4, 5))
        texts = [decode(batch.ids, skip_special_tokens=True) for batch in batches]
        sizes = [len(text) // len(NAMES) for text in texts]
        return [
            [t for text, n in zip(texts, sizes, strict=True) for t in text[at * n : at * n + n]]
            for at in range(len(NAMES))
        ]

    whole = read(0, 1)
    assert whole[0] == whole[1]
    assert [len(group) for group in whole] == [8] * len(NAMES)
    parts = [read(rank, 2, "train.micro_batch=2") for rank in (0, 1)]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole
