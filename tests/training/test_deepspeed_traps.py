"""DeepSpeed's traps: how this project avoids each, and that it is still there.

All of it is looked at in one pair of ranks, `on_two`; a test that fails because its trap has gone
says where our way around it could go too.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from flap_fast.config import Config
from flap_fast.data.shards import Shards
from flap_fast.losses import total_loss
from flap_fast.model.model_folder import put_weights
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training import engine as engine_file
from flap_fast.training.checkpoint import Checkpoints
from flap_fast.training.engine import (
    Engine,
    PlainEngine,
    deepspeed_config,
    make_engine,
)
from flap_fast.training.optimizers import optimizer
from tests.ranks import on_ranks
from tests.tiny import tiny

LR = 0.01
STEPS = 4
STAGES = (0, 1, 2, 3)
EMBEDDINGS = "text.inner.embeddings.word_embeddings.weight"
UNUSED = slice(200, None)
NO_DATA = Shards((), np.empty((0, 5), np.int64))


def settings(*overrides: str) -> Config:
    """A scale that starts just below its limit, and decay that Adam alone may not have."""
    small = ("audio.depth=1", "text.depth=1", "joint.temperature=0.0101", "optim.eps=0.00001")
    return tiny("run.folder=nowhere", *small, *overrides)


def ranks_now() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), launched=True)


def outputs_of(engine: Engine, ranks: Ranks, step: int) -> Any:
    """The model's outputs for a rank's slice of 8 random pairs."""
    torch.manual_seed(step)
    mel, ids = torch.randn(8, 1, 112, 128), torch.randint(5, 200, (8, 16))
    rows = slice(8 // ranks.world * ranks.rank, 8 // ranks.world * (ranks.rank + 1))
    return engine.model(mel[rows], ids[rows], torch.ones_like(ids[rows]))


def trained(config: Config, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Some steps of a loss that always wants a larger scale, and what they leave."""
    torch.manual_seed(0)
    engine = make_engine(config, TwoTowers(config), ranks)
    scales, norms = [], []
    for step in range(STEPS):
        outputs = outputs_of(engine, ranks, step)
        engine.backward(total_loss(outputs, config)["total"] - outputs["scale"])
        norms.append(engine.step(LR).item())
        scales.append(outputs["scale"].item())
        if step == 0:
            engine.optimizer_state.save(folder / "first.safetensors")
            ranks.barrier()
    first = load_file(folder / "first.safetensors")
    moments = [value for name, value in first.items() if name.endswith("/exp_avg")]
    return {
        "weights": engine.weights(),
        "scales": scales,
        "norms": norms,
        # Adam's first moment is a tenth of the first gradient, as the optimizer saw it.
        "norm_seen": 10 * nn.utils.get_total_norm(moments).item(),
    }


def in_bf16(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Which types a bf16 run has, and the exact loss of its embeddings."""
    torch.manual_seed(0)
    engine = make_engine(config, TwoTowers(config), ranks)
    outputs = outputs_of(engine, ranks, 0)
    loss = total_loss(outputs, config)["total"]
    engine.backward(loss)
    engine.step(LR)
    audio, text = (ranks.gather(outputs[name].detach()).double() for name in ("media", "text"))
    logits = outputs["scale"].detach().double() * audio @ text.T
    target = torch.arange(8)
    exact = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    return {
        "outputs": {value.dtype for value in outputs.values()} | {loss.dtype},
        "parameters": {p.dtype for p in engine.module.parameters()},
        "rounded": bool((outputs["media"] != _in_fp32(engine, ranks)).any()),
        "loss": dist_mean(loss.detach()),
        "exact": exact.item() / 2,
    }


def _in_fp32(engine: Engine, ranks: Ranks) -> Tensor:
    engine.module.precision = "fp32"
    return outputs_of(engine, ranks, 0)["media"]


def dist_mean(value: Tensor) -> float:
    total = value.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class Theirs(nn.Module):
    """A model that steps into traps: a BatchNorm, and a scale that its caller may clamp."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).square().mean()


def started(stage: int, *, model: nn.Module | None = None, adam: bool = True, **config: Any) -> Any:
    """A DeepSpeed engine as its own documentation has it."""
    import deepspeed

    # As engine.py does it, or a minute of compilation comes first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = model or Theirs(torch.zeros(1))
    client = torch.optim.Adam(model.parameters(), lr=0.1) if adam else None
    zero = {"stage": stage, "overlap_comm": False}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, **config}
    return deepspeed.initialize(
        model=model, optimizer=client, config=config, dist_init_required=False
    )[0]


