"""From a model and shards to the scores' JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flap_fast.data.captions import tokenizer
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.evaluate.embed import embed
from flap_fast.evaluate.run import evaluate, names, selection_score, table, write_scores
from flap_fast.model.flap import Flap
from flap_fast.ranks import Ranks
from tests.ranks import on_ranks
from tests.tiny import tiny

CONFIG = tiny("eval.batch=4", "frontend.backend=torch")


def model() -> Flap:
    torch.manual_seed(0)
    return Flap(CONFIG)


def embeddings(folder: Path, world: int = 1, rank: int = 0):
    ranks = Ranks(rank=rank, world=world)
    return embed(model(), CONFIG, tokenizer(CONFIG.text), open_shards([folder]), ranks)


def embeddings_of_a_rank(folder: Path):
    import torch.distributed as dist

    e = embeddings(folder, dist.get_world_size(), dist.get_rank())
    return e.audio, e.text, e.owner


def test_every_clip_and_every_caption_is_embedded_once(prepared: Path):
    shards = open_shards([prepared / "train"])
    e = embeddings(prepared / "train")
    captions = [len(shards.record(clip)["text"]) for clip in range(len(shards))]
    assert len(e.audio) == len(shards)
    assert len(e.text) == sum(captions)
    assert e.owner.bincount().tolist() == captions
    assert torch.allclose(e.audio.norm(dim=1), torch.ones(len(shards)))


def test_five_ranks_embed_what_one_embeds(prepared: Path):
    """24 clips and an uneven number of captions on 5 ranks: the last shares repeat some."""
    whole = embeddings(prepared / "train")
    for audio, text, owner in on_ranks(5, embeddings_of_a_rank, prepared / "train"):
        torch.testing.assert_close(audio, whole.audio, rtol=0, atol=1e-5)
        torch.testing.assert_close(text, whole.text, rtol=0, atol=1e-5)
        assert torch.equal(owner, whole.owner)


def test_evaluation_leaves_dropout_off_and_training_as_it_was(prepared: Path):
    trained = model().train()
    evaluate(trained, CONFIG, tokenizer(CONFIG.text), [prepared / "val"])
    assert trained.training
    a = embeddings(prepared / "val").audio
    assert torch.equal(a, embeddings(prepared / "val").audio)


def test_scores_are_named_after_their_folders(prepared: Path, tmp_path: Path):
    scores = evaluate(model(), CONFIG, tokenizer(CONFIG.text), [prepared / "val"])
    write_scores(tmp_path / "eval.json", scores)
    found = json.loads((tmp_path / "eval.json").read_text())["retrieval"]["val"]
    assert found["clips"] == 6
    assert 0 <= found["audio_to_text"]["R@10"] <= 1
    assert found["chance"]["text_to_audio"]["R@5"] == 5 / 6
    assert 0 <= selection_score(scores) <= 1
    assert table(scores).row_count == 2


def test_folders_of_one_name_are_told_apart_by_their_parents():
    folders = [Path("a/val"), Path("b/val"), Path("b/test")]
    assert list(names(folders)) == ["a/val", "b/val", "test"]
    assert list(names([Path("a/val"), Path("a/val")])) == ["val"]


def test_a_clip_that_cannot_be_decoded_is_named_and_nothing_is_left_out(
    prepared: Path, tmp_path: Path
):
    folder = tmp_path / "broken"
    folder.mkdir()
    tar = bytearray((prepared / "val/0.tar").read_bytes())
    at = open_shards([prepared / "val"]).place[3, 1]
    tar[at : at + 16] = bytes(16)
    (folder / "0.tar").write_bytes(tar)
    with pytest.raises(ShardError, match=rf"0\.tar at byte {at}"):
        evaluate(model(), CONFIG, tokenizer(CONFIG.text), [folder])
