"""What `flap plan` predicts is what ranks here do: counted, not timed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from typer.testing import CliRunner

from flap_fast.__main__ import app
from flap_fast.checks import ConfigError
from flap_fast.configfile import load_config
from flap_fast.loss import total_loss
from flap_fast.model.flap import Flap
from flap_fast.model.masking import kept_patches, mask_plan
from flap_fast.profile.footprint import Parameters, Sizes, footprint, state_bytes
from flap_fast.profile.measure import profile
from flap_fast.profile.plan import Machine, parse_rate, plan
from flap_fast.profile.traffic import (
    CountTraffic,
    Traffic,
    contrastive_traffic,
    engine_traffic,
    sent_bytes,
)
from flap_fast.ranks import Ranks
from flap_fast.train.engine import BUCKET_NUMBERS, DeepSpeedEngine, PlainEngine
from tests.ranks import on_ranks
from tests.tiny import HTSAT, tiny

DIRECTIONS = ("symmetric", "a2t", "t2a")
SCHEMES = ("replicated", "sharded")
PRECISIONS = ("ieee", "bf16")


def embeddings(rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width), dim=1).requires_grad_()


def counted_in_the_loss(clips: int):
    """On one rank: by scheme, direction and precision, what each phase sent and should have."""
    found = []
    for chosen in itertools.product(SCHEMES, DIRECTIONS, PRECISIONS):
        names = (f"loss.contrastive.{n}" for n in ("scheme", "direction", "precision"))
        config = tiny(*map("=".join, zip(names, chosen, strict=True)))
        audio, text = (embeddings(clips, config.joint.width) for _ in range(2))
        outputs = {"audio": audio, "text": text, "scale": torch.tensor(5.0)}
        with CountTraffic() as forward:
            total = total_loss(outputs, config)["total"]  # type: ignore[arg-type]
        with CountTraffic() as backward:
            total.backward()
        counted = {"forward": forward.traffic, "backward": backward.traffic}
        found.append((counted, contrastive_traffic(config, clips, dist.get_world_size())))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_sent_per_step_and_rank_equal_the_formula_for_both_contrastive_schemes(world: int):
    for found in on_ranks(world, counted_in_the_loss, 3):
        assert len(found) == len(SCHEMES) * len(DIRECTIONS) * len(PRECISIONS)
        for counted, expected in found:
            assert counted == expected


def test_sent_bytes_by_hand():
    """Of 4 ranks with 3 clips each, in a space of 16 numbers."""
    config = tiny("loss.contrastive.scheme=replicated")
    forward = contrastive_traffic(config, 3, 4)["forward"]
    # Each rank sends its 3 rows of 32 + 3 numbers of 4 bytes to three others.
    assert sent_bytes(forward, 4) == 3 * (3 * 35 * 4)
    sharded = contrastive_traffic(tiny("loss.contrastive.scheme=sharded"), 3, 4)
    # Text out and its gradients back, 3 x 16 numbers to three others; 25 and 12 numbers summed up.
    assert sent_bytes(sharded["backward"], 4) == 3 * (3 * 16 * 4)
    assert sent_bytes(sharded["forward"], 4) == 3 * (3 * 16 * 4) + 2 * 3 / 4 * (24 + 13) * 4


def counted_in_the_engine():
    """On one rank: by ZeRO stage, what a step that is not the first sent, and the formula."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    found = []
    for stage in (0, 1, 2, 3):
        # Wide enough that stage 3 shards some parameters and keeps the others whole.
        overrides = (f"train.zero_stage={stage}", "text.width=256", "text.heads=4", "text.depth=1")
        config = tiny(*overrides)
        model = Flap(config)
        sizes = Sizes.of(model)
        engine = DeepSpeedEngine(config, model, ranks)
        clips = config.train.global_batch // ranks.world
        mel = torch.randn(clips, 1, config.audio.frames, config.audio.mel_bins)
        ids = torch.randint(3, 50, (clips, 8))
        counted = CountTraffic()
        for _ in range(3):  # stage 3 finds its order in the first, and checks it in the second
            counted = CountTraffic()
            with counted:
                outputs = engine.model(mel, ids, torch.ones_like(ids))
                engine.backward(total_loss(outputs, config)["total"])
                engine.step(1e-4)
        expected: Traffic = Counter()
        for traffic in contrastive_traffic(config, clips, ranks.world).values():
            expected += traffic
        for traffic in engine_traffic(stage, sizes.groups, ranks.world).values():
            expected += traffic
        found.append((counted.traffic, expected))
    return found


