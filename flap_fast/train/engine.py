"""Who turns losses into better weights: DeepSpeed over ranks, or plain PyTorch in one process.

    engine.model(...) -> outputs;  engine.backward(total);  engine.step(lr) -> gradient norm

Both have the same interface and, on one process, the same numbers; what one saves, the other goes
on from, over any number of ranks. DeepSpeed's dictionary is built here and nowhere else. The only
file that imports deepspeed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.encoders.blocks import Blocks
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.train.optimizer_state import OptimizerState, Part, whole_parts

# Gradients are reduced while the backward goes on, a bucket of so many numbers at a time, out of
# two buffers of a bucket each. DeepSpeed's own 500 million take 4 GB, and hold all gradients of
# models like ours: nothing would be on its way before the backward has ended.
BUCKET_NUMBERS = 50_000_000


class Engine(Protocol):
    """What the loop asks of an engine."""

    name: str

    @property
    def module(self) -> TwoTowers:
        """The model itself, for evaluation; parameters may be sharded."""
        ...

    @property
    def model(self) -> nn.Module:
        """What the loop calls."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, averaged over ranks and the micro-batches of a step."""
        ...

    def step(self, lr: float) -> Tensor:
        """Update the weights; gives the gradients' norm before any clipping, ()."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The whole model in fp32 on the CPU; every rank must ask, the first one gets it."""
        ...

    @property
    def optimizer_state(self) -> OptimizerState:
        """Adam's state, to be saved and gone on from; the weights come with the model."""
        ...


class PlainEngine:
    """One process, one device, no dependency but torch."""

    name = "plain"

    def __init__(self, config: Config, model: TwoTowers, ranks: Ranks):
        self.module = model.to(ranks.device)
        self.model = self.module
        self._ranks = ranks
        self._clip = config.optim.clip_norm
        self._micro_batches = config.train.micro_batches(ranks.world)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer(config, model, ranks.device)

    def backward(self, loss: Tensor) -> None:
        (loss / self._micro_batches).backward()

    def step(self, lr: float) -> Tensor:
        grads = [p.grad for p in self._trained if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._trained, self._clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    @property
    def optimizer_state(self) -> OptimizerState:
        parts = whole_parts(self._optimizer, self.module)
        return OptimizerState(self._optimizer, parts, self._ranks, sharded=False)


class DeepSpeedEngine:
    """ZeRO 0 to 3 over any number of ranks.

    Two waits for the device in each step are DeepSpeed's own (0.19.8): ZeRO 1 and 2 synchronise at
    the end of an overlapped backward, 1 to 3 read whether the gradient's norm is a number.
    """

    name = "deepspeed"

    def __init__(self, config: Config, model: TwoTowers, ranks: Ranks):
        import deepspeed

        # On a CPU DeepSpeed would compile a shared-memory all-reduce that only inference calls:
        # half a minute, and no start at all where there is no C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed = deepspeed
        self._stage, self._ranks = config.train.zero_stage, ranks
        self._optimizer = optimizer(config, model, ranks.device)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=self._optimizer,
            config=deepspeed_config(config, ranks),
            dist_init_required=False,
        )
        self.model: nn.Module = self._engine
        self.module = model

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # updates nothing: it counts the micro-batch

    def step(self, lr: float) -> Tensor:
        assert self._engine.optimizer is not None
        for group in self._engine.optimizer.param_groups:  # type: ignore[attr-defined,union-attr]
            group["lr"] = lr
        # Without ZeRO, DeepSpeed keeps no norm.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads) if self._stage == 0 else None
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm)

    def weights(self) -> dict[str, Tensor]:
        whole = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            sharded = self._stage == 3 and isinstance(value, nn.Parameter)
            with self._deepspeed.zero.GatheredParameters([value], enabled=sharded):
                if self._ranks.first:
                    whole[name] = value.detach().cpu().clone()
        return whole

    @property
    def optimizer_state(self) -> OptimizerState:
        names = {id(p): name for name, p in self.module.named_parameters()}
        zero: Any = self._engine.optimizer
        if self._stage == 0:
            parts = whole_parts(self._optimizer, self.module)
        elif self._stage == 3:
            parts = list(_parts_in_3(zero, names))
        else:
            parts = list(_parts_in_1_and_2(zero, names))
        return OptimizerState(self._optimizer, parts, self._ranks, sharded=self._stage > 0)


