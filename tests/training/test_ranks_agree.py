"""The same global batch gives the same first-step gradients on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import DeepSpeedEngine
from flap_fast.training.step import model_inputs, patch_mask_of
from tests.ranks import on_ranks
from tests.tiny import tiny

STEPS = 4
REBUILDING = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")


def first_step(folder: Path, ranks: Ranks, *overrides: str, engine: type | None = None):
    """The loss over all ranks, and the gradients of a rank's slice of step 1."""
    config = tiny(f"data.train={folder}", "frontend.backend=torch", *REBUILDING, *overrides)
    loader = TrainingLoader(config, open_shards(config.data.train), tokenizer(config.text), ranks)
    torch.manual_seed(0)
    model = TwoTowers(config)
    batch = next(loader.batches(0, 1))
    mask = patch_mask_of(batch, config, STEPS, loader.sampler.steps_per_epoch)
    running = None if engine is None else engine(config, model, ranks)
    outputs = (running.model if running else model)(**model_inputs(batch, mask, config))
    total = total_loss(outputs, config)["total"]
    if running is None:
        total.backward()
        gradients = {name: checked(p.grad) for name, p in model.named_parameters()}
        return ranks.mean(total).item(), gradients
    running.backward(total)
    from deepspeed.utils import safe_get_full_grad

    gradients = {n: checked(safe_get_full_grad(p)) for n, p in model.named_parameters()}
    return ranks.mean(total).item(), gradients


def checked(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient


def averaged_over_ranks(folder: Path):
    """With each scheme of the contrastive loss."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size())
    found = []
    for scheme in ("replicated", "sharded"):
        loss, gradients = first_step(folder, ranks, f"loss.contrastive.scheme={scheme}")
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= ranks.world
        found.append((loss, gradients))
    return found


def from_deepspeed(folder: Path):
    """With each stage that shards."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    stages = (f"train.zero_stage={stage}" for stage in (1, 2, 3))
    return [first_step(folder, ranks, stage, engine=DeepSpeedEngine) for stage in stages]


def resting_after_a_step(folder: Path):
    """The largest gradient of the decoder when masking ends after one step, at each stage."""
    from deepspeed.utils import safe_get_full_grad

    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    found = []
    for stage in (0, 1, 2, 3):
        config = tiny(f"data.train={folder}", f"train.zero_stage={stage}", *REBUILDING)
        read = TrainingLoader(config, open_shards(config.data.train), tokenizer(config.text), ranks)
        engine = DeepSpeedEngine(config, TwoTowers(config), ranks)
        for batch, masking in zip(read.batches(0, 2), (True, False), strict=True):
            masked = patch_mask_of(batch, config, STEPS, STEPS) if masking else None
            outputs = engine.model(**model_inputs(batch, masked, config))
            engine.backward(total_loss(outputs, config)["total"])
            named = engine.module.named_parameters()
            decoder = [p for name, p in named if name.startswith("decoder.")]
            found.append(max(float(checked(safe_get_full_grad(p)).abs().max()) for p in decoder))
            engine.step(0.1)
    return found


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    for name, expected in one[1].items():
        torch.testing.assert_close(other[1][name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(prepared: Path):
    loss, gradients = first_step(prepared / "train", Ranks())
    assert max(g.abs().max() for g in gradients.values()) > 0.1  # 1e-5 means something
    return loss, gradients


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_one_and_several_ranks_agree(world: int, whole, prepared: Path):
    for found in on_ranks(world, averaged_over_ranks, prepared / "train"):
        for shared in found:
            assert_same(whole, shared)


def test_gradients_under_deepspeed_are_those_of_one_process(whole, prepared: Path):
    pytest.importorskip("deepspeed")
    for found in on_ranks(2, from_deepspeed, prepared / "train"):
        for sharded in found:
            assert_same(whole, sharded)


def test_a_resting_decoder_gets_a_gradient_of_zero_at_every_stage(prepared: Path):
    """Left without one, ZeRO-3 would step it on the gradient of the step before."""
    pytest.importorskip("deepspeed")
    for found in on_ranks(2, resting_after_a_step, prepared / "train"):
        assert all(masked > 1e-3 for masked in found[::2])
        assert found[1::2] == [0, 0, 0, 0]
