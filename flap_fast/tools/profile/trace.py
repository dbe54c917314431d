"""FLOP and allocated bytes of the operators that run inside a mode, by part of the step.

FLOP are PyTorch's own formulas (`torch.utils.flop_counter`), two a multiply-add, and those that
`flap_kernels` registers with its operators. Bytes are those of the storages that operators give,
until the last tensor lets go of one; what an operator allocates and frees within itself is not
seen.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from flap_fast.tools.profile import packed
from flap_fast.tools.profile.parts import tensors_in

Array = np.ndarray


@dataclass(frozen=True)
class Flop:
    """Floating-point operations of one part of a step."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    """A second forward of blocks, with train.checkpoint_activations."""
    first_pass: int = 0
    """The forward without a graph of all micro-batches, where a step has two passes."""

    @property
    def total(self) -> int:
        """The sum of all phases."""
        return self.forward + self.backward + self.recomputed + self.first_pass


def scaled(flop: Flop, times: int, parts: int = 1) -> Flop:
    """FLOP of `times` clips, from those of `parts`."""
    return Flop(**{name: value * times // parts for name, value in vars(flop).items()})


def summed(flops: Iterable[Flop]) -> Flop:
    """The sum of each phase."""
    total: Counter[str] = Counter()
    for flop in flops:
        total.update(vars(flop))
    return Flop(**total)


def mean(flops: list[Flop]) -> Flop:
    """The mean of each phase, rounded down."""
    names = (field.name for field in fields(Flop))
    return Flop(**{name: sum(getattr(f, name) for f in flops) // len(flops) for name in names})


def interpolated(by_length: dict[int, Flop], tokens: int) -> Flop:
    """FLOP at `tokens` from the polynomial through other lengths' FLOP (Lagrange, exact)."""
    found = dict.fromkeys(vars(Flop()), Fraction())
    for n, flop in by_length.items():
        weight = Fraction(1)
        for m in by_length.keys() - {n}:
            weight *= Fraction(tokens - m, n - m)
        found = {name: value + weight * getattr(flop, name) for name, value in found.items()}
    return Flop(**{name: round(value) for name, value in found.items()})


class Trace(TorchDispatchMode):
    """Counts the operators that run inside it, under `part` and `in_backward`."""

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.part = "other"
        self.in_backward = False
        self._formulas = {op: shape_wrapper(f) for op, f in formulas().items()}
        self._flop: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._serial: dict[int, int] = {}
        self._changes: list[tuple[int, int]] = []
        self._ends: list[int] = []
        for tensor in given:  # weights: allocated before and after
            self._serial[id(tensor.untyped_storage())] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # called very often
            return func(*args)
        result = func(*args, **kwargs)
        operator = func._overloadpacket
        # Kernels join the registry when a loss imports them, which may be inside.
        if formula := flop_registry.get(operator) or self._formulas.get(operator):
            phase = "forward"
            if self.in_backward:  # autograd's own products run without grad mode
                phase = "recomputed" if torch.is_grad_enabled() else "backward"
            self._flop[self.part][phase] += formula(*args, **kwargs, out_val=result)
        for leaf in tensors_in(result):
            if isinstance(leaf, FakeTensor):
                self.hold(leaf)
        self._ends.append(len(self._changes))
        return result

    def mark(self, part: str) -> None:
        """Count the following operators under this part."""
        self.part = part

    def hold(self, tensor: Tensor) -> int:
        """Count a tensor's storage until it is freed; returns the storage's number."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._serial:
            self._serial[key] = serial = len(self._changes)
            size = storage.nbytes()
            self._changes.append((serial, size))
            weakref.finalize(storage, self._drop, key, size)
        return self._serial[key]

    @property
    def operators(self) -> int:
        """Number of operators that have run."""
        return len(self._ends)

    def flop(self) -> dict[str, Flop]:
        """FLOP by part."""
        return {part: Flop(**phases) for part, phases in self._flop.items()}

    def allocated(self, *groups: set[int]) -> list[Array]:
        """Bytes after each operator: of each group of storage numbers, then of the rest."""
        group_of = {serial: n for n, group in enumerate(groups) for serial in group}
        changes = np.zeros((len(self._changes) + 1, len(groups) + 1), dtype=np.int64)
        for n, (serial, size) in enumerate(self._changes):
            changes[n + 1, group_of.get(serial, len(groups))] = size
        return list(changes.cumsum(0)[self._ends].T)

    def _drop(self, key: int, size: int) -> None:
        self._changes.append((self._serial.pop(key), -size))


def formulas() -> dict[Any, Any]:
    """FLOP of operators that PyTorch's registry leaves out, from the shapes of their arguments."""
    aten = torch.ops.aten
    return packed.formulas() | {
        aten.addmm_: lambda _, a, b, **__: 2 * prod(a) * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
        ),
        # Four products; scores that a kernel recomputes do not count.
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v)
        ),
    }
