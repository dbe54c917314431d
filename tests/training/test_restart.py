"""A run goes on over another number of ranks, under another ZeRO stage, in another engine."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.model.model_folder import load_weights, put_weights
from flap_fast.model.two_towers import Outputs, TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training import setup
from flap_fast.training.engine import PlainEngine, make_engine
from flap_fast.training.loop import train_from
from flap_fast.training.run_folder import begin
from tests.ranks import on_ranks
from tests.tiny import tiny

# 1 -> 2 ranks, then 2 -> 1, and 2 -> 4 under another stage: {index of ON_TWO: stage}.
ON_TWO = (
    ("train.zero_stage=0",),
    ("train.zero_stage=1",),
    ("train.zero_stage=2", "train.offload=optimizer"),
    ("train.zero_stage=3",),
    ("train.zero_stage=3", "train.offload=all", "train.checkpoint_activations=true"),
)
ON_FOUR = {1: 2, 2: 3, 3: 1}


class Remembering(TwoTowers):
    """TwoTowers with buffers that training changes: one that the loss sees, one as BatchNorm's."""

    def __init__(self, config: Config, *, weights: bool = True):
        super().__init__(config, weights=weights)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running_mean", torch.zeros(1))
        self.steps_seen: Tensor
        self.running_mean: Tensor
        Remembering.last = self

    last: Remembering

    def forward(self, media, ids, attention_mask, *rest, **named) -> Outputs:
        outputs = super().forward(media, ids, attention_mask, *rest, **named)
        self.steps_seen += 1
        self.running_mean.lerp_(media.mean(), 0.1)
        outputs["scale"] = outputs["scale"] * (1 + 0.05 * self.steps_seen)
        return outputs


def settings(data: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *(f"run.folder={runs}", f"data.train={data}/train", "frontend.backend=torch"),
        *("audio.depth=1", "text.depth=1"),
        *("train.steps=6", "optim.lr=0.001", "sched.warmup_steps=2", "optim.clip_norm=1"),
        # A larger eps, or Adam makes a step of what is only rounding (a key bias has no gradient).
        *("optim.name=adamw", "optim.weight_decay=0.1", "optim.eps=0.00001"),
        # Groups of the optimizer beside the two of before, and weights that are in none.
        *("optim.layer_decay=0.8", "optim.media_lr_factor=0.5", "text.freeze_blocks=1"),
        *("train.ema_decay=0.5", "audio.lora_rank=2"),
        *("log.every_steps=1", "log.tensorboard=false", "ckpt.every_steps=2", "ckpt.keep_last=9"),
        *overrides,
    )


def run(config: Config, ranks: Ranks) -> None:
    """The loop itself, to its end, from the last checkpoint that there is."""
    setup.TwoTowers = Remembering
    try:
        with ExitStack() as open_files:
            train_from(config, ranks, begin(config, resume=True), open_files)
    finally:
        setup.TwoTowers = TwoTowers


def go_on(data: Path, source: Path, step: int, runs: Path, *overrides: str) -> Path:
    """Copy a run as it was after `step` and bring it to its end; gives the new run."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ranks = Ranks(rank, world, world, launched=dist.is_initialized())
    if ranks.first:
        shutil.copytree(source, runs / "flap", symlinks=True)
        for later in range(step + 2, 8, 2):
            shutil.rmtree(runs / f"flap/checkpoints/step-{later:06d}")
    ranks.barrier()
    run(settings(data, runs, *overrides), ranks)
    return runs / "flap"


def on_two(data: Path, alone: Path, out: Path) -> list[float]:
    """Each of `ON_TWO` from one process's step 2; then from its own step 4."""
    means = []
    for number, overrides in enumerate(ON_TWO):
        ours = go_on(data, alone, 2, out / f"two-{number}", *overrides)
        means.append(Remembering.last.running_mean.item())
        go_on(data, ours, 4, out / f"again-{number}", *overrides)
    return means


def on_four(data: Path, out: Path) -> None:
    for number, stage in ON_FOUR.items():
        source = out / f"two-{number}/flap"
        go_on(data, source, 4, out / f"four-{number}", f"train.zero_stage={stage}")
        reopened(settings(data, out, f"train.zero_stage={stage}"), source, out / f"bits-{number}")


