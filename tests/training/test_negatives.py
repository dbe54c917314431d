"""Negatives in training: over ranks, in micro-batches, on resuming, in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_fast.config import Config
from flap_fast.model.model_folder import model_folder
from flap_fast.ranks import Ranks
from flap_fast.training.engine import DeepSpeedEngine
from flap_fast.training.loop import train
from tests.data.test_negatives import write_negatives
from tests.losses.test_negatives import NAMES
from tests.ranks import on_ranks
from tests.training.stopping import train_stopped_after
from tests.training.test_pairs import rows, small
from tests.training.test_step import assert_same, by_tokens, pair_ids_of, run, settings

ONLY = (
    *("loss.simcse.weight=0", "loss.nli.weight=0", "loss.recon.weight=0"),
    *("loss.cyclic.cross_weight=0", "loss.cyclic.in_weight=0"),
)


def with_negatives(*overrides: str) -> Config:
    """Two in the softmax, masked where they are a caption; one in the sigmoid loss."""
    return settings(
        *("loss.contrastive.negatives=2", "loss.contrastive.duplicates=mask"),
        *("loss.sigmoid.weight=0.5", "loss.sigmoid.negatives=1", "loss.sigmoid.bias=-3"),
        *overrides,
    )


@pytest.fixture(scope="module")
def whole() -> Any:
    """64 clips in one pass of one process."""
    return run(with_negatives(), Ranks(), steps=2)


def test_the_whole_batchs_loss_is_that_of_all_logits(whole):
    config = with_negatives(*ONLY, "loss.sigmoid.weight=0")
    (total, *_), _, outputs = run(config, Ranks(), steps=1)
    assert outputs is not None
    found: dict[str, Any] = {**outputs}
    media, text, *wrong = (found[name].double() for name in NAMES[:4])
    ids = pair_ids_of(config)
    own = torch.eye(len(media)).bool()
    same = (ids[:, None, :2] == ids[None, :, :2]).any(-1) & ~own
    blocks = [(media @ text.T).masked_fill(same, -torch.inf)]
    for column, rows_of in enumerate(wrong, 2):
        equal = ids[:, 1, None] == ids[None, :, column]
        assert equal.any()
        blocks.append((media @ rows_of.T).masked_fill(equal, -torch.inf))
    S = torch.cat(blocks, 1) * found["scale"].double()
    of_captions = S[:, : len(media)].T.log_softmax(1).diagonal().mean()
    expected = -(S.log_softmax(1).diagonal().mean() + of_captions) / 2
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert found["pair_ids"].equal(ids)


@pytest.mark.parametrize("replay", ["keep", "decode"])
def test_micro_batches_keep_negatives_with_their_clips(replay: str, whole):
    config = with_negatives("train.micro_batch=8", f"train.replay={replay}")
    found = run(config, Ranks(), steps=2)
    assert_same(found, whole)
    assert found[2] is not None
    for name, value in whole[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):  # and negatives do make a difference
        assert_same(run(settings("loss.sigmoid.weight=0.5"), Ranks(), steps=1), whole)


def test_micro_batches_of_different_sizes_keep_them_too(whole):
    found = run(with_negatives(), Ranks(), steps=2, deal=by_tokens)
    assert_same(found, whole)


def of_each_stage() -> list[Any]:
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    given = [
        ("train.zero_stage=0", "train.micro_batch=8"),
        ("train.zero_stage=2", "train.micro_batch=8", "loss.contrastive.scheme=sharded"),
        ("train.zero_stage=3", "loss.sigmoid.scheme=sharded"),
    ]
    configs = [with_negatives(*overrides) for overrides in given]
    return [run(config, ranks, DeepSpeedEngine, 2)[:2] for config in configs]


def test_ranks_have_the_columns_of_the_whole_batch_at_every_stage(whole):
    pytest.importorskip("deepspeed")
    for found in on_ranks(2, of_each_stage, timeout_s=280):
        assert len(found) == 3
        for stage in found:
            assert_same(stage, whole)


def test_a_run_with_negatives_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_negatives(tmp_path / "data")
    data = tmp_path / "data" / "out"
    own = ("loss.contrastive.negatives=2", "train.micro_batch=4", "optim.lr=1e-2")
    own += ("loss.sigmoid.weight=0.5", "loss.sigmoid.negatives=3", "loss.sigmoid.duplicates=mask")
    whole = small(data, tmp_path, "whole", *own)
    train(whole)
    logged = rows(whole)
    assert len(logged) == 4

    halted = small(data, tmp_path, "halted", *own)
    train_stopped_after(2, halted)
    train(halted, resume=True)
    assert rows(halted) == logged
    folders = [model_folder(config.run_folder) for config in (whole, halted)]
    one, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == other


def test_a_frozen_text_encoder_embeds_each_negative_once(tmp_path: Path):
    data = write_negatives(tmp_path / "data").parent
    own = ("loss.contrastive.negatives=2", "text.freeze=true")
    config = small(data, tmp_path, "frozen", *own)
    train(config)
    assert all(row["loss"] > 0 for row in rows(config))
