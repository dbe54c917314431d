"""Clips of their own lengths: equal work for ranks, micro-batches that fit, the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import Batch, PackedMels
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.base import PackedMask
from flap_fast.model.masking import check_micro_tokens, tokens_of_seconds
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import DeepSpeedEngine, PlainEngine
from flap_fast.training.loop import train
from flap_fast.training.setup import clip_tokens
from flap_fast.training.step import Gradients, patch_mask_of
from tests.ranks import on_ranks
from tests.tiny import tiny
from tests.training.stopping import train_stopped_after

STEPS = 4
RECON = ("loss.recon.weight=0.5", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
# A clip of 2 s has 13 columns of 8 patches; masking keeps 10 of 6, and [CLS]: 61 tokens.
VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")


def settings(folder: Path, *overrides: str) -> Config:
    """24 clips of 0.4 to 2 s, in steps of 12."""
    data = (f"data.train={folder}/train", "frontend.backend=torch", "train.global_batch=12")
    return tiny(*data, *VARIABLE, *RECON, f"train.steps={STEPS}", *overrides)


def loader(config: Config, ranks: Ranks) -> TrainingLoader:
    shards = open_shards(config.data.train)
    tokens = clip_tokens(config, shards, ranks if dist.is_initialized() else Ranks())
    return TrainingLoader(config, shards, tokenizer(config.text), ranks, tokens)


def tokens_of(batch: Batch, config: Config) -> int:
    """Tokens that the encoder really gets: kept patches, and [CLS] of each clip."""
    mask = patch_mask_of(batch, config, STEPS, 2)
    assert isinstance(batch.media, PackedMels)
    if mask is None:
        return len(batch.media.mel) // 16 * 8 + len(batch.clips)
    assert isinstance(mask, PackedMask)
    return sum(mask.kept) + len(batch.clips)


def by_sample(batches: list[Batch]) -> dict[int, tuple[int, Tensor]]:
    """Each sample's clip and log-mel."""
    found: dict[int, tuple[int, Tensor]] = {}
    for batch in batches:
        assert isinstance(batch.media, PackedMels)
        mels = batch.media.mel.split(list(batch.media.frames))
        for row, mel in zip(batch.media.order, mels, strict=True):
            index = int(batch.sample_index[row])
            assert index not in found
            found[index] = int(batch.clips[row]), mel
    return found


@pytest.mark.parametrize("micro", ["train.micro_batch=null", "train.micro_tokens=130"])
@pytest.mark.parametrize(("world", "backend"), [(2, "dali_wave"), (4, "torch")])
def test_any_number_of_ranks_sees_the_same_clips_and_gets_equal_work(
    prepared: Path, micro: str, world: int, backend: str
):
    if backend != "torch":
        pytest.importorskip("nvidia.dali")
    whole = by_sample(list(loader(settings(prepared), Ranks()).batches(0, STEPS)))
    config = settings(prepared, micro, f"frontend.backend={backend}")
    ranks = [list(loader(config, Ranks(rank, world)).batches(0, STEPS)) for rank in range(world)]
    found = by_sample([batch for batches in ranks for batch in batches])
    assert found.keys() == whole.keys() == set(range(12 * STEPS))
    for index, (clip, mel) in found.items():
        assert clip == whole[index][0]
        assert (mel - whole[index][1]).abs().max() < 1e-4
    assert len({len(batches) for batches in ranks}) == 1
    load = np.array([[tokens_of(batch, config) for batch in batches] for batches in ranks])
    if config.train.micro_tokens:
        assert load.max() <= 130
    else:
        assert (np.ptp(load, axis=0) <= 0.15 * load.mean(0)).all()


@pytest.mark.parametrize(
    "overrides",
    [(), ("mask.kind=none", "loss.recon.weight=0"), ("mask.kind=1d", "mask.ratio=0.3")],
)
def test_a_steps_tokens_are_known_before_its_clips_are_decoded(prepared: Path, overrides):
    config = settings(prepared, *overrides, "train.micro_tokens=200", "mask.unmasked_tail_epochs=1")
    reader = loader(config, Ranks())
    counted = [0] * STEPS
    for batch in reader.batches(0, STEPS):
        step = int(batch.sample_index[0]) // 12
        counted[step] += tokens_of(batch, config)
        assert tokens_of(batch, config) <= 200
    known = [reader.work(step)["media_tokens"] for step in range(STEPS)]
    assert known == counted
    if config.mask.kind != "none":
        assert min(counted[2:]) > max(counted[:2])  # the last epoch is unmasked


def run(config: Config, ranks: Ranks, engine: type) -> tuple[list[float], dict[str, Tensor]]:
    """The totals of all steps, and the gradients of the first."""
    torch.manual_seed(0)
    running = engine(config, TwoTowers(config), ranks)
    reader = loader(config, ranks)
    gradients = Gradients(config, ranks, running, STEPS, reader.sampler.steps_per_epoch)
    stream = reader.batches(0, STEPS, times=gradients.reads)
    totals, first = [], {}
    for step in range(1, STEPS + 1):
        _, terms = gradients(step, stream)
        totals.append(ranks.mean(terms["total"]).item())
        first = first or {name: gradient_of(p) for name, p in running.module.named_parameters()}
        running.step(1e-3)
    assert next(stream, None) is None
    return totals, first


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    if not dist.is_initialized():
        gradient = parameter.grad
    else:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient.clone()


