"""What `flap plan` predicts is what ranks here do: counted, not timed."""

from __future__ import annotations

import gc
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from typer.testing import CliRunner

from flap_fast.__main__ import app
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.losses import total_loss
from flap_fast.model.masking import patch_mask
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.lengths import LengthMix
from flap_fast.tools.profile.memory import Footprint, footprint, parameters
from flap_fast.tools.profile.plan import Machine, default_gpus, parse_rate, plan
from flap_fast.tools.profile.states import Parameters, States, state_bytes
from flap_fast.tools.profile.synthetic import SyntheticLoader, caption_lengths
from flap_fast.tools.profile.traffic import (
    CountTraffic,
    Traffic,
    engine_traffic,
    sent_bytes,
)
from flap_fast.tools.profile.work import loss_times, rank_work, two_passes
from flap_fast.training.engine import BUCKET_NUMBERS, DeepSpeedEngine, Engine, PlainEngine
from flap_fast.training.frozen import frozen
from flap_fast.training.step import Gradients
from flap_fast.training.teacher import teacher
from tests.ranks import on_ranks
from tests.tiny import HTSAT, YAMNET_NAMED, tiny, tiny_clip
from tests.tools.profile.live import Live, tensors_of
from tests.tools.profile.shipped import shipped

DIRECTIONS = ("symmetric", "a2t", "t2a")
SCHEMES = ("replicated", "sharded")
RECON = ("loss.recon.weight=1", "decoder.width=64", "decoder.depth=4", "decoder.heads=2")
# Of 1 to 7 columns of 8 patches, those of 6 clips in the longest half.
VARIABLE = ("audio.length=variable", "audio.max_duration_s=1")
MIX = LengthMix("a test", np.array([0.05, 0.2, 0.4, 0.5, 0.8, 0.9, 1.0, 2.0]))
CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")


def embeddings(rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width), dim=1).requires_grad_()


LOSSES = [
    *(
        (f"loss.contrastive.scheme={scheme}", f"loss.contrastive.direction={direction}")
        for scheme, direction in itertools.product(SCHEMES, DIRECTIONS)
    ),
    *(
        ("loss.contrastive.weight=0", "loss.cyclic.in_weight=1", f"loss.cyclic.form={form}")
        for form in ("tiled", "gram")
    ),
    *(("loss.contrastive.precision=bf16", f"loss.contrastive.scheme={s}") for s in SCHEMES),
    ("joint.width=2", "loss.cyclic.cross_weight=1"),  # more clips than twice the width: gram
    ("loss.contrastive.scheme=sharded", "loss.cyclic.cross_weight=1", "loss.cyclic.in_weight=1"),
    ("text.dropout=0.1", "loss.simcse.weight=1", "loss.simcse.on=nli", "loss.nli.weight=1"),
    *(("loss.contrastive.negatives=2", f"loss.contrastive.scheme={s}") for s in SCHEMES),
    ("loss.contrastive.negatives=2", "loss.contrastive.duplicates=mask"),
    *(
        ("loss.contrastive.weight=0", "loss.sigmoid.weight=1", f"loss.sigmoid.scheme={s}")
        for s in SCHEMES
    ),
    *(
        (
            "loss.sigmoid.weight=1",
            *(f"loss.{loss}.duplicates={d}" for loss in ("contrastive", "sigmoid")),
        )
        for d in ("mask", "positive")
    ),
]


def loss_traffic(config: Config, clips: int, world: int) -> dict[str, Traffic]:
    """What fake ranks sent."""
    loss = StepCounts(config, half=False, mix=mix_of(config)).loss(clips, world)
    return {"forward": loss.forward, "backward": loss.backward}


def of_a_teacher(folder: Path) -> list[tuple[str, ...]]:
    own = ("loss.distill.weight=1", f"loss.distill.teacher={folder}", "loss.contrastive.weight=0")
    return [(*own, f"loss.distill.scheme={s}") for s in SCHEMES]