def complaint(attempt: Callable[[], Any]) -> str | None:
    """What an attempt raises."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def traps(folder: Path) -> dict[str, Any]:
    """What DeepSpeed does when it is used without care."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(dist.get_rank()))

    def outside_forward() -> None:
        engine = started(3)
        engine.backward(engine(x) * engine.module.scale.exp().sum())

    def batch_norm_in_bf16() -> None:
        started(1, bf16={"enabled": True})(x.bfloat16())

    def optimizer_state() -> tuple[str | None, list[str | None]]:
        from deepspeed.utils import safe_set_full_optimizer_state as load

        engine = started(3)
        weight, scale = engine.module.linear.weight, engine.module.scale
        before = complaint(lambda: load(weight, torch.ones(4, 4), "exp_avg"))
        engine.backward(engine(x))
        engine.step()
        uneven: list[str | None] = [None] * dist.get_world_size()
        mine = complaint(lambda: load(scale, torch.ones(1), "exp_avg"))
        dist.all_gather_object(uneven, mine)
        return before, uneven

    def without_sync() -> None:
        with started(2).no_sync():
            pass

    clamped = started(1, gradient_clipping=0.0)
    seen = []
    for _ in range(4):
        clamped.backward(clamped(x) - clamped.module.scale.sum())
        clamped.step()
        seen.append(clamped.module.scale.item())
        clamped.module.scale.data.clamp_(max=0.05)
    clamped.save_checkpoint(str(folder), tag="two")
    by_name = {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.1, "torch_adam": True}}
    return {
        "clipping": started(1).gradient_clipping(),
        "no dimensions": complaint(lambda: started(1, model=Theirs(torch.zeros(())))),
        "outside forward": complaint(outside_forward),
        "elasticity": complaint(lambda: started(1, elasticity={"enabled": True})),
        "bf16": complaint(batch_norm_in_bf16),
        "Adam": type(started(1, adam=False, optimizer=by_name).optimizer.optimizer).__name__,
        "no_sync": complaint(without_sync),
        "clamped": seen,
        "optimizer state": optimizer_state(),
        "saved": (folder / "two").is_dir(),
        "universal": came_back(clamped.module, folder),
    }


def came_back(saved: Theirs, folder: Path) -> tuple[bool, ...]:
    """Whether weights and BatchNorm's statistics survive DeepSpeed's universal checkpoints."""
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        words = ["", "--input_folder", f"{folder}/two", "--output_folder", f"{folder}/universal"]
        one_worker = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [*words, "--inject_missing_state", *one_worker])
            ds_to_universal.main(ds_to_universal.parse_arguments())
    dist.barrier()
    engine = started(1, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder), tag="universal")
    before, after = saved.state_dict(), engine.module.state_dict()
    return tuple(
        torch.equal(before[name], after[name]) for name in ("linear.weight", "norm.running_mean")
    )


def on_two(folder: Path) -> dict[str, Any]:
    ranks = ranks_now()
    stages = {s: trained(settings(f"train.zero_stage={s}"), ranks, folder) for s in STAGES}
    bf16 = {
        s: in_bf16(settings(f"train.zero_stage={s}", "train.precision=bf16"), ranks) for s in (1, 3)
    }
    return {"ours": stages, "bf16": bf16, "theirs": traps(folder)}


def on_one(folder: Path) -> str | None:
    engine = started(1)
    return complaint(lambda: engine.load_checkpoint(str(folder), tag="two"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traps")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    return on_ranks(2, on_two, folder, timeout_s=250)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(settings(), Ranks(), tmp_path_factory.mktemp("plain"))


def test_1_gradient_clipping_is_written_out_even_when_off(found):
    assert deepspeed_config(settings(), Ranks())["gradient_clipping"] == 0
    assert deepspeed_config(settings("optim.clip_norm=2"), Ranks())["gradient_clipping"] == 2
    for stage in STAGES:
        ours = found["ours"][stage]
        assert ours["norms"][0] > 10  # or clipping at 1 would not be seen
        assert ours["norm_seen"] == pytest.approx(ours["norms"][0], rel=1e-5)
    assert found["theirs"]["clipping"] == 1.0


def test_2_no_parameter_is_without_dimensions(found):
    assert all(p.ndim for p in TwoTowers(settings()).parameters())
    assert found["theirs"]["no dimensions"] is not None


def test_3_the_scale_leaves_the_model_through_forward(found, plain):
    start = math.log(1 / 0.0101)
    for stage in STAGES:
        moved = found["ours"][stage]["weights"]["logit_scale"].item() - start
        assert moved == pytest.approx(plain["weights"]["logit_scale"].item() - start, rel=1e-3)
        assert abs(moved) > LR / 2
    assert found["theirs"]["outside forward"] is not None


def test_4_buffers_come_back(found, tmp_path: Path):
    config = settings(f"run.folder={tmp_path}")
    engine = PlainEngine(config, with_batch_norm(config), Ranks())
    engine.module.get_submodule("norm")(torch.arange(8.0).view(2, 4))
    saved = Checkpoints(config, Ranks(), NO_DATA).save(engine, 1, None)
    again = with_batch_norm(config)
    put_weights(again, saved / "model.safetensors")
    (running_mean,) = (b for name, b in again.named_buffers() if name == "norm.running_mean")
    assert running_mean.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5])
    weights, statistics = found["theirs"]["universal"]
    assert weights  # DeepSpeed's own way to other ranks restores these
    assert not statistics


