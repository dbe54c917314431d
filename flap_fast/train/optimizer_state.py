"""Adam's state by parameter, each whole: what makes a checkpoint fit any ranks, stage and engine.

    optimizer.safetensors   NAME/exp_avg  NAME/exp_avg_sq  in NAME's shape,  NAME/step ()

A rank keeps a `Part` of each parameter's state: all of it, or what its ZeRO partition covers. Parts
are put together when a checkpoint is written and cut anew when one is read, so that no conversion
stands between a run and another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flap_fast.checks import ConfigError
from flap_fast.model.model_folder import save_tensors
from flap_fast.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Part(NamedTuple):
    """The stretch of a flattened parameter whose state lies on this rank."""

    name: str
    shape: torch.Size
    """The whole parameter's."""
    start: int
    numel: int
    """0 where other ranks have all of it."""
    key: Tensor
    """What the optimizer keeps state for: the parameter, or a flat partition of many."""
    at: int
    """Where the stretch begins in the flattened key."""


def whole_parts(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Part]:
    """The parts where every rank keeps all of the state."""
    names = {id(p): name for name, p in model.named_parameters()}
    keys = (p for group in optimizer.param_groups for p in group["params"])
    return [Part(names[id(p)], p.shape, 0, p.numel(), p, 0) for p in keys]


class OptimizerState:
    """An Adam's state as files see it.

    Args:
        sharded: every rank keeps another part of it, instead of all.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parts: list[Part], ranks: Ranks, *, sharded: bool
    ):
        self._optimizer, self._parts, self._ranks = optimizer, parts, ranks
        self._sharded = sharded

    def save(self, file: Path) -> None:
        """Write the state of every parameter that ever had a gradient; every rank must ask.

        One parameter at a time goes through the device, and all of them into the first rank's RAM.
        """
        whole: dict[str, Tensor] = {}
        for part in self._parts:
            state = self._optimizer.state.get(part.key)
            if not state:
                continue
            values = self._whole([state[moment] for moment in _MOMENTS], part)
            if self._ranks.first:
                for moment, value in zip(_MOMENTS, values, strict=True):
                    whole[f"{part.name}/{moment}"] = value.cpu().contiguous()
            whole[f"{part.name}/step"] = state["step"].cpu().clone()
        if self._ranks.first:
            save_tensors(file, whole)

    def _whole(self, values: list[Tensor], part: Part) -> Iterable[Tensor]:
        if not self._sharded:
            return values
        whole = torch.zeros(len(values), part.shape.numel(), device=self._ranks.device)
        for row, value in zip(whole, values, strict=True):
            row[part.start : part.start + part.numel] = value[part.at : part.at + part.numel]
        if self._ranks.world > 1:
            dist.reduce(whole, dst=0)
        return (row.view(part.shape) for row in whole)

    def load(self, file: Path) -> None:
        """Go on from what was saved, by whichever ranks.

        Raises:
            ConfigError: the file cannot be read, or is of another model.
        """
        saved = self._read(file)
        on_device = bool(self._optimizer.defaults["fused"])  # a fused Adam counts beside the key
        for part in self._parts:
            step = saved.get(f"{part.name}/step")
            if step is None:
                continue
            state = self._optimizer.state[part.key]
            for moment in _MOMENTS:
                if moment not in state:  # padding stays zero
                    state[moment] = torch.zeros_like(part.key, requires_grad=False)
                stretch = saved[f"{part.name}/{moment}"].flatten()[part.start :][: part.numel]
                state[moment].view(-1)[part.at : part.at + part.numel] = stretch
            state["step"] = step.to(part.key.device if on_device else "cpu", copy=True)

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            saved = load_file(file)  # mapped: what lies in no part of this rank's is not read
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
        shapes = {
            f"{part.name}/{moment}": part.shape for part in self._parts for moment in _MOMENTS
        }
        shapes |= {f"{part.name}/step": torch.Size() for part in self._parts}
        for name, value in saved.items():
            if value.shape != shapes.get(name):
                raise ConfigError(
                    f"{file} must hold the state of this model's parameters, got {name} of shape "
                    f"{tuple(value.shape)}; go on with the code and the config that wrote it"
                )
        return saved