def counted_in_the_loss(clips: int, folder: Path):
    """On one rank: by loss, what each phase sent."""
    found = []
    for overrides in [*LOSSES, *of_a_teacher(folder)]:
        config = tiny(*overrides)
        names = ("media", *config.loss.sentences)
        outputs = {name: embeddings(clips, config.joint.width) for name in names}
        outputs |= {f"teacher_{n}": embeddings(clips, 24).detach() for n in ("media", "text")}
        outputs["scale"] = outputs["bias"] = outputs["teacher_scale"] = torch.tensor(5.0)
        columns = 2 + config.loss.negatives
        outputs["pair_ids"] = torch.arange(columns * clips).view(clips, columns)
        with CountTraffic() as forward:
            total = total_loss(outputs, config)["total"]  # type: ignore[arg-type]
        with CountTraffic() as backward:
            total.backward()
        found.append({"forward": forward.traffic, "backward": backward.traffic})
    return found


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_fake_ranks_send_for_the_losses_what_real_ones_do(world: int, teacher_folder: Path):
    cases = [*LOSSES, *of_a_teacher(teacher_folder)]
    expected = [loss_traffic(tiny(*overrides), 3, world) for overrides in cases]
    assert all(sum(traffic["forward"].values()) > 0 for traffic in expected)
    for found in on_ranks(world, counted_in_the_loss, 3, teacher_folder):
        assert found == expected


def test_sent_bytes_by_hand():
    """Of 4 ranks with 3 clips each, in a space of 16 numbers."""
    config = tiny("loss.contrastive.scheme=replicated")
    forward = loss_traffic(config, 3, 4)["forward"]
    # Each rank sends its 3 rows of 32 + 3 numbers of 4 bytes to three others.
    assert sent_bytes(forward, 4) == 3 * (3 * 35 * 4)
    sharded = loss_traffic(tiny("loss.contrastive.scheme=sharded"), 3, 4)
    # Text out and its gradients back, 3 x 16 numbers to three others; 25 and 12 numbers summed up.
    assert sent_bytes(sharded["backward"], 4) == 3 * (3 * 16 * 4)
    assert sent_bytes(sharded["forward"], 4) == 3 * (3 * 16 * 4) + 2 * 3 / 4 * (24 + 13) * 4


WIDE_TEXT = ("text.width=256", "text.heads=4", "text.depth=1")
STAGES = [f"train.zero_stage={stage}" for stage in (0, 1, 2, 3)]
TWO = "train.micro_batch=2"
ENGINES = [
    (STAGES[0], TWO),
    (STAGES[1], TWO),
    (STAGES[2],),
    (STAGES[3],),
    (STAGES[3], TWO),
    (STAGES[1], "train.offload=optimizer"),
    (STAGES[2], TWO, "train.offload=optimizer", "train.accumulation=local", *CYCLIC),
    (STAGES[3], TWO, "train.offload=all"),
    (STAGES[2], "train.micro_tokens=90", *VARIABLE),
]


def counted_in_the_engine():
    """On one rank: what a step that is not the first sent, and the bytes held after it.

    Wide enough that stage 3 shards some parameters and keeps the others whole.
    """
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    found = []
    for overrides in ENGINES:
        config = tiny(*WIDE_TEXT, *overrides)
        with Live() as live:
            model = TwoTowers(config)
            buffers = sum(b.nbytes for b in model.buffers())
            engine = DeepSpeedEngine(config, model, ranks)
            sent = step_often(config, ranks, engine)
        gc.collect()
        found.append((sent, live.now - buffers))
        del engine, model
        gc.collect()
    return found


def mix_of(config: Config) -> LengthMix | None:
    return MIX if config.audio.variable else None


def step_often(config: Config, ranks: Ranks, engine: Engine) -> Traffic:
    gradients = Gradients(config, ranks, engine, 1000, 1000)
    loader = SyntheticLoader(config, engine.module.text, ranks, mix_of(config))
    # Stage 3 finds its order in the first, and checks it in the second.
    steps = 3 if config.train.zero_stage == 3 else 2
    batches = loader.batches(0, steps, times=gradients.reads)
    counted = CountTraffic()
    for step in range(1, 1 + steps):
        counted = CountTraffic()
        with counted:
            gradients(step, batches)
            engine.step(1e-4)
    return counted.traffic


def expected_of_the_engine(config: Config, world: int) -> tuple[Traffic, int]:
    """What a step should send, and what a rank should hold after it."""
    counts = StepCounts(config, half=False, mix=mix_of(config))
    times = loss_times(config, world)
    micro_batches = rank_work(config, world, mix_of(config)).micro_batches
    sent: Traffic = Counter()
    clips = config.train.global_batch // world // times
    for traffic in loss_traffic(config, clips, world).values():
        sent.update({kind: times * n for kind, n in traffic.items()})
    for traffic in engine_traffic(
        config.train.zero_stage,
        counts.groups,
        world,
        micro_batches=micro_batches,
        passes=2 if two_passes(config, micro_batches) else 1,
        offload=config.train.offload != "none",
    ).values():
        sent += traffic
    states = state_bytes(
        "deepspeed",
        config.train.zero_stage,
        parameters(counts),
        world,
        overlap=False,
        offload=config.train.offload,
        micro_batches=micro_batches,
    )
    bucket = 4 * BUCKET_NUMBERS if states.gradients == "stay" else 0
    return sent, between_steps(states, counts) + bucket


