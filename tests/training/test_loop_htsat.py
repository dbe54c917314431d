"""A run with HTSAT: to its end, resumed, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.preprocess.spec_augment import stripes
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.model_folder import load_weights, model_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import load
from flap_fast.training.engine import sync_batch_norms
from flap_fast.training.loop import Stopped, train
from flap_fast.training.optimizers import parameter_groups
from flap_fast.training.step import model_inputs
from flap_fast.training.stop import Stop
from tests.tiny import HTSAT, tiny


def settings(prepared: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *HTSAT,
        *(f"run.folder={runs}", f"data.train={prepared}/train", f"data.val={prepared}/val"),
        *(
            "train.steps=3",
            "log.every_steps=1",
            "ckpt.every_steps=2",
            "log.tensorboard=false",
            "sched.warmup_steps=1",
        ),
        *overrides,
    )


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("htsat")
    assert train(settings(prepared, runs)) is not None
    return runs / "flap"


def test_a_resumed_run_has_the_same_weights_and_statistics(whole, prepared, tmp_path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(Stop, "agreed", lambda self: next(asked))
    with pytest.raises(Stopped):
        train(settings(prepared, tmp_path))
    monkeypatch.undo()
    stopped = load_weights(model_folder(tmp_path / "flap"))
    assert stopped["audio.bn0.num_batches_tracked"] == 2
    train(settings(prepared, tmp_path), resume=True)
    ours, theirs = (load_weights(model_folder(run)) for run in (tmp_path / "flap", whole))
    assert theirs["audio.bn0.num_batches_tracked"] == 3
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_encoder_erases_what_specaug_says(whole, prepared, tmp_path):
    """The same first step but for SpecAug: another loss."""
    off = ("specaug.time_frames=0", "specaug.freq_bins=0", "data.val=[]", "train.steps=1")
    train(settings(prepared, tmp_path, *off))
    with_, without = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for run in (whole, tmp_path / "flap")
    )
    assert abs(with_ - without) > 1e-4


def test_what_was_trained_embeds_sounds(whole):
    model = load(whole, "cpu")
    wave = torch.linspace(-1, 1, 16_000)
    found = model.embed_audio([wave.numpy(), wave.flip(0).numpy()[:5000]])
    assert found.shape == (2, 16)
    assert torch.allclose(found.norm(dim=1), torch.ones(2))
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_specaug_is_left_to_the_encoder(prepared, tmp_path):
    """Decibels as they are, and what is to be erased behind the first norm."""
    config = settings(prepared, tmp_path)
    shards, tokens = open_shards(config.data.train), tokenizer(config.text)
    (batch,) = TrainingLoader(config, shards, tokens, Ranks()).batches(0, 1)
    assert batch.stacked.shape == (8, 1, 101, 16)
    assert -100 <= batch.stacked.min() < -20
    inputs = model_inputs(batch, None, config)
    assert inputs["media"] is batch.stacked
    assert inputs["mask"] is inputs["target"] is inputs["longer"] is None
    erase = inputs["erase"]
    assert erase is not None
    wanted = stripes(config.specaug, config.run.seed, batch.sample_index, (101, 16), whole=True)
    assert torch.equal(erase, wanted)
    assert 0.05 < wanted.float().mean() < 0.5


def test_two_passes_count_a_micro_batch_twice_in_the_running_statistics(prepared, tmp_path):
    """And normalise by it alone: what `step` says of layers that mix clips."""
    train(settings(prepared, tmp_path, "train.micro_batch=4", "train.steps=2", "data.val=[]"))
    weights = load_weights(model_folder(tmp_path / "flap"))
    assert weights["audio.bn0.num_batches_tracked"] == 2 * 2 * 2


def test_norms_are_shared_between_gpus_under_the_same_names():
    """And stay float32 inside fusion, whose layers are asked what they are."""
    cuda = torch.device("cuda")
    for ranks, shared in (
        (Ranks(0, 2, 2), False),
        (Ranks(0, 1, 1, cuda), False),
        (Ranks(0, 2, 2, cuda), True),
    ):
        model = TwoTowers(tiny(*HTSAT, "fusion.type=aff_2d"))
        before = model.state_dict()
        sync_batch_norms(model, ranks)
        assert {*model.state_dict()} == {*before}
        kinds = [
            isinstance(m, torch.nn.SyncBatchNorm)
            for m in model.modules()
            if "BatchNorm" in type(m).__name__
        ]
        assert kinds == [shared] * 5


def test_tables_of_position_biases_are_not_decayed():
    config = tiny(*HTSAT, "optim.name=adamw", "optim.weight_decay=0.1")
    model = TwoTowers(config)
    decayed, others = (set(map(id, some.parameters)) for some in parameter_groups(model))
    tables = {id(p) for name, p in model.named_parameters() if name.endswith("_bias_table")}
    assert len(tables) == 4
    assert tables <= others
    weights = {id(p) for name, p in model.named_parameters() if name.endswith("qkv.weight")}
    assert len(weights) == 4
    assert weights <= decayed
