"""Frozen encoders embed the texts and clips of a run's evaluations once, to the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import evaluating
from flap_fast.evaluation.kept_outputs import KeptOutputs
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training import scorer
from flap_fast.training.loop import train
from tests.ranks import on_ranks
from tests.tiny import YAMNET, tiny

FROZEN = "text.freeze=true", "text.pool=mean"
# 15 captions and 6 clips, 4 at a time.
TEXT, MEDIA = {"pool_text": 4}, {"pool_media": 2}
KINDS = {
    "text": (FROZEN, TEXT),
    "clips": ((*YAMNET, "audio.freeze=true"), MEDIA),
    "clips of one length": (("audio.freeze=true",), MEDIA),
    "both, three crops": (
        (*FROZEN, "audio.freeze=true", "eval.crop=multi:3"),
        TEXT | {"pool_media": 5},
    ),
}


def evaluations(runs: Path, data: Path, monkeypatch: pytest.MonkeyPatch, *more: str):
    """The scores of a run's three evaluations, and how often each ran its encoders."""
    passes: list[dict[str, int]] = []
    evaluate = scorer.evaluate

    def counting(name: str) -> Any:
        real = getattr(TwoTowers, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            passes[-1][name] += 1
            return real(*arguments, **named)

        return counted

    def begun(*arguments: Any) -> Any:
        passes.append(dict.fromkeys(("pool_text", "pool_media"), 0))
        with monkeypatch.context() as patched:
            for name in passes[-1]:
                patched.setattr(TwoTowers, name, counting(name))
            return evaluate(*arguments)

    monkeypatch.setattr(scorer, "evaluate", begun)
    settings = [f"run.folder={runs}", f"data.train={data}/train", f"data.val={data}/val"]
    settings += ["eval.every_steps=2", "train.steps=6", "eval.batch=4", "log.tensorboard=false"]
    train(tiny(*settings, "frontend.backend=torch", "sched.warmup_steps=0", "optim.lr=0.01", *more))
    monkeypatch.setattr(scorer, "evaluate", evaluate)
    rows = map(json.loads, (runs / "flap/metrics.jsonl").read_text().splitlines())
    found = [{n: v for n, v in row.items() if n != "eval_s"} for row in rows if "eval_s" in row]
    return found, passes


@pytest.mark.parametrize("name", KINDS)
def test_the_scores_are_those_of_an_encoder_that_runs_in_each(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings, first = KINDS[name]
    scores, passes = evaluations(tmp_path / "kept", prepared, monkeypatch, *settings)
    assert [{n: found[n] for n in first} for found in passes] == [
        first,
        *[dict.fromkeys(first, 0)] * 2,
    ]
    with monkeypatch.context() as patched:
        patched.setattr(scorer, "KeptOutputs", lambda *_, **__: None)
        each, passes = evaluations(tmp_path / "each", prepared, patched, *settings)
    assert [{n: found[n] for n in first} for found in passes] == [first] * 3
    assert scores == each
    assert scores[0] != scores[1] | {"step": 2}  # the head is trained


def test_a_single_evaluation_keeps_nothing():
    """Nor waits for a GPU: what it embeds is asked for once."""
    config, passes = tiny(*FROZEN), []
    model = TwoTowers(config)
    model.text.register_forward_pre_hook(lambda *_: passes.append(1))
    outputs, given = KeptOutputs(model, Ranks()), tokenizer(config.text)(["a dog"])
    with evaluating(model):
        for _ in range(2):
            assert torch.equal(outputs.embed_text(*given), model.embed_text(*given))
    assert len(passes) == 4


def test_an_encoder_that_is_trained_runs_in_each(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert evaluations(tmp_path, prepared, monkeypatch)[1] == [TEXT | MEDIA] * 3


def test_a_batch_is_told_from_others_of_the_same_tokens():
    config = tiny(*FROZEN)
    model = TwoTowers(config)
    embed = KeptOutputs(model, Ranks(), text=True).embed_text
    ids = torch.arange(16).reshape(2, 8) + 5
    masks = torch.ones_like(ids), (torch.arange(8) < 4).long().expand(2, 8)
    with evaluating(model):
        for rows in [(ids, mask) for mask in masks] + [
            (ids.reshape(1, 16), masks[0].reshape(1, 16))
        ]:
            for _ in range(2):
                assert torch.equal(embed(*rows), model.embed_text(*rows))


def passes_of_this_rank() -> int:
    """How often the encoder runs where the second batch is new to one of two ranks."""
    config, passes = tiny(*FROZEN), []
    model, ranks = TwoTowers(config), Ranks(dist.get_rank(), dist.get_world_size())
    model.text.register_forward_pre_hook(lambda *_: passes.append(1))
    embed, words = KeptOutputs(model, ranks, text=True).embed_text, tokenizer(config.text)
    with evaluating(model):
        for caption in ("a dog", "a dog" if ranks.first else "rain"):
            embed(*words([caption]))
    return len(passes)


def test_over_ranks_all_run_the_encoder_or_none():
    assert on_ranks(2, passes_of_this_rank) == [2, 2]
