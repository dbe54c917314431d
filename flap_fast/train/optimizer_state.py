"""Adam's state, one whole tensor per parameter, so that a checkpoint fits any ranks and ZeRO stage.

    optimizer.safetensors   NAME/exp_avg  NAME/exp_avg_sq  in NAME's shape,  NAME/step ()

A rank holds a `Fragment` of each parameter's state: all of it, or what its ZeRO partition covers.
Fragments are joined when a checkpoint is written and cut again when one is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_fast.checks import ConfigError
from flap_fast.ranks import Ranks
from flap_fast.tensors import fault, is_finite, load_tensors, save_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """The range of a flattened parameter whose state this rank holds."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    numel: int
    """0 where other ranks hold all of it."""
    key: Tensor
    """The optimizer's key for the state: the parameter, or a flat partition of many."""
    offset: int
    """Where the range begins in the flattened key."""


def whole_fragments(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Fragment]:
    """The fragments where every rank holds the whole state."""
    names = {id(p): name for name, p in model.named_parameters()}
    keys = (p for group in optimizer.param_groups for p in group["params"])
    return [Fragment(names[id(p)], p.shape, 0, p.numel(), p, 0) for p in keys]


class OptimizerState:
    """Saves and loads the state of an Adam optimizer.

    Args:
        sharded: ranks hold different fragments of it, instead of the whole state each.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        fragments: list[Fragment],
        ranks: Ranks,
        *,
        sharded: bool,
    ):
        self._optimizer, self._fragments, self._ranks = optimizer, fragments, ranks
        self._sharded = sharded

    def save(self, file: Path) -> None:
        """Write the state of every parameter that ever had a gradient. Collective.

        One parameter at a time goes through the device, and all of them into the first rank's RAM.
        """
        whole: dict[str, Tensor] = {}
        for fragment in self._fragments:
            state = self._optimizer.state.get(fragment.key)
            if not state:
                continue
            values = self._joined([state[moment] for moment in _MOMENTS], fragment)
            if self._ranks.first:
                for moment, value in zip(_MOMENTS, values, strict=True):
                    whole[f"{fragment.name}/{moment}"] = value.cpu().contiguous()
            whole[f"{fragment.name}/step"] = state["step"].cpu().clone()
        if self._ranks.first:
            save_tensors(file, whole)

    def _joined(self, values: list[Tensor], fragment: Fragment) -> Iterable[Tensor]:
        """A parameter's whole state, on the first rank."""
        if not self._sharded:
            return values
        _, shape, start, numel, _, offset = fragment
        whole = torch.zeros(len(values), shape.numel(), device=self._ranks.device)
        for row, value in zip(whole, values, strict=True):
            row[start : start + numel] = value[offset : offset + numel]
        if self._ranks.world > 1:
            dist.reduce(whole, dst=0)
        return (row.view(shape) for row in whole)

    def load(self, file: Path) -> None:
        """Set the state from a file, which any number of ranks may have written.

        Raises:
            ConfigError: the file cannot be read, is of another model, or holds what Adam never
                does: NaN, infinity, a moment without the other.
        """
        saved = self._read(file)
        on_device = bool(
            self._optimizer.defaults["fused"]
        )  # a fused Adam counts steps on the device
        for name, _, start, numel, key, offset in self._fragments:
            step = saved.get(f"{name}/step")
            if step is None:
                continue
            state = self._optimizer.state[key]
            for moment in _MOMENTS:
                if moment not in state:  # padding stays zero
                    state[moment] = torch.zeros_like(key, requires_grad=False)
                values = saved[f"{name}/{moment}"].flatten()[start : start + numel]
                if not is_finite(values.to(state[moment].dtype)):
                    raise _unusable(file, f"{name}/{moment} with values that are not finite")
                if moment == "exp_avg_sq" and values.numel() and values.min() < 0:
                    raise _unusable(file, f"{name}/{moment} with a value below 0")
                state[moment].view(-1)[offset : offset + numel] = values
            state["step"] = step.to(key.device if on_device else "cpu", copy=True)

    def _read(self, file: Path) -> dict[str, Tensor]:
        saved = load_tensors(file)  # mapped: what no fragment of this rank covers is not read
        if not saved and self._fragments:
            raise _unusable(file, "nothing")
        shapes = {f"{f.name}/{moment}": f.shape for f in self._fragments for moment in _MOMENTS}
        shapes |= {f"{f.name}/step": torch.Size() for f in self._fragments}
        for name, value in saved.items():
            if value.shape != shapes.get(name):
                raise ConfigError(
                    f"{file} must hold the state of this model's parameters, got {name} of shape "
                    f"{tuple(value.shape)}; resume with the code and the config that wrote it"
                )
            if not value.is_floating_point():
                raise _unusable(file, f"{name} as {value.dtype}")
            if name.endswith("/step") and fault(value, value.dtype):
                raise _unusable(file, f"{name} that is not finite")
            if name.endswith("/step") and value < 1:
                raise _unusable(file, f"{name} below 1")
        for name in {name.rpartition("/")[0] for name in saved}:
            absent = [key for key in (*_MOMENTS, "step") if f"{name}/{key}" not in saved]
            if absent:
                raise _unusable(file, f"{name} without {', '.join(absent)}")
        return saved


def _unusable(file: Path, got: str) -> ConfigError:
    return ConfigError(
        f"{file} must hold Adam's state, floats that are finite, got {got}; copy it again, or "
        "remove the checkpoint to resume from the one before"
    )
