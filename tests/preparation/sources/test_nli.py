"""NLI triples: a premise with both kinds of sentence gives one, in the order of the files."""

from __future__ import annotations

import json

import pytest

from flap_fast.files import ManifestError
from flap_fast.preparation.sources import SOURCES
from tests.preparation.sources.layouts import table, write


def lines(*pairs: tuple[str, str, str]) -> str:
    """JSON lines as both corpora have them."""
    keys = ("gold_label", "sentence1", "sentence2")
    rows = ({**dict(zip(keys, pair, strict=True)), "pairID": "x"} for pair in pairs)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_premise_gives_one_triple_if_it_has_both_kinds(tmp_path):
    files = {
        "multinli_1.0/multinli_1.0_train.jsonl": lines(
            ("entailment", "He left.", "He went away."),
            ("neutral", "He left.", "He was tired."),
            ("contradiction", "He left.", "He stayed."),
            ("contradiction", "A dog runs.", "A dog sits."),
        ),
        "snli_1.0/snli_1.0_train.jsonl": lines(
            ("contradiction", "A dog runs.", "A dog sleeps."),
            ("-", "A dog runs.", "A dog flies."),
            ("entailment", "A dog runs. ", "An animal moves."),
            ("entailment", "A dog runs.", "A dog is outside."),
            ("entailment", "Only this.", "This."),
        ),
        "snli_1.0/snli_1.0_dev.jsonl": lines(("entailment", "He left.", "He went.")),
        "multinli_1.0/multinli_1.0_dev_matched.jsonl": lines(
            ("contradiction", "a", "c"), ("entailment", "a", "b")
        ),
        "snli_1.0/README.jsonl": "not one of theirs",
    }
    triples = SOURCES["nli"].read(write(tmp_path, files))
    assert triples == {
        "train": [
            {
                "premise": "A dog runs.",
                "entailment": "An animal moves.",
                "contradiction": "A dog sleeps.",
            },
            {
                "premise": "He left.",
                "entailment": "He went away.",
                "contradiction": "He stayed.",
            },
        ],
        "dev": [],
        "dev_matched": [{"premise": "a", "entailment": "b", "contradiction": "c"}],
    }
    assert [list(row) for row in triples["dev_matched"]] == [
        ["premise", "entailment", "contradiction"]
    ]


def test_simcses_own_file_is_taken_as_it_is(tmp_path):
    rows = [("a, b", "c", "d"), ("", "e", "f"), ("g", "h", "i")]
    write(tmp_path, {"nli_for_simcse.csv": table("sent0,sent1,hard_neg", *rows)})
    assert SOURCES["nli"].read(tmp_path) == {
        "train": [
            {"premise": "a, b", "entailment": "c", "contradiction": "d"},
            {"premise": "g", "entailment": "h", "contradiction": "i"},
        ]
    }


def test_a_sentence_that_is_no_text_is_refused_with_its_line(tmp_path):
    row = {"gold_label": "neutral", "sentence1": "a", "sentence2": 3}
    write(tmp_path, {"snli_1.0_train.jsonl": json.dumps(row)})
    with pytest.raises(ManifestError, match=r"snli_1\.0_train\.jsonl:1: sentence1 and sentence2"):
        SOURCES["nli"].read(tmp_path)