def between_steps(states: States, counts: StepCounts) -> int:
    """Of the states, what remains without buckets, without gradients and with nothing gathered."""
    device = states.on_device
    found = device["weights"] + device["optimizer"] + sum(states.on_cpu.values())
    if states.gradients == "stay":
        large = sum(n for group in counts.groups for n in group if n > 100_000)
        return found + device["gradients"] - 4 * large
    return found + (4 * parameters(counts).largest if states.on_cpu else 0)  # a buffer for it


def test_bytes_sent_and_held_under_deepspeed_are_the_formulas_in_each_zero_stage():
    """Sent: equal. Held after a step, by the rank that holds most: to 1 %."""
    pytest.importorskip("deepspeed")
    ranks = on_ranks(2, counted_in_the_engine)
    for overrides, *found in zip(ENGINES, *ranks, strict=True):
        sent, held = expected_of_the_engine(tiny(*WIDE_TEXT, *overrides), 2)
        assert all(counted == sent for counted, _ in found), overrides
        # A parameter that both have a part of may be whole on one of them.
        assert max(live for _, live in found) == pytest.approx(held, rel=0.01), overrides


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
    wide = ("audio.width=64", "audio.depth=4", "text.width=64", "text.depth=4")
    config = tiny(*wide, "train.global_batch=16", *overrides)
    model = TwoTowers(config).train()
    engine = PlainEngine(config, model, Ranks())
    grid = config.encoder.grid
    assert grid is not None
    plan = patch_mask(config.mask, grid, 0, torch.arange(16))
    mel = torch.randn(16, 1, config.audio.frames, config.audio.mel_bins)
    ids = torch.randint(3, 50, (16, 16))
    attention_mask = torch.ones_like(ids)
    inputs = (mel, ids, attention_mask, plan)

    def step() -> None:
        engine.backward(total_loss(engine.model(*inputs), config)["total"])
        engine.step(1e-4)

    step()  # makes the moments
    tracker = MemTracker()
    given = [mel, ids, attention_mask, *((plan.ids_keep, plan.ids_drop) if plan else ())]
    tracker.track_external(model, engine._optimizer, *given)
    with tracker:
        step()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    counts = StepCounts(config, half=config.train.precision == "bf16", on_gpu=False)
    predicted = footprint(config, counts, 16, 16, 1, engine="plain")
    assert predicted.peak == pytest.approx(peak["Total"], rel=0.1)


STEPS = [
    (),
    ("train.micro_batch=8",),
    ("train.micro_batch=8", "train.replay=keep"),
    ("train.micro_batch=4", "train.replay=keep", "train.checkpoint_activations=true", *RECON),
    ("train.micro_batch=8", "train.accumulation=local", *CYCLIC),
    (*RECON,),
    (*RECON, "train.precision=bf16", "train.checkpoint_activations=[audio,text]"),
    ("train.micro_batch=8", *RECON, "specaug.time_frames=0", "specaug.freq_bins=0"),
    ("joint.width=512", *CYCLIC, "loss.cyclic.form=gram", "train.micro_batch=2"),
    ("joint.width=512", *CYCLIC, "loss.cyclic.form=tiled", "train.micro_batch=2"),
    ("text.dropout=0.1", "loss.simcse.weight=1", "train.micro_batch=8"),
    ("loss.nli.weight=1", "loss.simcse.weight=1", "loss.simcse.on=nli", "text.dropout=0.1"),
    ("fusion.type=aff_2d", "fusion.max_duration_s=2"),
    ("loss.contrastive.weight=0", *RECON),
    ("loss.contrastive.weight=0", "loss.sigmoid.weight=1", "train.micro_batch=8"),
    ("loss.sigmoid.weight=1", "loss.sigmoid.duplicates=positive", "joint.width=512"),
    ("loss.contrastive.duplicates=mask", "train.micro_batch=8"),
    ("train.ema_decay=0.9",),
    ("text.freeze=true", "train.micro_batch=8"),
    VARIABLE,
    (*VARIABLE, *RECON),
    (*VARIABLE, "train.micro_batch=8", "train.replay=keep"),
    (*VARIABLE, "train.micro_tokens=200", "mask.kind=none", "train.checkpoint_activations=true"),
]
OTHER_ENCODERS = [
    tiny(*HTSAT, "train.global_batch=32"),
    tiny(*YAMNET_NAMED, "train.global_batch=32", "train.micro_batch=8"),
    tiny(*HTSAT, "train.global_batch=32", "train.micro_batch=8", "train.precision=bf16"),
    tiny_clip("train.global_batch=32"),
    tiny_clip("train.global_batch=32", "train.micro_batch=8", "text.dropout=0.1"),
]