def with_batch_norm(config: Config) -> TwoTowers:
    model = TwoTowers(config)
    model.add_module("norm", nn.BatchNorm1d(4))
    return model


def test_5_a_checkpoint_knows_no_number_of_ranks(folder: Path, found, tmp_path: Path):
    config = settings(f"run.folder={tmp_path}")
    engine = PlainEngine(config, TwoTowers(config), Ranks())
    saved = Checkpoints(config, Ranks(), NO_DATA).save(engine, 1, None)
    names = {file.name for file in saved.iterdir()}
    assert names == {
        *("config.yaml", "text", "model.safetensors", "optimizer.safetensors", "state.json"),
        "SHA256SUMS",
    }
    assert json.loads((saved / "state.json").read_text()).keys() == {
        *("step", "best", "since_best", "best_task", "scored"),
        *("clips", "shards", "versions", "teacher", "sha256"),
    }
    assert found["theirs"]["saved"]
    (refused,) = on_ranks(1, on_one, folder)
    assert refused
    assert "world size" in refused


def test_6_restarting_takes_the_place_of_elasticity(found):
    assert "elasticity" not in deepspeed_config(settings(), Ranks())
    assert "Elastic training has been removed" in found["theirs"]["elasticity"]


@pytest.mark.parametrize("stage", [1, 3])
def test_7_weights_stay_float32_under_bf16_autocast(stage: int, found):
    ours = found["bf16"][stage]
    assert ours["rounded"]  # the towers did run in bf16
    assert ours["parameters"] == {torch.float32}
    config = deepspeed_config(settings("train.precision=bf16"), Ranks())
    assert not {"bf16", "fp16", "amp"} & config.keys()
    assert found["theirs"]["bf16"] is not None


def test_8_adam_has_no_decoupled_decay(found):
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        config = settings(f"optim.name={name}")
        assert type(optimizer(config, TwoTowers(config), torch.device("cpu"))) is kind
    torch.manual_seed(0)
    before = TwoTowers(settings()).get_parameter(EMBEDDINGS)
    for stage in STAGES:
        after = found["ours"][stage]["weights"][EMBEDDINGS]
        assert torch.equal(after[UNUSED], before[UNUSED])  # no gradient, no step
        assert not torch.equal(after[100], before[100])
    assert found["theirs"]["Adam"] == "AdamW"


def test_9_gradients_are_never_kept_back_with_no_sync(found):
    assert "no_sync" not in inspect.getsource(engine_file)
    assert "incompatible" in found["theirs"]["no_sync"]


@pytest.mark.parametrize("stage", [1, 3])
def test_10_embeddings_and_loss_stay_float32_in_bf16_runs(stage: int, found):
    ours = found["bf16"][stage]
    assert ours["outputs"] == {torch.float32}
    assert ours["loss"] == pytest.approx(ours["exact"], rel=1e-6)


def test_11_the_logit_scale_stays_clamped_under_every_stage(found):
    for stage in STAGES:
        ours = found["ours"][stage]
        assert ours["scales"][0] < 100 == pytest.approx(max(ours["scales"]), abs=1e-4)
        # Past the limit the gradient is gone, and what is left of Adam's momentum ebbs away.
        assert ours["weights"]["logit_scale"].item() - math.log(1 / 0.0101) < (STEPS - 1) * LR
    assert found["theirs"]["clamped"] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)


def test_12_optimizer_states_are_loaded_without_deepspeeds_public_functions(found):
    """Those fail before the first step, and where a size is no multiple of the ranks."""
    before, uneven = found["theirs"]["optimizer state"]
    assert before == "KeyError: 'exp_avg'"
    assert uneven[0] is None
    assert "exceeds dimension size" in uneven[1]  # the second rank has none of (1,)
