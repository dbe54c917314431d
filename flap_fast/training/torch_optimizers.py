"""PyTorch's optimizers by name, and the tensors that each keeps for a parameter.

`muon` is Muon for the matrices of blocks and AdamW for all else, at one learning rate.

Source: Muon, Jordan et al., 2024, scaled to AdamW's steps as in arXiv 2502.16982.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from flap_fast.checks import ConfigError, require
from flap_fast.config.train import Optim

_CLASSES = {
    cls.__name__.lower(): cls
    for cls in vars(torch.optim).values()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
}
# Set by other settings, or by the engine.
_RESERVED = {"params", "lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"}
_RESERVED |= {"foreach", "fused", "capturable", "differentiable", "maximize", "adjust_lr_fn"}
# Sizes of a small parameter's axes, all different and none of them 1.
_SMALL = (2, 3, 4, 5, 6)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon`, AdamW for the others.

    Args:
        groups: of parameters, each with its `weight_decay`.
        options: further arguments of Muon.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = False,
        **options: Any,
    ):
        super().__init__(groups, {"lr": lr})
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in self.param_groups:
            parts[group["muon"]].append(group)
        self._parts: list[torch.optim.Optimizer] = []
        if parts[True]:
            muon = torch.optim.Muon(parts[True], lr, adjust_lr_fn="match_rms_adamw", **options)
            self._parts.append(muon)
        if parts[False]:
            self._parts.append(torch.optim.AdamW(parts[False], lr, betas, eps, fused=fused))
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def torch_optimizer(
    optim: Optim, groups: Sequence[dict[str, Any]], *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer that optim.name names, with the settings that it takes.

    Args:
        groups: with `muon` in each, which `muon` reads.
        fused: use PyTorch's fused implementation where there is one.

    Raises:
        ConfigError: a setting that it does not take, or a value that it refuses.
    """
    named = f"optim.name = {optim.name}"
    require(optim.name in _CLASSES, "optim.name", "be in this PyTorch's torch.optim", optim.name)
    cls = MuonWithAdamW if optim.name == "muon" else _CLASSES[optim.name]
    takes = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
    if isinstance(takes.get("eps"), tuple):  # Adafactor's two: optim.options
        del takes["eps"]
    given: dict[str, Any] = {"lr": optim.lr}
    standard = Optim()
    for name in ("betas", "eps"):
        value, is_set = getattr(optim, name), getattr(optim, name) != getattr(standard, name)
        rule = f"be left out with {named}, which takes none"
        require(name in takes or not is_set, f"optim.{name}", rule, value)
        # Others than Adam's relatives have an eps of their own.
        if name in takes and (is_set or "betas" in takes):
            given[name] = value
    rule = f"be 0 with {named}, which takes none"
    takes_decay = "weight_decay" in takes or optim.name == "muon"
    require(takes_decay or optim.weight_decay == 0, "optim.weight_decay", rule, optim.weight_decay)
    if "decoupled_weight_decay" in takes and optim.name != "adam":
        given["decoupled_weight_decay"] = True
    if "fused" in takes:
        given["fused"] = fused
    arguments = inspect.signature(_CLASSES[optim.name]).parameters
    known = [n for n in arguments if n not in _RESERVED or (n == "eps" and n not in takes)]
    types, options = get_type_hints(_CLASSES[optim.name].__init__), {}
    for name, value in optim.options.items():
        rule = f"name arguments of {_CLASSES[optim.name].__name__}: {', '.join(known)}"
        require(name in known, "optim.options", rule, name)
        options[name] = _typed(f"optim.options.{name}", value, types.get(name, Any))
    with _refused(named):
        return cls([_own(group, takes_decay) for group in groups], **given, **options)


def _typed(name: str, value: Any, takes: Any) -> Any:
    """An option in the type that the optimizer's signature has: YAML's `1e-3` is a text."""
    require(takes is bool or not isinstance(value, bool), name, "not be true or false", value)
    try:
        return TypeAdapter(takes, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"].replace("Input should", "must", 1)
        raise ConfigError(f"{name} {why}, got {value!r}") from None


def check_optimizer(optim: Optim) -> None:
    """Raise `ConfigError` unless the optimizer takes its settings; loads no model."""
    matrix = nn.Parameter(torch.zeros(2, 2))
    group = {"params": [matrix], "weight_decay": optim.weight_decay, "muon": True}
    made = torch_optimizer(optim, [group], fused=False)
    with _refused(f"optim.name = {optim.name}"):
        state_of_small(made, 0, 2, matrix.device)  # some are only looked at in a step


@contextmanager
def _refused(named: str) -> Iterator[None]:
    """Turn PyTorch's own refusal of an argument into a `ConfigError`."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim.options must suit {named}: {error}") from None


def elementwise(name: str) -> bool:
    """Whether an optimizer treats each number by itself, so that ZeRO can divide its work.

    Adagrad does too, but makes its state when it is made: before DeepSpeed divides parameters.
    """
    return name not in ("adafactor", "adagrad", "muon")


def state_of_small(
    optimizer: torch.optim.Optimizer, group: int, axes: int, device: torch.device
) -> tuple[torch.Size, dict[str, Tensor]]:
    """The shape of a small parameter of so many axes, and its state after a step, by name.

    A tensor of its shape has a number for each of the parameter's; one without axes is a count.

    Args:
        group: of the optimizer, whose settings are the small one's.
    """
    small = nn.Parameter(torch.zeros(_SMALL[:axes], device=device))
    small.grad = torch.zeros_like(small)
    cls: Any = type(optimizer)
    probe = cls([{**optimizer.param_groups[group], "params": [small]}], lr=1e-3)
    probe.step()
    return small.shape, dict(probe.state[small])


def shape_for(shape: torch.Size, small: torch.Size, of_small: torch.Size) -> torch.Size:
    """The shape of a state of a parameter of `shape`, from that of a small one's."""
    if not of_small:
        return of_small
    pairs = zip(shape, small, of_small, strict=True)
    return torch.Size(size if is_same == s else 1 for size, s, is_same in pairs)


def kept_numbers(optim: Optim, shape: Sequence[int], *, muon: bool = False) -> int:
    """How many numbers the optimizer keeps for a parameter of a shape, without counts.

    Args:
        muon: whether it is one of Muon's matrices.
    """
    group = {"params": [nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0, "muon": muon}
    made = torch_optimizer(optim, [group], fused=False)
    small, states = state_of_small(made, 0, len(shape), torch.device("cpu"))
    shapes = (shape_for(torch.Size(shape), small, s.shape) for s in states.values())
    return sum(s.numel() for s in shapes if s)


def muon_flop(optim: Optim, shape: Sequence[int]) -> int:
    """FLOP of a matrix' Newton-Schulz steps in Muon: two products m x m x n, one m x m x m."""
    m, n = sorted(shape)
    return int(optim.options.get("ns_steps", 5)) * (4 * m * m * n + 2 * m**3)


def _own(group: dict[str, Any], takes_decay: bool) -> dict[str, Any]:
    return group if takes_decay else {n: v for n, v in group.items() if n != "weight_decay"}
