"""Training engines: DeepSpeed, or plain PyTorch in one process.

    outputs = engine.model(**inputs)
    engine.backward(loss, micro_batches, last=...)     once per micro-batch
    grad_norm = engine.step(lr)                        once per step

Both engines give the same numbers on one process, and either resumes what the other saved, over any
number of ranks. DeepSpeed's configuration is built here from ours. Only this file imports
deepspeed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
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
from flap_fast.training.average import Average, average_of
from flap_fast.training.optimizer_state import Fragment, OptimizerState, whole_fragments
from flap_fast.training.optimizers import optimizer, set_lr
from flap_fast.training.torch_optimizers import elementwise

# Gradients are reduced during the backward, a bucket of so many numbers at a time, from two buffers
# of a bucket each. DeepSpeed's default of 500 million takes 4 GB and holds all gradients of models
# like ours: nothing would be sent before the backward has ended.
BUCKET_NUMBERS = 50_000_000


class Engine(Protocol):
    """A model, its optimizer, and how gradients and states are spread over ranks.

    All methods are collective: call them on every rank, in the same order.
    """

    name: str
    """"plain" or "deepspeed"."""

    @property
    def module(self) -> TwoTowers:
        """The model itself, for evaluation and for its names; ZeRO 3 shards its parameters."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model to call in training, wrapped as the engine needs it."""
        ...

    average: Average | None
    """Of the weights, with train.ema_decay."""

    def backward(self, loss: Tensor, micro_batches: int = 1, *, last: bool = True) -> None:
        """Add a micro-batch's gradients to the step's mean over ranks and micro-batches.

        Call it once for each micro-batch, then `step`.

        Args:
            micro_batches: of this step; the same on every rank.
            last: whether this is the last one of them.
        """
        ...

    def step(self, lr: float) -> Tensor:
        """Clip gradients, update weights, clear gradients; returns the norm before clipping, ()."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict in fp32 on the CPU; on ranks other than the first it is empty."""
        ...

    @property
    def optimizer_state(self) -> OptimizerState:
        """Saves and loads the optimizer's state; load it before the first step."""
        ...


class PlainEngine:
    """Plain PyTorch: one process, one device."""

    name = "plain"

    def __init__(self, config: Config, model: TwoTowers, ranks: Ranks):
        self.module = model.to(ranks.device)
        self.model = self.module
        self._ranks = ranks
        self._clip = config.optim.clip_norm
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer(config, model, ranks.device)
        self.average = average_of(config, model, ranks)

    def backward(self, loss: Tensor, micro_batches: int = 1, *, last: bool = True) -> None:
        (loss / micro_batches).backward()

    def step(self, lr: float) -> Tensor:
        grads = [p.grad for p in self._trained if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._trained, self._clip, norm)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    @property
    def optimizer_state(self) -> OptimizerState:
        fragments = whole_fragments(self._optimizer, self.module)
        return OptimizerState(self._optimizer, fragments, self._ranks, sharded=False)


class DeepSpeedEngine:
    """DeepSpeed: ZeRO 0 to 3 over any number of ranks.

    Two waits for the device in each step are DeepSpeed's own (0.19.8): ZeRO 1 and 2 synchronise at
    the end of an overlapped backward; 1 to 3 read whether the gradient norm is finite.
    """

    name = "deepspeed"

    def __init__(self, config: Config, model: TwoTowers, ranks: Ranks):
        import deepspeed

        # On a CPU DeepSpeed would compile a shared-memory all-reduce that only inference calls:
        # half a minute, and no start at all where there is no C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It calls collectives by names that PyTorch 2.14 renamed, and warns of on each rank.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
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
        self.average = average_of(config, model, ranks)

    def backward(self, loss: Tensor, micro_batches: int = 1, *, last: bool = True) -> None:
        # Steps differ in their number of micro-batches; DeepSpeed's own count is the config's.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss / micro_batches, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        assert self._engine.optimizer is not None
        set_lr(self._engine.optimizer, lr)  # type: ignore[arg-type]
        # Without ZeRO, DeepSpeed keeps no norm.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads) if self._stage == 0 else None
        self._engine.step()
        if self.average:
            self.average.update()
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
            fragments = whole_fragments(self._optimizer, self.module)
        elif self._stage == 3:
            fragments = list(_fragments_of_stage_3(zero, names))
        else:
            fragments = list(_fragments_of_stages_1_and_2(zero, names))
        return OptimizerState(self._optimizer, fragments, self._ranks, sharded=self._stage > 0)


