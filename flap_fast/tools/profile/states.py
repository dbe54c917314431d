"""Bytes that a rank holds whatever its batch, by engine, ZeRO stage and offload.

Of DeepSpeed 0.19.8, as its tensors were counted on CPU ranks; all of it in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flap_fast.training.engine import BUCKET_NUMBERS

_FLOAT = 4
# Below this many elements, ZeRO-3 keeps gathered parameters from the forward to the backward.
_LIVE_NUMBERS = 10**9


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model."""

    trained: int
    frozen: int = 0
    largest: int = 0
    """Size of the largest trained parameter."""
    kept: float = 2.0
    """Numbers that the optimizer keeps for each that is trained: Adam two."""


@dataclass(frozen=True)
class States:
    """Bytes by name."""

    on_device: dict[str, int]
    on_cpu: dict[str, int]
    gradients: Literal["come", "add up", "stay"]
    """Allocated as activations are freed, or added up over micro-batches, or in a fixed buffer."""

    @property
    def with_gradients(self) -> int:
        """All bytes on the device."""
        return sum(self.on_device.values())

    @property
    def without_gradients(self) -> int:
        """Bytes on the device before the first backward."""
        stay = self.gradients == "stay"
        return self.with_gradients - (0 if stay else self.on_device["gradients"])


def state_bytes(
    engine: str,
    stage: int,
    parameters: Parameters,
    world: int,
    *,
    overlap: bool = True,
    offload: str = "none",
    micro_batches: int = 1,
    average: bool = False,
) -> States:
    """Bytes that a rank holds between steps.

    Args:
        engine: `plain` or `deepspeed`.
        overlap: gradients are reduced while the backward goes on (DeepSpeed's on a GPU).
        offload: train.offload.
        average: whether train.ema_decay is set.
    """
    trained, everything = parameters.trained, parameters.trained + parameters.frozen
    averaged = {"average": trained if stage < 3 else -(-trained // world)} if average else {}
    several = micro_batches > 1
    gradients = "add up" if several else "come"
    if engine == "plain" or stage == 0:
        flat = trained if engine == "deepspeed" and world > 1 else 0  # gradients to be reduced
        kept = round(parameters.kept * trained)
        whole = {"gradients": trained, "optimizer": kept, "engine": flat} | averaged
        return States(_in_bytes({"weights": everything} | whole), {}, gradients)
    rank_slice, shard = -(-trained // world), -(-everything // world)
    # The optimizer works on a copy of its slice of the weights.
    device = {
        "weights": everything,
        # ZeRO 1 reduces none before the last micro-batch.
        "gradients": trained if stage == 1 and several else rank_slice,
        "optimizer": round((1 + parameters.kept) * rank_slice),
        "engine": (2 if overlap else 1) * BUCKET_NUMBERS,
    } | averaged
    if stage == 3:
        device["weights"] = shard + min(everything, _LIVE_NUMBERS)
    cpu = {}
    if offload != "none":
        cpu = {"optimizer": device.pop("optimizer"), "gradients": rank_slice, "engine": rank_slice}
        device["optimizer"] = 0
        if stage < 3:
            # A separate buffer; a parameter that two ranks share is whole on both.
            if stage == 2 and several:
                cpu["gradients"] += rank_slice + parameters.largest
            # A buffer of the largest parameter on both sides.
            cpu["engine"] += parameters.largest
            device["engine"] += parameters.largest
        if not (stage == 1 and several):
            device["gradients"] = 0
        if offload == "all":
            device["weights"] -= shard
            cpu["weights"] = shard
            if average:
                cpu["average"] = device.pop("average")
    return States(_in_bytes(device), _in_bytes(cpu), "stay" if stage == 3 else gradients)


def _in_bytes(numbers: dict[str, int]) -> dict[str, int]:
    return {name: _FLOAT * n for name, n in numbers.items()}
