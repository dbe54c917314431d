"""An optimizer's state, whole for each parameter, so that a checkpoint fits any ranks and stage.

    optimizer.safetensors   NAME/exp_avg  NAME/exp_avg_sq  in NAME's shape,  NAME/step ()   of Adam

A rank holds a `Fragment` of each parameter's state: all of it, or what its ZeRO partition covers.
Fragments are joined when a checkpoint is written and cut again when one is read. Which tensors an
optimizer keeps is asked of it, with a small parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flap_fast.checks import ConfigError
from flap_fast.ranks import Ranks
from flap_fast.tensors import fault, is_finite, load_tensors, save_tensors
from flap_fast.training.torch_optimizers import shape_for, state_of_small

# Means of squares and the like, in PyTorch's optimizers.
_NEVER_NEGATIVE = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"}
    | {"row_var", "col_var", "variance", "step_size"}
)


class Fragment(NamedTuple):
    """The range of a flattened parameter whose state this rank holds."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    start: int
    numel: int
    """0 where other ranks hold all of it."""
    group: int
    """Of the optimizer's groups."""
    key: Tensor
    """The optimizer's key for the state: the parameter, or a flat partition of many."""
    offset: int
    """Where the range begins in the flattened key."""


def whole_fragments(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Fragment]:
    """The fragments where every rank holds the whole state."""
    names = {id(p): name for name, p in model.named_parameters()}
    keys = ((n, p) for n, group in enumerate(optimizer.param_groups) for p in group["params"])
    return [Fragment(names[id(p)], p.shape, 0, p.numel(), n, p, 0) for n, p in keys]


class _Kept(NamedTuple):
    """A tensor that an optimizer keeps for a parameter."""

    name: str
    shape: torch.Size
    """For the whole parameter; () of a count."""
    like: Tensor
    """A small parameter's."""
    elementwise: bool
    """Whether it has a number for each of the parameter's."""


class OptimizerState:
    """Saves and loads the state of an optimizer.

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
        self._small = lru_cache(maxsize=None)(partial(state_of_small, optimizer))

    def save(self, file: Path) -> None:
        """Write the state of every parameter that ever had a gradient. Collective.

        One parameter at a time goes through the device, and all of them into the first rank's RAM.
        """
        whole: dict[str, Tensor] = {}
        for fragment in self._fragments:
            state = self._optimizer.state.get(fragment.key)
            if not state:
                continue
            kept = self._kept(fragment)
            names = [k.name for k in kept if k.elementwise]
            values = self._joined([state[name] for name in names], fragment)
            if self._ranks.first:
                for name, value in zip(names, values, strict=True):
                    whole[f"{fragment.name}/{name}"] = value.cpu().contiguous()
            for name in (k.name for k in kept if not k.elementwise):
                whole[f"{fragment.name}/{name}"] = state[name].cpu().clone()
        if self._ranks.first:
            save_tensors(file, whole)

    def _joined(self, values: list[Tensor], fragment: Fragment) -> Iterable[Tensor]:
        """A parameter's whole state, on the first rank."""
        if not self._sharded:
            return values
        _, shape, start, numel, _, _, offset = fragment
        whole = torch.zeros(len(values), shape.numel(), device=self._ranks.device)
        for row, value in zip(whole, values, strict=True):
            row[start : start + numel] = value[offset : offset + numel]
        if self._ranks.world > 1:
            dist.reduce(whole, dst=0)
        return (row.view(shape) for row in whole)

    def load(self, file: Path) -> None:
        """Set the state from a file, which any number of ranks may have written.

        Raises:
            ConfigError: the file cannot be read, is of another model, or holds what this optimizer
                never does: NaN, infinity, a part of a parameter's state without the others.
        """
        saved = self._read(file)
        for fragment in self._fragments:
            name, _, start, numel, _, key, offset = fragment
            for kept in self._kept(fragment):
                value = saved.get(f"{name}/{kept.name}")
                if value is None:
                    continue
                state = self._optimizer.state[key]
                if not kept.elementwise:
                    state[kept.name] = value.to(kept.like.device, copy=True)
                    continue
                if kept.name not in state:  # padding stays zero
                    state[kept.name] = torch.zeros_like(key, requires_grad=False)
                values = value.flatten()[start : start + numel]
                _check(file, f"{name}/{kept.name}", values, state[kept.name].dtype)
                state[kept.name].view(-1)[offset : offset + numel] = values

    def _read(self, file: Path) -> dict[str, Tensor]:
        saved = load_tensors(file)  # mapped: what no fragment of this rank covers is not read
        kept = {fragment.name: self._kept(fragment) for fragment in self._fragments}
        if not saved and any(kept.values()):
            raise _unusable(file, "nothing")
        shapes = {f"{name}/{k.name}": k.shape for name, of in kept.items() for k in of}
        counts = {f"{name}/{k.name}" for name, of in kept.items() for k in of if not k.shape}
        for name, value in saved.items():
            if value.shape != shapes.get(name):
                raise ConfigError(
                    f"{file} must hold the state of this model's parameters, got {name} of shape "
                    f"{tuple(value.shape)}; resume with the code and the config that wrote it"
                )
            if not value.is_floating_point():
                raise _unusable(file, f"{name} as {value.dtype}")
            if name in counts and fault(value, value.dtype):
                raise _unusable(file, f"{name} that is not finite")
            if name.endswith("/step") and value < 1:
                raise _unusable(file, f"{name} below 1")
        for name in {name.rpartition("/")[0] for name in saved}:
            absent = [k.name for k in kept[name] if f"{name}/{k.name}" not in saved]
            if absent:
                raise _unusable(file, f"{name} without {', '.join(absent)}")
        return saved

    def _kept(self, fragment: Fragment) -> list[_Kept]:
        """What the optimizer keeps for a fragment's parameter."""
        small, states = self._small(fragment.group, fragment.key.ndim, fragment.key.device)
        found = []
        for name, like in states.items():
            every = like.shape == small
            shape = fragment.shape if every else shape_for(fragment.shape, small, like.shape)
            found.append(_Kept(name, shape, like, every))
        return found


def _check(file: Path, name: str, values: Tensor, dtype: torch.dtype) -> None:
    if not is_finite(values.to(dtype)):
        raise _unusable(file, f"{name} with values that are not finite")
    never_negative = name.rpartition("/")[2] in _NEVER_NEGATIVE
    if never_negative and values.numel() and values.min() < 0:
        raise _unusable(file, f"{name} with a value below 0")


def _unusable(file: Path, got: str) -> ConfigError:
    return ConfigError(
        f"{file} must hold the optimizer's state, floats that are finite, got {got}; copy it "
        "again, or remove the checkpoint to resume from the one before"
    )
