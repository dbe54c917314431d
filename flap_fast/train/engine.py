"""Who turns losses into better weights: DeepSpeed over ranks, or plain PyTorch in one process.

    engine.model(...) -> outputs;  engine.backward(total);  engine.step(lr) -> gradient norm

Both have the same interface and, on one process, the same numbers. DeepSpeed's dictionary is built
here and nowhere else. The only file that imports deepspeed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flap_fast.checks import need
from flap_fast.config import Config, Optim
from flap_fast.model.flap import Flap
from flap_fast.ranks import Ranks


class Engine(Protocol):
    """What the loop asks of an engine."""

    name: str

    @property
    def module(self) -> Flap:
        """The model itself, for evaluation; parameters may be sharded."""
        ...

    @property
    def model(self) -> nn.Module:
        """What the loop calls."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, averaged over ranks."""
        ...

    def step(self, lr: float) -> Tensor:
        """Update the weights; gives the gradients' norm before any clipping, ()."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The whole model in fp32 on the CPU; every rank must ask, the first one gets it."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load` needs besides the weights; every rank must ask."""
        ...

    def load(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Go back to what was saved."""
        ...


class PlainEngine:
    """One process, one device, no dependency but torch."""

    name = "plain"

    def __init__(self, config: Config, model: Flap, ranks: Ranks):
        self.module = model.to(ranks.device)
        self.model = self.module
        self._clip = config.optim.clip_norm
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer(config.optim, model, ranks.device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

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

    def save(self, folder: Path) -> None:
        torch.save(self._optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path, weights: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights)
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state)


class DeepSpeedEngine:
    """ZeRO 0 to 3 over any number of ranks."""

    name = "deepspeed"

    def __init__(self, config: Config, model: Flap, ranks: Ranks):
        import deepspeed

        # On a CPU DeepSpeed would compile a shared-memory all-reduce that only inference calls:
        # half a minute, and no start at all where there is no C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed = deepspeed
        self._stage = config.train.zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=optimizer(config.optim, model, ranks.device),
            config=deepspeed_config(config, ranks),
            dist_init_required=False,
        )
        self.model: nn.Module = self._engine
        self.module = model

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> Tensor:
        assert self._engine.optimizer is not None
        for group in self._engine.optimizer.param_groups:  # type: ignore[attr-defined,union-attr]
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm)

    def weights(self) -> dict[str, Tensor]:
        parameters = list(self.module.parameters())
        with self._deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3):
            return {name: v.detach().cpu().clone() for name, v in self.module.state_dict().items()}

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder: Path, weights: dict[str, Tensor]) -> None:
        found, _ = self._engine.load_checkpoint(str(folder), tag="zero")
        if found is None:
            raise OSError(f"DeepSpeed found no checkpoint in {folder}")


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
    need(kind == "plain" or (there and launched), "train.engine", rule, kind, remedy)
    rule = f"be 'auto' or 'deepspeed' on {world} ranks"
    need(kind == "deepspeed" or world == 1, "train.engine", rule, kind)
    return kind


def make_engine(config: Config, model: Flap, ranks: Ranks) -> Engine:
    """The engine in force, with the model in it."""
    kind = check_engine(config, ranks.world)
    share_norms(model, ranks)
    return (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(config, model, ranks)


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Make BatchNorms take the statistics of all ranks, on GPUs; on CPUs PyTorch cannot."""
    if ranks.world > 1 and ranks.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def deepspeed_config(config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's dictionary, built from ours alone."""
    return {
        "train_micro_batch_size_per_gpu": config.train.global_batch // ranks.world,
        "gradient_accumulation_steps": 1,
        "train_batch_size": config.train.global_batch,
        # Written out even when off: DeepSpeed's own default clips at 1.0.
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": ranks.device.type == "cuda",
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
        # We log throughput ourselves.
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def optimizer(settings: Optim, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW; weight decay on matrices only, not on tokens or tables of biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = ("_token", "_bias_table")
    tokens = {id(p) for name, p in model.named_parameters() if name.endswith(kept)}
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tokens]
    others = [p for p in trained if p.ndim < 2 or id(p) in tokens]
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
        fused=device.type == "cuda",
    )