def _parts_in_1_and_2(zero: Any, names: dict[int, str]) -> Iterator[Part]:
    """Parameters of a group lie one after the other, cut into a flat partition for each rank."""
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for p in group:
            name, place = names[id(p)], p._hp_mapping
            if place is None:
                yield Part(name, p.shape, 0, 0, flat, 0)
            else:
                whole, at = place.lp_fragment_address, place.hp_fragment_address
                yield Part(name, p.shape, whole.start, whole.numel, flat, at.start)


def _parts_in_3(zero: Any, names: dict[int, str]) -> Iterator[Part]:
    """Each parameter is cut into as many stretches as there are ranks, the last ones padded."""
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        for p in group:
            _, at, numel = zero.grad_position[zero.get_param_id(p)]
            start = min(p.ds_numel, dist.get_rank() * numel)
            yield Part(names[id(p)], p.ds_shape, start, min(numel, p.ds_numel - start), flat, at)


def check_engine(config: Config, world: int) -> str:
    """The engine that the config asks for; `auto` takes DeepSpeed under a launcher.

    Raises:
        ConfigError: DeepSpeed without itself or without a launcher, or plain PyTorch over ranks.
    """
    there, launched = importlib.util.find_spec("deepspeed") is not None, "RANK" in os.environ
    kind = config.train.engine
    if kind == "auto":
        kind = "deepspeed" if launched and (there or world > 1) else "plain"
    remedy = "launch with deepspeed or torchrun" if there else "pip install deepspeed"
    rule = "be 'plain' without DeepSpeed and a launcher"
    require(kind == "plain" or (there and launched), "train.engine", rule, kind, remedy)
    rule = f"be 'auto' or 'deepspeed' on {world} ranks"
    require(kind == "deepspeed" or world == 1, "train.engine", rule, kind)
    offload = config.train.offload
    rule = "be 'none' in plain PyTorch"
    require(kind == "deepspeed" or offload == "none", "train.offload", rule, offload, remedy)
    return kind


def make_engine(config: Config, model: TwoTowers, ranks: Ranks) -> Engine:
    """The engine in force, with the model in it."""
    kind = check_engine(config, ranks.world)
    share_norms(model, ranks)
    if config.train.compile:
        for blocks in (module for module in model.modules() if isinstance(module, Blocks)):
            blocks.compile_training()
    return (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(config, model, ranks)


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Make BatchNorms take the statistics of all ranks, on GPUs; on CPUs PyTorch cannot."""
    if ranks.world > 1 and ranks.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def deepspeed_config(config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's dictionary, built from ours alone."""
    on_gpu = ranks.device.type == "cuda"
    # Each offload setting takes in those before it.
    offload = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}
    on_cpu = {"device": "cpu", "pin_memory": on_gpu}
    micro_batches = config.train.micro_batches(ranks.world)
    return {
        "train_micro_batch_size_per_gpu": config.train.global_batch // ranks.world // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.train.global_batch,
        # Written out even when off: DeepSpeed's own default clips at 1.0.
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            **{f"offload_{what}": on_cpu for what in offload[config.train.offload]},
            "reduce_bucket_size": BUCKET_NUMBERS,
        },
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for the CPU wants a C++ compiler at the first start; PyTorch's fused
        # one is compiled already.
        "zero_force_ds_cpu_optimizer": False,
        # We log throughput ourselves.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW; weight decay on matrices only, not on tokens or tables of biases."""
    settings = config.optim
    decayed, others = parameter_groups(model)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type == "cuda" or config.train.offload != "none",
    )


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: matrices, and all that weight decay leaves alone."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = ("_token", "_bias_table", "positional_embedding")
    matrices = {name for name, p in trained if p.ndim >= 2 and not name.endswith(kept)}
    return (
        [p for name, p in trained if name in matrices],
        [p for name, p in trained if name not in matrices],
    )
