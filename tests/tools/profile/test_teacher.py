"""A teacher in plans and profiles: its products, its bytes, its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from flap_fast.config import Config
from flap_fast.data.batch import PackedMels
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile import measure
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.lengths import LengthMix
from flap_fast.tools.profile.measure import profile
from flap_fast.tools.profile.memory import footprint, held_bytes
from flap_fast.tools.profile.plan import Machine, plan
from flap_fast.tools.profile.search import Attempts
from flap_fast.tools.profile.synthetic import SyntheticLoader
from flap_fast.tools.profile.tables import plan_table, profile_table
from flap_fast.training.teacher import Teacher
from tests.tiny import tiny, tiny_clip
from tests.tools.profile.live import Live, tensors_of
from tests.tools.profile.test_flop import RECON, counter, products_of_a_step
from tests.tools.profile.test_plan import compare_peaks
from tests.training.test_distill import write_teacher

VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")
MIX = LengthMix("a test", np.array([0.05, 0.3, 0.7, 0.7, 1.1, 1.9, 3.0]))
NLI = ("loss.nli.weight=1", "train.micro_batch=2")


def distilled(folder: Path) -> tuple[str, str]:
    return "loss.distill.weight=1", f"loss.distill.teacher={folder}"


def teachers_products(config: Config, mix: LengthMix | None) -> int:
    """What PyTorch counts in the real teacher's forward on a step's batches."""
    ranks, found = Ranks(), Teacher(config, Ranks())
    batches = list(SyntheticLoader(config, TwoTowers(config).text, ranks, mix).batches(0, 1))
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        for batch in batches:
            found(batch)
    return counted.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        (*NLI, *RECON, "text.freeze=true"),
        ("train.accumulation=local", "train.micro_batch=3"),
        (*VARIABLE, "train.micro_tokens=80"),
    ],
)
def test_a_teachers_products_are_as_many_as_pytorch_counts(
    overrides: tuple[str, ...], teacher_folder: Path, tmp_path: Path
):
    """Alone, and in the trainer's step, where it runs once in two passes."""
    folder, mix = teacher_folder, None
    if VARIABLE[0] in overrides:
        folder, mix = write_teacher(tmp_path / "teacher", *VARIABLE), MIX
    config = tiny("train.global_batch=6", *distilled(folder), *overrides)
    lengths, counted = products_of_a_step(config, mix)
    parts = StepCounts(config, half=False, mix=mix).flop(lengths)
    assert list(parts)[-2:] == ["teacher", "loss"]
    assert parts["teacher"].total == parts["teacher"].forward == teachers_products(config, mix)
    assert sum(part.total for part in parts.values()) == counted


OTHERS = [
    tiny("fusion.type=aff_2d", "train.global_batch=6"),
    tiny_clip("train.global_batch=6"),
]


@pytest.mark.parametrize("config", OTHERS)
def test_other_teachers_are_counted_as_they_are(config: Config, tmp_path: Path):
    """Of the student's encoders."""
    model = TwoTowers(config)
    save_model(tmp_path, config, model, model.state_dict())
    distill = config.loss.distill.model_copy(update={"weight": 1.0, "teacher": tmp_path})
    loss = config.loss.model_copy(update={"distill": distill})
    config = config.model_copy(update={"loss": loss})
    lengths, counted = products_of_a_step(config)
    parts = StepCounts(config, half=False).flop(lengths)
    assert parts["teacher"].total == teachers_products(config, None)
    assert sum(part.total for part in parts.values()) == counted


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.micro_batch=8", "train.replay=keep"),
        ("train.micro_batch=8", "train.accumulation=local"),
    ],
)
def test_the_peak_of_a_step_with_a_teacher_is_right_within_a_tenth(
    overrides: tuple[str, ...], teacher_folder: Path
):
    config = tiny("train.global_batch=32", *distilled(teacher_folder), *overrides)
    predicted = compare_peaks(config)
    after = predicted.loss
    assert after["teacher's forward"] > 2 * after["loss"]
    if not overrides:  # it is what is not seen without its forward
        assert after["teacher's forward"] - after["loss"] > 0.1 * predicted.peak