def assert_same(found: Any, whole: Any) -> None:
    assert found[0] == pytest.approx(whole[0], rel=1e-5)
    assert found[1].keys() == whole[1].keys()
    most = max(gradient.abs().max().item() for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * most, name


MICRO = ("train.micro_batch=null", "train.micro_tokens=130")


@pytest.fixture(scope="module")
def whole(prepared: Path):
    return run(settings(prepared), Ranks(), PlainEngine)


@pytest.mark.parametrize(
    "micro",
    [
        ("train.micro_tokens=130",),
        ("train.micro_tokens=130", "train.replay=keep"),
        ("train.micro_tokens=450",),  # two of the steps in one micro-batch, two in two
        ("train.micro_tokens=400", "train.micro_batch=5"),
        ("train.micro_batch=3",),
    ],
)
def test_micro_batches_of_clips_of_their_own_lengths_give_one_passs_gradients(
    prepared: Path, micro: tuple[str, ...], whole
):
    assert_same(run(settings(prepared, *micro), Ranks(), PlainEngine), whole)


def on_each_rank(folder: Path, stages: tuple[int, ...]):
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    configs = [settings(folder, m, f"train.zero_stage={s}") for m in MICRO for s in stages]
    return [run(config, ranks, DeepSpeedEngine) for config in configs]


@pytest.mark.parametrize(
    ("world", "stages"),
    [(2, (1, 3)), pytest.param(4, (0, 1, 2, 3), marks=pytest.mark.slow)],
)
def test_ranks_with_clips_dealt_by_length_give_one_processs_gradients(
    prepared: Path, world: int, stages: tuple[int, ...], whole
):
    pytest.importorskip("deepspeed")
    for found in on_ranks(world, on_each_rank, prepared, stages, timeout_s=280):
        assert len(found) == 2 * len(stages)
        for stage in found:
            assert_same(stage, whole)


# Whole columns, rounded up: clips of fewer than ten columns drop none.
FEW = ("mask.kind=1d", "mask.unit=frame", "mask.ratio=0.1", "mask.rounding=ceil")


def where_some_drop_nothing(folder: Path):
    """What `run` gives under ZeRO 3, and whether each micro-batch drops a patch."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    config = settings(folder, *FEW, "train.micro_tokens=130", "train.zero_stage=3")
    drops = []
    for batch in loader(config, ranks).batches(0, STEPS):
        mask = patch_mask_of(batch, config, STEPS, 2)
        assert isinstance(mask, PackedMask)
        drops.append(mask.patches.ids_drop.shape[1] > 0)
    return run(config, ranks, DeepSpeedEngine), drops


def test_ranks_stay_in_step_where_only_some_of_them_drop_patches(prepared: Path):
    """ZeRO 3 gathers weights as modules are called: an idle decoder would leave others waiting."""
    pytest.importorskip("deepspeed")
    whole = run(settings(prepared, *FEW), Ranks(), PlainEngine)
    ranks = on_ranks(2, where_some_drop_nothing, prepared, timeout_s=60)
    drops = [drops for _, drops in ranks]
    assert any(one != other for one, other in zip(*drops, strict=True))
    for found, _ in ranks:
        assert_same(found, whole)


def test_a_run_in_micro_batches_by_tokens_resumes_bit_for_bit_and_logs_its_work(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def config(name: str) -> Config:
        written = (f"run.folder={tmp_path}", f"run.name={name}", "log.tensorboard=false")
        return settings(prepared, *written, "log.every_steps=1", "train.micro_tokens=130")

    def rows(name: str) -> list[dict[str, float]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        times = ("clips_per_s", "step_ms", "data_wait", "peak_mib", "eval_s")
        return [{k: v for k, v in json.loads(n).items() if k not in times} for n in lines]

    train(config("whole"))
    train_stopped_after(3, config("halted"))
    train(config("halted"), resume=True)
    assert rows("halted") == rows("whole")
    for row in rows("whole"):
        assert row["micro_batches"] >= row["media_tokens"] / 130 > 1
        assert row["rank_balance"] == 1
    assert len({row["media_tokens"] for row in rows("whole")}) > 1


def test_a_budget_that_cannot_hold_the_longest_clip_is_refused():
    longest = ("audio.length=variable", "audio.max_duration_s=2")
    check_micro_tokens(tiny(*longest, "train.micro_tokens=61"))
    said = "train.micro_tokens must hold a clip of audio.max_duration_s = 2, 61 tokens, got 60; "
    with pytest.raises(ConfigError, match=said + "raise it, or lower audio.max_duration_s"):
        check_micro_tokens(tiny(*longest, "train.micro_tokens=60"))
    unmasked = tiny(*longest, "mask.unmasked_tail_epochs=1", "train.micro_tokens=61")
    with pytest.raises(ConfigError, match=r"= 2, 105 tokens, got 61"):
        check_micro_tokens(unmasked)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("audio.length=fixed",), "train.micro_tokens must be left out where all clips have one"),
        (("train.accumulation=local",), "train.accumulation must be 'exact' with train.micro_tok"),
    ],
)
def test_a_budget_of_tokens_goes_with_variable_lengths_and_exact_gradients(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny("audio.length=variable", "train.micro_tokens=9999", *overrides)


def test_tokens_are_those_of_whole_patches_of_frames_cropped_and_filled(prepared: Path):
    config = tiny("audio.length=variable", "audio.max_duration_s=2", "mask.kind=none")
    # 15 frames at most are filled to 16; 16 and 17; 198 of 2 s and of more.
    seconds = np.array([0.0, 0.1, 0.175, 0.185, 2.0, 30.0])
    assert tokens_of_seconds(config, seconds).whole.tolist() == [9, 9, 9, 17, 105, 105]
    assert clip_seconds(open_shards([prepared / "train"]), Ranks()).max() == 2.0
