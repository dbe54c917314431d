"""Bytes that a rank sends in a step: by formula for DeepSpeed, or counted on the collectives.

A collective of W ranks, n bytes being the whole of it (what an all-gather gives, what a
reduce-scatter takes, the tensor of an all-reduce), has each rank send

    all-gather, reduce-scatter, broadcast, reduce  (W-1)/W n        all-reduce  2 (W-1)/W n

as a ring sends them: no algorithm sends fewer, whatever a library chooses. Formulas and counter
speak of n by kind, so that they can be compared in whole numbers.

    W ranks   b clips of a rank   B = b W   d joint width   P trained parameters
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from flap_fast.tools.profile.parts import tensors_in

# The fraction of n that each rank sends, in units of (W-1)/W.
_TIMES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1, "reduce": 1}
_FLOAT, _DOUBLE = 4, 8
# DeepSpeed aligns a rank's slice of a flat group of parameters to this many numbers.
_ALIGNED = 2
# ZeRO-3 shards no parameter up to this size; DeepSpeed's default, which deepspeed_config keeps.
_PERSISTENT = 100_000

Traffic = Counter[str]
"""Bytes n by kind of collective."""


def sent_bytes(traffic: Traffic, world: int) -> float:
    """Bytes that one rank sends."""
    return sum(_TIMES[kind] * n for kind, n in traffic.items()) * (world - 1) / world


def engine_traffic(
    stage: int,
    groups: Sequence[Sequence[int]],
    world: int,
    *,
    micro_batches: int = 1,
    passes: int = 1,
    offload: bool = False,
) -> dict[str, Traffic]:
    """Traffic of DeepSpeed in `forward` (stage 3), `backward` and `step`, all in fp32.

    Stages 0 and 1 reduce the gradients of all micro-batches at once, 2 and 3 those of each. Stage 3
    gathers the large parameters in the forward and keeps them for the backward (up to DeepSpeed's
    1e9 live numbers), the small ones after the step. In two passes it finds no order to rely on,
    and gathers the large ones for each forward and backward.

    Args:
        groups: the numbers in each parameter, by group of the optimizer.
        passes: how often a micro-batch goes through the model.
    """
    if world == 1:
        return {"backward": Counter(), "step": Counter()}
    every = [n for group in groups for n in group]
    if stage == 3:
        small, large = (
            _FLOAT * sum(_padded(n, world) for n in every if (n > _PERSISTENT) == big)
            for big in (False, True)
        )
        times = micro_batches * (3 if passes == 2 else 1)
        norm = _FLOAT if offload else _DOUBLE
        return {
            "forward": Counter(all_gather=times * large),
            "backward": Counter(reduce_scatter=micro_batches * (small + large)),
            "step": Counter(all_gather=small, all_reduce=norm * len(groups)),
        }
    step = Counter()
    if stage:
        flat = (_padded(sum(group), _ALIGNED * world) for group in groups)
        step = Counter(all_gather=_FLOAT * sum(flat), all_reduce=_FLOAT * len(groups))
    times = micro_batches if stage == 2 else 1
    return {"backward": Counter(all_reduce=times * _FLOAT * sum(every)), "step": step}


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class CountTraffic(TorchDispatchMode):
    """A context that adds up the collectives of all process groups in `traffic` and `calls`.

    It sees what reaches c10d's operators, whoever calls them and by whatever name.
    """

    def __init__(self):
        super().__init__()
        self.traffic: Traffic = Counter()
        self.calls: Traffic = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (found := _OPERATORS.get(func._schema.name[6:])):
            kind, argument = found
            self.traffic[kind] += sum(
                x.numel() * x.element_size() for x in tensors_in(args[argument])
            )
            self.calls[kind] += 1
        elif func.namespace == "c10d" and "barrier" not in func._schema.name:
            raise NotImplementedError(f"bytes of {func._schema.name} are not known here")
        return func(*args, **(kwargs or {}))


# Of an operator: the collective, and the argument that is the whole of it.
_OPERATORS = {
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}