def test_the_peak_of_a_teachers_forward_on_clips_of_their_own_lengths(tmp_path: Path):
    folder = write_teacher(tmp_path / "teacher", *VARIABLE)
    config = tiny("train.global_batch=24", *VARIABLE, *distilled(folder))
    found, ranks = Teacher(config, Ranks()), Ranks()
    batch = next(SyntheticLoader(config, TwoTowers(config).text, ranks, MIX).batches(0, 1))
    assert isinstance(batch.media, PackedMels)
    before = [*tensors_of(found.model), batch.media.mel, batch.ids]
    with Live(before) as live:
        begun = live.now
        found(batch)
    tokens = int(batch.attention_mask.sum()) // 24
    counts = StepCounts(config, half=False, on_gpu=False, mix=MIX).teacher
    assert counts is not None
    assert counts.peak_bytes(24, tokens) == pytest.approx(live.most - begun, rel=0.1)


def test_every_rank_holds_the_whole_teacher_at_every_stage(teacher_folder: Path):
    given: tuple[tuple[str, ...], ...] = (distilled(teacher_folder), ())
    both = [(settings, StepCounts(tiny(*settings), half=False)) for settings in given]
    model = Teacher(tiny(*given[0]), Ranks()).model
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    for stage in ("0", "1", "2", "3", "3 train.offload=all"):
        more = f"train.zero_stage={stage}".split()
        taught, without = (
            footprint(tiny(*settings, *more), counts, 2, 16, 4, engine="deepspeed")
            for settings, counts in both
        )
        assert taught.states == without.states | {"teacher": size}
        assert taught.on_cpu == without.on_cpu
        assert taught.peak > without.peak + size


def test_a_plan_has_the_teachers_weights_its_forward_and_its_products(teacher_folder: Path):
    planned = plan(tiny(*distilled(teacher_folder)), Machine(gpus=4))
    console = Console(width=80, record=True)
    console.print(plan_table(planned))
    lines = [line for line in console.export_text().splitlines() if "teacher" in line]
    assert len(lines) == 3
    compute_s = sum(f.total for f in planned.flop.values()) / (790e12 * 0.5)
    assert planned.compute_s == pytest.approx(compute_s)


def test_embeddings_of_a_teacher_are_held_without_gradients():
    more = held_bytes(tiny(), 6, 0, on_gpu=False, teacher_width=24)["embeddings"]
    assert more - held_bytes(tiny(), 6, 0, on_gpu=False)["embeddings"] == 6 * 2 * 24 * 2 * 4


def test_a_trial_of_a_micro_batch_holds_what_a_step_with_a_teacher_holds(teacher_folder: Path):
    small = ("train.global_batch=32", "train.replay=keep", *distilled(teacher_folder))
    attempt = Attempts(tiny(*small), torch.device("cpu"))
    attempt(1)
    with Live() as trial:
        attempt._take(4)
    with Live() as step:
        attempt._step(tiny(*small, "train.micro_batch=4"))
    assert trial.most == pytest.approx(step.most, rel=0.05)


def test_a_profile_times_the_teacher_apart_from_the_loss(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Teacher.__call__

    def late(self: Teacher, batch: Any):
        time.sleep(0.05)
        return real(self, batch)

    monkeypatch.setattr(Teacher, "__call__", late)
    monkeypatch.setattr(measure, "measure_ceiling", lambda *_, **__: 1e12)  # which takes a second
    config = tiny("train.global_batch=4", "train.micro_batch=2", *distilled(teacher_folder))
    found = profile(config, steps=1, synthetic=True, search=False, out=tmp_path)
    assert found is not None
    parts, flop = found["parts_ms"], found["flop"]
    assert sum(parts.values()) == pytest.approx(found["step_ms"])
    assert parts["teacher"] >= 100
    assert flop["teacher"]["forward"] == flop["teacher"]["total"] > 0
    total = sum(part["total"] for part in flop.values())
    assert found["flop_per_s"] == pytest.approx(total / found["step_ms"] * 1000)
    console = Console(width=100, record=True)
    console.print(profile_table(found))
    assert "teacher" in console.export_text()