def test_bytes_sent_under_deepspeed_equal_the_formula_in_each_zero_stage():
    pytest.importorskip("deepspeed")
    for found in on_ranks(2, counted_in_the_engine):
        assert len(found) == 4
        for counted, expected in found:
            assert counted == expected


CASES = [
    (),
    ("train.precision=bf16",),
    ("train.checkpoint_activations=true",),
    ("train.checkpoint_activations=audio",),
    ("train.checkpoint_activations=text",),
    ("text.dropout=0.1", "mask.kind=none"),
]


@pytest.mark.parametrize("overrides", CASES)
def test_the_predicted_peak_is_what_pytorch_tracks_within_a_tenth(overrides: tuple[str, ...]):
    """Of weights, gradients, moments, activations and temporaries, in a step on a CPU."""
    wide = ("audio.width=64", "audio.depth=6", "text.width=64", "text.depth=6")
    config = tiny(*wide, "train.global_batch=16", *overrides)
    model = Flap(config).train()
    engine = PlainEngine(config, model, Ranks())
    plan = mask_plan(config.mask, config.audio.grid, 0, torch.arange(16))
    mel = torch.randn(16, 1, config.audio.frames, config.audio.mel_bins)
    ids = torch.randint(3, 50, (16, 16))
    attention_mask = torch.ones_like(ids)
    inputs = (mel, ids, attention_mask, plan)

    def step() -> None:
        engine.backward(total_loss(engine.model(*inputs), config)["total"])
        engine.step(1e-4)

    step()  # makes the moments
    tracker = MemTracker()
    given = [mel, ids, attention_mask, *((plan.keep, plan.drop) if plan else ())]
    tracker.track_external(model, engine._optimizer, *given)
    with tracker:
        step()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    predicted = footprint(
        config,
        Sizes.of(model),
        [16] * 16,
        1,
        engine="plain",
        kept=kept_patches(config.mask, config.audio.grid),
        half=config.train.precision == "bf16",
    )
    assert predicted.peak == pytest.approx(peak["Total"], rel=0.1)


def test_states_by_hand():
    """Of 1000 trained and 10 frozen numbers: 4 bytes each, moments twice, ZeRO over 8 ranks."""
    p = Parameters(1000, 10)
    assert state_bytes("plain", 0, p, 1) == {
        "weights": 4040,
        "gradients": 4000,
        "optimizer": 8000,
        "engine": 0,
    }
    sharded = state_bytes("deepspeed", 1, p, 8, overlap=False)
    assert (sharded["weights"], sharded["gradients"]) == (4040, 500)
    assert sharded["optimizer"] == 3 * 500  # a copy of its share of the weights, and two moments
    assert sharded["engine"] == 4 * BUCKET_NUMBERS
    assert state_bytes("deepspeed", 3, p, 8)["weights"] == 4 * (127 + 1010)


BASE = ("audio.size=base", "text.folder=models/nowhere", "train.global_batch=2304")