# DeepSpeed's structures are read here, because its public functions for optimizer states cannot
# load a checkpoint before the first step (bench/LOG.md; tests/training/test_deepspeed_traps.py).
def _fragments_of_stages_1_and_2(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """A group's parameters lie one after the other, cut into one flat partition per rank."""
    flats = zero.single_partition_of_fp32_groups
    for n, (flat, group) in enumerate(zip(flats, zero.bit16_groups, strict=True)):
        for p in group:
            name, mapping = names[id(p)], p._hp_mapping
            if mapping is None:
                yield Fragment(name, p.shape, 0, 0, n, flat, 0)
            else:
                of_parameter, of_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                start, numel = of_parameter.start, of_parameter.numel
                yield Fragment(name, p.shape, start, numel, n, flat, of_flat.start)


def _fragments_of_stage_3(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """Each parameter is cut into as many fragments as there are ranks; the last ones are padded."""
    flats = zero.fp32_partitioned_groups_flat
    for n, (flat, group) in enumerate(zip(flats, zero.fp16_groups, strict=True)):
        of = zero.sub_group_to_group_id[n]
        for p in group:
            _, offset, padded = zero.grad_position[zero.get_param_id(p)]
            start = min(p.ds_numel, dist.get_rank() * padded)
            numel = min(padded, p.ds_numel - start)
            yield Fragment(names[id(p)], p.ds_shape, start, numel, of, flat, offset)


def check_engine(config: Config, world: int) -> str:
    """The name of the config's engine; `auto` is DeepSpeed under a launcher, else plain.

    Raises:
        ConfigError: DeepSpeed is not installed or was not launched, or plain PyTorch over ranks.
    """
    installed, launched = importlib.util.find_spec("deepspeed") is not None, "RANK" in os.environ
    name = config.train.engine
    if name == "auto":
        name = "deepspeed" if launched and (installed or world > 1) else "plain"
    remedy = "launch with deepspeed or torchrun" if installed else "pip install deepspeed"
    rule = "be 'plain' without DeepSpeed and a launcher"
    require(name == "plain" or (installed and launched), "train.engine", rule, name, remedy)
    rule = f"be 'auto' or 'deepspeed' on {world} ranks"
    require(name == "deepspeed" or world == 1, "train.engine", rule, name)
    offload = config.train.offload
    rule = "be 'none' in plain PyTorch"
    require(name == "deepspeed" or offload == "none", "train.offload", rule, offload, remedy)
    check_divides(config, name)
    return name


def check_divides(config: Config, engine: str) -> None:
    """Raise `ConfigError` if ZeRO is to divide the work of an optimizer where it cannot."""
    stage, name = config.train.zero_stage, config.optim.name
    rule = f"be 0 with optim.name = {name}, whose work ZeRO cannot divide"
    divided = engine == "plain" or stage == 0 or elementwise(name)
    require(divided, "train.zero_stage", rule, stage, "set train.zero_stage=0")


def make_engine(config: Config, model: TwoTowers, ranks: Ranks) -> Engine:
    """The config's engine around a model."""
    name = check_engine(config, ranks.world)
    sync_batch_norms(model, ranks)
    if config.train.compile:
        for blocks in (module for module in model.modules() if isinstance(module, Blocks)):
            blocks.compile_training()
    return (DeepSpeedEngine if name == "deepspeed" else PlainEngine)(config, model, ranks)


def sync_batch_norms(model: nn.Module, ranks: Ranks) -> None:
    """Make BatchNorms normalise over all ranks, on GPUs; PyTorch cannot on CPUs."""
    if ranks.world > 1 and ranks.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def deepspeed_config(config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    on_gpu = ranks.device.type == "cuda"
    # Each setting of train.offload includes those before it.
    offload = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}
    on_cpu = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_batch_size": config.train.global_batch,
        # Micro-batches are counted by `DeepSpeedEngine.backward`.
        "gradient_accumulation_steps": 1,
        # Set even when off: DeepSpeed's default clips at 1.0.
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            **{f"offload_{what}": on_cpu for what in offload[config.train.offload]},
            "reduce_bucket_size": BUCKET_NUMBERS,
        },
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam for the CPU needs a C++ compiler at the first start; PyTorch's fused
        # one does not.
        "zero_force_ds_cpu_optimizer": False,
        # Throughput is logged by `observers`.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
