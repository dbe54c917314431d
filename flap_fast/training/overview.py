"""What is printed before a run's first step: its folder, device, parameters, data, length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flap_fast.config import Config
from flap_fast.model.two_towers import TwoTowers
from flap_fast.places import shown
from flap_fast.ranks import Ranks
from flap_fast.training.environment import device_name


class Parameters(NamedTuple):
    """Numbers of a part of the model: all of them, and those that are trained."""

    total: int
    trained: int


def parameters_of(model: TwoTowers) -> dict[str, Parameters]:
    """The parameters of both encoders, of the heads (with scale and bias), and of a decoder."""
    found = {name: [0, 0] for name in (model.modality, "text", "heads", "decoder")}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts = found[part if part in found else "heads"]
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    return {part: Parameters(*counts) for part, counts in found.items() if counts[0]}


def parameter_facts(parts: Mapping[str, Parameters]) -> dict[str, Any]:
    """Sums and parts for environment.json."""
    return {
        "parameters": sum(part.total for part in parts.values()),
        "parameters_trained": sum(part.trained for part in parts.values()),
        "parameters_of": {name: part.total for name, part in parts.items()},
    }


class Known(NamedTuple):
    """What a run has found out before its first step."""

    engine: str
    """The engine's name."""
    parts: Mapping[str, Parameters]
    clips: int
    """Of data.train."""
    seconds: np.ndarray | None
    """Of each clip, where their lengths were read."""
    steps: int
    """Of the whole run."""
    per_epoch: int
    """Steps of an epoch."""
    samples: int
    """Of an epoch: other than the clips with weights, and with data.captions = concat."""


def overview(config: Config, ranks: Ranks, run: Known, start: Path | None, first: int) -> str:
    """Lines for people.

    Args:
        start: the checkpoint to go on from.
        first: steps done before.
    """
    train, world, val = config.train, ranks.world, ", ".join(map(shown, config.data.val))
    begins = f"goes on after step {first:,}, from {start}" if start else "a new run"
    nodes = f" on {world // ranks.local_world} nodes" if world > ranks.local_world else ""
    many = f"{world:,} ranks{nodes}, each with " if world > 1 else ""
    engine = f"DeepSpeed, ZeRO {train.zero_stage}" if run.engine == "deepspeed" else "plain PyTorch"
    each = f" ({train.global_batch // world:,} a rank)" if world > 1 else ""
    hours = "" if run.seconds is None else f", {_time(float(run.seconds.sum()))}"
    mixed = "" if run.samples == run.clips else f", {run.samples:,} samples an epoch"
    scored = f"scored on {val}" if val else "data.val is not set, nothing is scored"
    epochs = f"{run.steps / run.per_epoch:,.3g} epochs of {run.per_epoch:,} steps"
    warm = config.sched.warmup_steps
    batch = f"global batch {train.global_batch:,}{each}"
    if warm >= run.steps > 0:
        batch += f", all of them warm-up (sched.warmup_steps = {warm:,})"
    lines = {
        "run": f"{config.run_folder}: {begins}",
        "device": f"{many}{device_name(ranks.device)}; {engine}",
        "parameters": _parameters(run.parts),
        "data": f"{run.clips:,} clips to train on{hours}{mixed}; {scored}",
        "length": f"{run.steps:,} steps, {epochs}, {batch}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def _parameters(parts: Mapping[str, Parameters]) -> str:
    total, trained = (sum(part[n] for part in parts.values()) for n in (0, 1))
    each = ", ".join(f"{name} {short(part.total)}{_frozen(part)}" for name, part in parts.items())
    return f"{short(total)}, {short(trained)} of them trained ({each})"


def _frozen(part: Parameters) -> str:
    if part.trained == part.total:
        return ""
    return f" of which {short(part.trained)} trained" if part.trained else " frozen"


def short(count: int) -> str:
    """A count in thousands or millions: 22.7 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"