@pytest.mark.parametrize(
    "overrides",
    # The simplest, and of the others each second one at once.
    [
        s if n % 2 else pytest.param(s, marks=pytest.mark.slow) if n else s
        for n, s in enumerate(STEPS)
    ],
)
def test_the_predicted_peak_is_that_of_the_trainers_step_within_a_tenth(overrides: tuple):
    """Of all tensors through both passes, with media kept and decoded again."""
    wide = ("audio.width=64", "audio.depth=4", "text.width=64", "text.depth=4")
    compare_peaks(tiny(*wide, "train.global_batch=32", *overrides))


@pytest.mark.parametrize("config", OTHER_ENCODERS)
def test_the_predicted_peak_of_other_encoders_is_right_within_a_tenth(config: Config):
    compare_peaks(config)


def compare_peaks(config: Config) -> Footprint:
    """Of the trainer's step: what is predicted, if it is right within a tenth."""
    ranks = Ranks()
    engine = PlainEngine(config, TwoTowers(config).train(), ranks)
    loader = SyntheticLoader(config, engine.module.text, ranks, mix_of(config))
    taught = teacher(config, ranks)
    with frozen(config, engine.module, ranks) as kept:
        gradients = Gradients(config, ranks, engine, 1000, 1000, kept, taught)
        batches = loader.batches(0, 2, times=gradients.reads)
        gradients(1, batches)
        engine.step(1e-4)  # makes the moments
        models = (engine.module, taught.model) if taught else (engine.module,)
        with Live(tensors_of(*models, engine._optimizer)) as live:
            gradients(2, batches)
            engine.step(1e-4)
    mix = mix_of(config)
    half = config.train.precision == "bf16"
    counts = StepCounts(config, half=half, on_gpu=False, mix=mix)
    at_once = rank_work(config, 1, mix).at_once
    lengths = caption_lengths(32, config.text.max_tokens)
    packs = config.text.encoder != "clip"
    tokens = sum(lengths) // 32 if packs else max(lengths)
    predicted = footprint(
        config, counts, 32, tokens, 1, engine="plain", on_gpu=False, at_once=at_once
    )
    assert predicted.peak == pytest.approx(live.most, rel=0.1)
    return predicted


def test_states_by_hand():
    """Of 1000 trained and 10 frozen numbers: 4 bytes each, moments twice, ZeRO over 8 ranks."""
    p = Parameters(1000, 10, 100)
    assert state_bytes("plain", 0, p, 1).on_device == {
        "weights": 4040,
        "gradients": 4000,
        "optimizer": 8000,
        "engine": 0,
    }
    sharded = state_bytes("deepspeed", 1, p, 8, overlap=False).on_device
    assert (sharded["weights"], sharded["gradients"]) == (4040, 500)
    assert sharded["optimizer"] == 3 * 500  # a copy of its share of the weights, and two moments
    assert sharded["engine"] == 4 * BUCKET_NUMBERS
    assert state_bytes("deepspeed", 3, p, 8).on_device["weights"] == 4 * (127 + 1010)


def test_stage_one_keeps_all_gradients_between_micro_batches_and_stage_two_its_share():
    p = Parameters(1000)
    for stage, gradients in ((1, 4000), (2, 500), (3, 500)):
        states = state_bytes("deepspeed", stage, p, 8, micro_batches=2)
        assert states.on_device["gradients"] == gradients


def test_offload_moves_states_to_the_cpu_and_loses_none():
    p = Parameters(1000, 10, 100)
    kept, moved = (state_bytes("deepspeed", 2, p, 8, offload=o) for o in ("none", "optimizer"))
    assert moved.on_device["optimizer"] == moved.on_device["gradients"] == 0
    assert moved.on_cpu["optimizer"] == kept.on_device["optimizer"]
    assert moved.on_cpu["gradients"] == kept.on_device["gradients"]
    gathered = state_bytes("deepspeed", 3, p, 8, offload="all")
    assert gathered.on_cpu["weights"] == 4 * 127
    assert gathered.on_device["weights"] == 4 * 1010


def test_gradients_count_from_when_they_stay():
    """Of 100 bytes of states, 40 of them gradients."""
    states = {"weights": 60, "gradients": 40}
    for gradients, before in (("come", 60), ("add up", 60), ("stay", 100)):
        found = States(states, {}, gradients)  # type: ignore[arg-type]
        assert found.without_gradients == before
        assert found.with_gradients == 100