def test_a_plan_of_the_papers_batch_on_64_gpus():
    """What can be known without a GPU: the model's size, its FLOP, the bytes, and the sum."""
    config = load_config(None, BASE)
    planned = plan(config, Machine(gpus=64, nodes=8, tflops=400, share=1.0))
    assert planned.clips == 36
    # ViT-B with its heads, RoBERTa-base as released (124.6 M), and the scale.
    assert planned.parameters.trained == pytest.approx(211.2e6, rel=1e-3)
    assert planned.scheme == "replicated"
    # SPEC 14's 223.5 G multiply-adds for 8 clips, embedding but the kept patches.
    forward = planned.flop["audio tower"].forward / 36 * 8 / 2 / 1e9
    assert forward == pytest.approx(223.5, rel=0.005)
    gradients = planned.exchanges["gradients, backward"]
    assert gradients.sent_bytes == 2 * 63 / 64 * 4 * planned.parameters.trained
    assert gradients.seconds == pytest.approx(gradients.sent_bytes / 50e9)
    assert 0 < gradients.exposed_s < gradients.seconds
    exposed = sum(e.exposed_s for e in planned.exchanges.values())
    assert planned.step_s == planned.compute_s + planned.optimizer_s + exposed
    assert planned.fits
    assert planned.largest_clips > 36


def test_a_larger_batch_than_fits_is_said_to():
    less = (*BASE, "train.checkpoint_activations=true")
    machine = Machine(gpus=1, memory_gib=4)
    small = plan(load_config(None, [*less, "train.global_batch=64"]), machine)
    assert not small.fits
    assert f"set train.global_batch={small.largest_clips}, " in small.remedy()
    best = load_config(None, [*less, f"train.global_batch={small.largest_clips}"])
    assert plan(best, machine).fits
    more = load_config(None, [*less, f"train.global_batch={small.largest_clips + 1}"])
    assert not plan(more, machine).fits


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(gpus=60, nodes=8), r"--gpus must be a multiple of the 8 nodes, got 60; .* 56"),
        (Machine(gpus=7), r"train\.global_batch must be a multiple of the 7 ranks, .*=2303"),
        (Machine(share=1.5), r"--share must be in \(0, 1\], got 1\.5"),
    ],
)
def test_splits_that_cannot_be_are_refused_with_what_can(machine: Machine, message: str):
    with pytest.raises(ConfigError, match=message):
        plan(load_config(None, BASE), machine)


def test_rates_are_read_in_bytes_and_in_bits():
    assert parse_rate("--link", "50GB/s") == parse_rate("--link", "400Gb/s") == 50e9
    for wrong in ("50", "50GB", "fast", "0GB/s", "1.2.3GB/s"):
        with pytest.raises(ConfigError, match=r"--link must be a rate above 0, as in 50GB/s"):
            parse_rate("--link", wrong)


def test_the_command_prints_a_plan_and_its_assumptions(tmp_path: Path):
    out = tmp_path / "plan.json"
    command = ["plan", "configs/tiny.yaml", "--gpus", "64", "--nodes", "8", "--link", "50GB/s"]
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 on each of 64 GPU(s), 8 node(s)" in result.output
    assert "--link 50GB/s" in result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert json.loads(out.read_text())["clips"] == 1


@pytest.mark.parametrize(
    "override",
    [
        "loss.recon.weight=1",
        "loss.cyclic.cross_weight=0.25",
        "loss.cyclic.in_weight=0.25",
        "loss.simcse.weight=0.1",
        "loss.nli.weight=0.1",
        "train.micro_batch=4",
        "fusion.type=aff_2d",
    ],
)
def test_a_step_that_the_formulas_do_not_cover_is_refused_by_plan_and_profile(override: str):
    config = tiny("text.dropout=0.1", override)
    name = override.partition("=")[0].replace(".", r"\.")
    for predict in (lambda: plan(config, Machine()), lambda: profile(config, synthetic=True)):
        with pytest.raises(ConfigError, match=rf"{name} must be .* do not know it yet"):
            predict()


def test_an_encoder_without_formulas_is_refused_by_plan_and_profile():
    config = tiny(*HTSAT)
    for predict in (lambda: plan(config, Machine()), lambda: profile(config, synthetic=True)):
        with pytest.raises(ConfigError, match=r"audio\.encoder must be vit .*, got 'htsat'"):
            predict()
