"""What the ops launch at the paper's sizes, beside what their programs say, as JSON.

    python tests/bench/launches.py

For a process of its own, without the interpreter: the ops run forward and backward on tensors
without values that take themselves for a GPU's, and Triton's launcher says how it would specialise
each kernel, which is then not launched.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from bench.machine_code import specialised
from bench.programs import ARCHES, PAPER, VARIANTS, Arch
from flap_kernels import KERNELS, launch, masked_mse_layer
from flap_kernels.ragged_patch_mask import ragged_sizes
from flap_kernels.spec import Kernel

COLUMNS, _, KEEP_COLUMNS = ragged_sizes("paper")

# What a kernel's own inputs leave out.
CALLS: dict[str, list[dict[str, Any]]] = {
    "infonce": [{}, {"ids": torch.int64}, {"precision": "tf32"}],
    "sigmoid_loss": [{}, {"ids": torch.int64}, {"precision": "tf32"}],
    "draw_patch_mask": [
        {"shared": True},
        {"shared": False},
        {"grid": (512, 1), "columns": 307, "rows": None},
    ],
    "draw_ragged_patch_mask": [
        {"shared": True},
        {
            "columns": [8 * C for C in COLUMNS],
            "rows": 1,
            "keep_columns": [6 * k for k in KEEP_COLUMNS],
            "keep_rows": None,
        },
    ],
}


class Pointer:
    """A tensor as a launch sees it."""

    def __init__(self, x: torch.Tensor):
        self.dtype, self.offset = x.dtype, int(x.storage_offset()) * x.element_size()

    def data_ptr(self) -> int:
        return self.offset


class Launched(TorchDispatchMode):
    """Within it, custom ops do what they do on a GPU, and numbers read from one are 1."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func.namespace == "flap_kernels":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def plain(value: Any) -> Any:
    """For JSON, and the same from both sides."""
    return value if isinstance(value, int | float | str | None) else str(value)


def described(kernel, signature, constants, attributes, num_warps, num_stages) -> dict[str, Any]:
    """What sets one compiled kernel apart from another."""
    named = {kernel.params[i].name: value for (i,), value in constants.items()}
    aligned = [kernel.params[i].name for (i,), value in attributes.items() if value]
    return {
        "kernel": kernel.fn.__name__,
        "types": signature,
        "constants": {name: plain(value) for name, value in sorted(named.items())},
        "aligned": sorted(aligned),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def sizes_of(kernel, arguments) -> dict[str, int]:
    """The integers that a launch looks at."""
    looked_at = {p.name for p in kernel.params if not p.do_not_specialize}
    return {name: x for name, x in arguments.items() if type(x) is int and name in looked_at}


def note_launches(arch: int) -> list[dict[str, Any]]:
    """Every launch from now on, in this list, in place of being launched."""
    found: list[dict[str, Any]] = []
    backend = make_backend(GPUTarget("cuda", arch, 32))

    def run(self, *args, grid, warmup, **kwargs):
        args = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
        bind = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        shape = options.num_warps, options.num_stages
        told = described(self, signature, constants, attributes, *shape)
        found.append({**told, "sizes": sizes_of(self, bound)})

    jit.JITFunction.run = run
    return found


def call(kernel: Kernel, changes: dict[str, Any], variant: str) -> None:
    """Forward and backward, in one of the variants."""
    argument, product, precision = VARIANTS[variant]
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    inputs = kernel.inputs("paper", torch.Generator())
    arguments = inputs.cast(argument) | changes
    if "ids" in changes:
        arguments["ids"] = torch.zeros(len(arguments["audio"]), 2, dtype=changes["ids"])
    with torch.autocast("cpu", product, enabled=product != argument):
        outputs = kernel.op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leading = [output for output in outputs if output.requires_grad]
    if leading:
        leaves = [arguments[name] for name in inputs.differentiable]
        torch.autograd.grad(leading, leaves, [torch.ones_like(x) for x in leading])


def compare(arch: Arch) -> dict[str, Any]:
    """What is said of each program, and of each launch, by kernel."""
    found = note_launches(arch)
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    launch._capability = lambda device: arch  # type: ignore[assignment]
    masked_mse_layer.CHUNK_ROWS["cpu"] = masked_mse_layer.CHUNK_ROWS["cuda"]
    programs, launches = {}, {}
    with FakeTensorMode(), Launched():
        for name, kernel in KERNELS.items():
            for changes in CALLS.get(name, [{}]):
                for variant in VARIANTS:
                    call(kernel, changes, variant)
            launches[name] = found.copy()
            found.clear()
    for name in PAPER:
        programs[name] = {}
        for p in PAPER[name].programs(arch):
            shape = p.num_warps, p.num_stages
            told = described(p.kernel, *specialised(p), *shape)
            sizes = sizes_of(p.kernel, {**p.signature, **p.constants})
            programs[name][p.name] = {**told, "sizes": sizes}
    return {"programs": programs, "launches": launches}


if __name__ == "__main__":
    json.dump({arch: compare(arch) for arch in ARCHES}, sys.stdout)