BASE = ("audio.size=base", "text.folder=models/nowhere", "train.global_batch=2304")


def test_a_plan_of_the_papers_batch_on_64_gpus():
    """What can be known without a GPU: the model's size, its FLOP, the bytes, and the sum."""
    config = load_config(None, BASE)
    planned = plan(config, Machine(gpus=64, nodes=8, tflops=400, mfu=1.0))
    assert planned.clips == 36
    # ViT-B with its heads, RoBERTa-base as released (124.6 M), and the scale.
    assert planned.parameters.trained == pytest.approx(211.2e6, rel=1e-3)
    assert planned.scheme == "replicated"
    # FLAP's table: 223.5 G multiply-adds for 8 clips, embedding but the kept patches.
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
    shallow = ("audio.depth=2", "text.folder=null", "text.depth=2")
    less = (*BASE, *shallow, "train.checkpoint_activations=true")
    machine = Machine(gpus=1, memory_gib=1)
    small = plan(load_config(None, [*less, "train.global_batch=64"]), machine)
    assert not small.fits
    assert f"set train.micro_batch={small.largest_micro_batch}, " in small.remedy()
    best = load_config(None, [*less, f"train.global_batch={small.largest_clips}"])
    assert plan(best, machine).fits
    more = load_config(None, [*less, f"train.global_batch={small.largest_clips + 1}"])
    assert not plan(more, machine).fits


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(gpus=60, nodes=8), r"--gpus must be a multiple of the 8 nodes, got 60; .* 56"),
        (Machine(gpus=7), r"train\.global_batch must be a multiple of the 7 ranks, .*=2303"),
        (Machine(nodes=0), r"--nodes must be at least 1, got 0"),
        (Machine(gpus=0), r"--gpus must be at least 1, got 0"),
        (Machine(mfu=1.5), r"--mfu must be in \(0, 1\], got 1\.5"),
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


def test_micro_batches_of_a_step_that_does_not_fit_are_named_and_fit():
    config = load_config(None, [*BASE, "loss.recon.weight=1"])
    planned = plan(config, Machine(gpus=1, memory_gib=32))
    assert not planned.fits
    assert f"set train.micro_batch={planned.largest_micro_batch}, " in planned.remedy()
    parts = [*BASE, "loss.recon.weight=1", f"train.micro_batch={planned.largest_micro_batch}"]
    taken = plan(load_config(None, parts), Machine(gpus=1, memory_gib=32))
    assert taken.fits
    assert taken.step_s > planned.step_s
    assert taken.memory.held["media"] == 4 * 2304 * 1024 * 128


def test_offloaded_adam_takes_the_cpus_time_and_its_memory():
    config = load_config(None, [*BASE, "train.zero_stage=2", "train.offload=optimizer"])
    planned = plan(config, Machine(gpus=8, host_bytes_per_s=28e9, host_link_bytes_per_s=8e9))
    numbers = planned.parameters.trained / 8
    assert planned.optimizer_s == pytest.approx(numbers * 1e-9 + 2 * numbers * 0.5e-9)
    assert planned.memory.on_cpu["optimizer"] == 3 * 4 * -(-planned.parameters.trained // 8)
    assert planned.memory.states["optimizer"] == 0


@pytest.mark.parametrize("file", shipped())
def test_every_shipped_config_is_planned(file: Path):
    config = load_config(file)
    planned = plan(config, Machine(gpus=default_gpus(config)))
    modality = config.encoder.modality
    assert list(planned.flop)[:2] == [f"{modality} tower", "text tower"]
    assert ("decoder" in planned.flop) == bool(config.loss.recon.weight)
    idle = {"text tower"} if config.text.freeze and config.joint.text_head == "none" else set()
    assert {part for part, flop in planned.flop.items() if not flop.forward} == idle
    assert planned.memory.activations[f"{modality} tower"] > 0
    assert planned.fits


def test_both_names_of_the_utilisation_are_read():
    plans = []
    for name in ("--mfu", "--share"):
        result = CliRunner().invoke(app, ["plan", "configs/tiny.yaml", name, "0.25"])
        assert result.exit_code == 0, result.output
        plans.append(result.stdout)
        assert ("--share is now called --mfu" in result.stderr) == (name == "--share")
    assert plans[0] == plans[1]
    assert "--mfu 0.25" in plans[0]
    assert "--share" not in CliRunner().invoke(app, ["plan", "--help"]).output