def reopened(config: Config, source: Path, out: Path) -> None:
    """Open the last checkpoint of a run and write its state again, without a step."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), launched=True)
    model = Remembering(config)
    put_weights(model, source / "checkpoints/step-000006/trained.safetensors")
    engine = make_engine(config, model, ranks)
    engine.optimizer_state.load(source / "checkpoints/step-000006/optimizer.safetensors")
    out.mkdir(exist_ok=True)
    engine.optimizer_state.save(out / "optimizer.safetensors")
    if (weights := engine.weights()) and ranks.first:
        torch.save(weights, out / "weights.pt")


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never stopped: what every other run is held against."""
    runs = tmp_path_factory.mktemp("alone")
    run(settings(prepared, runs), Ranks())
    return runs / "flap"


@pytest.fixture(scope="module")
def runs(prepared: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the runs on two and four ranks, each in a folder of its own."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("ranks")
    means = on_ranks(2, on_two, prepared, alone, out, timeout_s=250)
    (out / "means.json").write_text(json.dumps(means))
    on_ranks(4, on_four, prepared, out, timeout_s=250)
    return out


def last(run: Path) -> Path:
    return run / "checkpoints/step-000006"


def rows(run: Path) -> list[dict[str, float]]:
    found = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    return found


def assert_goes_on_as(alone: Path, run: Path, after: int) -> None:
    """The losses that followed, and what the last checkpoint holds."""
    expected, found = rows(alone), rows(run)
    for step in range(after, 6):
        # Some units in the last place of a float32.
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=5e-7)
        assert found[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-5)
    weights = load_weights(last(run))
    assert weights["steps_seen"] == 6
    state = load_file(last(run) / "optimizer.safetensors")
    assert {v.item() for name, v in state.items() if name.endswith("/step")} == {6}
    for ours, theirs in (
        (weights, load_weights(last(alone))),
        (state, load_file(last(alone) / "optimizer.safetensors")),
    ):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"running_mean"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=name)


def assert_same_bits(run: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (last(run) / file).read_bytes() == (last(other) / file).read_bytes()


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=map("-".join, ON_TWO))
def test_two_ranks_go_on_where_one_process_stopped(number: int, alone: Path, runs: Path):
    assert_goes_on_as(alone, runs / f"two-{number}/flap", 2)


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=map("-".join, ON_TWO))
def test_a_resumed_run_over_ranks_is_the_uninterrupted_one_bit_for_bit(number: int, runs: Path):
    assert_same_bits(runs / f"two-{number}/flap", runs / f"again-{number}/flap")


@pytest.mark.parametrize("number", ON_FOUR)
def test_four_ranks_go_on_where_two_stopped_under_another_stage(
    number: int, alone: Path, runs: Path
):
    assert_goes_on_as(alone, runs / f"four-{number}/flap", 4)


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=map("-".join, ON_TWO))
def test_one_process_goes_on_where_two_ranks_stopped(
    number: int, prepared: Path, alone: Path, runs: Path, tmp_path: Path
):
    assert_goes_on_as(alone, go_on(prepared, runs / f"two-{number}/flap", 4, tmp_path), 4)


@pytest.mark.parametrize("number", ON_FOUR)
def test_what_other_ranks_opened_they_write_with_the_same_bits(number: int, runs: Path):
    source, again = last(runs / f"two-{number}/flap"), runs / f"bits-{number}"
    for before, after in (
        (load_file(source / "trained.safetensors"), torch.load(again / "weights.pt")),
        (load_file(source / "optimizer.safetensors"), load_file(again / "optimizer.safetensors")),
    ):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_leaves_the_first_ranks_buffers_on_every_rank(runs: Path):
    per_rank = json.loads((runs / "means.json").read_text())
    assert per_rank[0] == per_rank[1]
    saved = load_weights(last(runs / "two-0/flap"))["running_mean"].item()
    assert per_rank[0][0] == saved != 0


def test_a_checkpoint_of_another_model_is_refused(alone: Path, prepared: Path, tmp_path: Path):
    other = settings(prepared, tmp_path, "joint.width=24")
    message = r"must hold the weights of this config's model, got \(16,\) for audio_head\.0\.bias"
    with pytest.raises(ConfigError, match=message):
        put_weights(Remembering(other), last(alone) / "trained.safetensors")
    model = Remembering(settings(prepared, tmp_path))
    model.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ConfigError, match=r"got nothing for extra, which is \(1,\) here"):
        put_weights(model, last(alone) / "trained.safetensors")
    state = PlainEngine(other, TwoTowers(other), Ranks()).optimizer_state
    with pytest.raises(ConfigError, match=r"must hold the state of this model's parameters, got"):
        state.load(last(alone) / "optimizer.safetensors")
    with pytest.raises(ConfigError, match=r"nowhere cannot be read"):
        state.load(tmp_path / "nowhere")
