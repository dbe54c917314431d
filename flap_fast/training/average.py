"""A moving average of the weights in training, which evaluation and checkpoints take.

    average = d average + (1 - d) weights      d = min(ema_decay, (1 + t) / (10 + t))   after step t

A rank holds the average of what it holds of the weights: all of them, or under ZeRO 3 its part of
each. Buffers, as a BatchNorm's statistics, are the model's own.

Source: Polyak and Juditsky, 1992; the decay of the first steps is TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.ranks import Ranks
from flap_fast.tensors import fault, load_tensors


def average_of(config: Config, model: nn.Module, ranks: Ranks) -> Average | None:
    """The average that the config asks for; make it after the engine has placed the weights."""
    decay = config.train.ema_decay
    return Average(model, ranks, decay) if decay else None


class Average:
    """The average of a model's trained weights. Collective: call on every rank.

    Args:
        decay: train.ema_decay.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, decay: float):
        self._ranks, self._decay, self._steps = ranks, decay, 0
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = [part.clone() for part in self._parts()]

    @property
    def names(self) -> list[str]:
        """Of the weights that are averaged."""
        return list(self._parameters)

    def load(self, file: Path, steps: int) -> None:
        """Set the average after so many steps, from a file of whole weights.

        Raises:
            ConfigError: it holds other weights, or values that are not finite.
        """
        self._steps, saved = steps, load_tensors(file)
        for (name, p), average in zip(self._parameters.items(), self._averages, strict=True):
            alike = name in saved and saved[name].shape == getattr(p, "ds_shape", p.shape)
            why = fault(saved[name], average.dtype) if alike else "missing or of another shape"
            require(why is None, str(file), "hold this model's weights", f"{name} {why}")
            start = self._ranks.rank * average.numel() if hasattr(p, "ds_tensor") else 0
            values = saved[name].flatten()[start : start + average.numel()]
            average.view(-1)[: len(values)] = values

    def update(self) -> None:
        """Add the weights after a step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        lerp: Any = torch._foreach_lerp_  # type: ignore[attr-defined] - one pass over all of them
        lerp(self._averages, self._parts(), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the model has the averages as its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for part, average in zip(self._parts(), self._averages, strict=True):
                before = part.clone()
                part.copy_(average)
                average.copy_(before)
        gathered = [p for p in self._parameters.values() if getattr(p, "ds_persist", False)]
        if gathered:  # ZeRO 3 keeps small ones whole on every rank
            first: Any = gathered[0]
            first.partition(gathered)
            first.all_gather(gathered)

    def _parts(self) -> list[Tensor]:
        """What this rank holds of the weights, without their gradients."""
        return [getattr(p, "ds_tensor", p).detach() for p in self._parameters.values()]
