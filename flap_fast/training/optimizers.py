"""The optimizer, its groups of parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.train import Optim, Sched
from flap_fast.encoders.block_depths import block_depths
from flap_fast.model.two_towers import TwoTowers
from flap_fast.training.torch_optimizers import torch_optimizer


class Group(NamedTuple):
    """Parameters that are updated alike."""

    parameters: list[nn.Parameter]
    decayed: bool
    """Whether weight decay applies."""
    lr_factor: float
    """Their learning rate, as a factor of the step's."""
    muon: bool = False
    """Whether Muon updates them, with optim.name = muon."""


def optimizer(config: Config, model: TwoTowers, device: torch.device) -> torch.optim.Optimizer:
    """The config's optimizer over the `parameter_groups`.

    Raises:
        ConfigError: it does not take a setting, or has nothing to train.
    """
    settings = config.optim
    groups = [
        {
            "params": group.parameters,
            "weight_decay": settings.weight_decay if group.decayed else 0.0,
            "lr_factor": group.lr_factor,
            "muon": group.muon,
        }
        for group in parameter_groups(model, settings)
    ]
    fused = device.type == "cuda" or config.train.offload != "none"
    return torch_optimizer(settings, groups, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set a step's learning rate, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def parameter_groups(model: TwoTowers, optim: Optim | None = None) -> list[Group]:
    """The trained parameters: matrices, which weight decay applies to, before the others.

    Tokens, positions and tables of biases are of the others. Each of the two is divided by the
    learning rate's factor, and by whether Muon updates it.
    """
    optim = optim or Optim()
    factors = lr_factors(model, optim)
    in_blocks = _names_in_blocks(model) if optim.name == "muon" else frozenset()
    not_decayed = ("_token", "_bias_table", "positional_embedding")
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = p.ndim >= 2 and not name.endswith(not_decayed)
            muon = decayed and p.ndim == 2 and name in in_blocks
            groups.setdefault((decayed, factors.get(name, 1.0), muon), []).append(p)
    # Matrices first; sorting leaves the order of factors as it is.
    by_kind = sorted(groups.items(), key=lambda item: not item[0][0])
    return [Group(parameters, *kind) for kind, parameters in by_kind]


def _names_in_blocks(model: TwoTowers) -> frozenset[str]:
    """Names of the parameters in the blocks of the encoders and of the decoder.

    Raises:
        ConfigError: one of them does not say which names are of a block.
    """
    parts = [model.modality, "text", *(["decoder"] if model.decoder is not None else [])]
    found = set()
    for part in parts:
        depths, blocks = block_depths(model.get_submodule(part))
        rule = f"not be muon with this {part} encoder, whose blocks have unknown names"
        require(blocks > 0, "optim.name", rule, "muon")
        found |= {f"{part}.{name}" for name, depth in depths.items() if 1 <= depth <= blocks}
    return frozenset(found)


def lr_factors(model: TwoTowers, optim: Optim) -> dict[str, float]:
    """The learning rate's factor for each parameter of the encoders, by name; 1 for all others.

    Raises:
        ConfigError: optim.layer_decay with an encoder whose blocks have no known names.

    Source: layer decay as in BEiT, arXiv 2106.08254, and AudioMAE, arXiv 2207.06405.
    """
    factors = {}
    for tower, factor in ((model.modality, optim.media_lr_factor), ("text", optim.text_lr_factor)):
        depths, blocks = block_depths(model.get_submodule(tower))
        rule = f"be 1 with this {tower} encoder, whose blocks have unknown names"
        require(blocks > 0 or optim.layer_decay == 1, "optim.layer_decay", rule, optim.layer_decay)
        for name, depth in depths.items():
            factors[f"{tower}.{name}"] = factor * optim.layer_decay ** (blocks + 1 - depth)
    return factors


def learning_rate(step: int, sched: Sched, *, base: float, steps: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then what sched.name says.

    Source: LAION-CLAP's and CyCLIP's public code (warm-up, cosine); `wsd`: MiniCPM, arXiv
    2404.06395, with a linear decay.
    """
    if step < sched.warmup_steps:
        return base * (step + 1) / sched.warmup_steps
    begin = sched.warmup_steps
    if sched.name == "wsd":
        begin = max(begin, steps - (sched.decay_steps or 0))
    done = max(0.0, (step - begin) / max(1, steps - begin))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": 1 - done,
        "constant": 1.0,
    }[sched.name]
    return base * (left + (1 - left) * sched.final_factor)
