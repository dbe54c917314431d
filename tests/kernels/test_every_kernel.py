"""What every kernel of `KERNELS` is held to, in values and in all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flap_kernels import KERNELS
from flap_kernels.spec import Kernel, Size
from tests.closeness import assert_as_exact

# Enough that the errors' sizes do not hang on luck.
DRAWS: dict[Size, int] = {"edge": 40, "odd": 2}


@pytest.fixture(params=sorted(KERNELS))
def kernel(request) -> Kernel:
    return KERNELS[request.param]


def types_of(kernel: Kernel) -> list[torch.dtype]:
    """The types to try; one where all inputs are integers, which have their own."""
    values = kernel.inputs("edge", torch.Generator().manual_seed(0)).arguments.values()
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in values):
        return [torch.float32, torch.bfloat16]
    return [torch.float32]


in_each_type = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, kernel in sorted(KERNELS.items())
        for dtype in types_of(kernel)
    ],
)


def outputs_and_gradients(op, arguments, differentiable, seeds):
    """Every output and every gradient by name, for upstream gradients drawn from `seeds`."""
    outputs = op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    leading = [output for output in outputs if output.requires_grad]
    if leading:
        draw = torch.Generator().manual_seed(seeds)
        upstream = [
            torch.randn(output.shape, generator=draw).bfloat16().to(output) for output in leading
        ]
        leaves = [arguments[name] for name in differentiable]
        gradients = torch.autograd.grad(leading, leaves, upstream)
        named = zip(differentiable, gradients, strict=True)
        found |= {f"gradient of {name}": gradient for name, gradient in named}
    return {name: value.detach() for name, value in found.items()}


def strided(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values, each tensor with strides of its own and poison between and behind them."""
    found = {}
    for i, (name, value) in enumerate(arguments.items()):
        if isinstance(value, Tensor) and value.ndim:
            gap = 2 + i % 3
            poison = torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
            wide = value.new_full((*value.shape[:-1], gap * (value.shape[-1] + 40)), poison)
            view = wide[..., : gap * value.shape[-1] : gap].copy_(value.detach())
            value = view.detach().requires_grad_(value.requires_grad)
        found[name] = value
    return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated without values holds NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True)  # with it, PyTorch fills what it does not clear
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_as_exact(
    kernel: Kernel,
    size: Size,
    dtype: torch.dtype,
    device: str,
    *,
    draws: int,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Fail unless the op is as close to the truth as its reference is, in this type.

    Errors are gathered over several draws: of one number, the reference's may be nil by luck.
    """
    gathered: dict[str, list[list[Tensor]]] = {}
    generator = torch.Generator(device).manual_seed(0)
    for seed in range(draws):
        inputs = kernel.inputs(size, generator).rounded(dtype)
        named = inputs.differentiable
        exact = outputs_and_gradients(kernel.reference, inputs.cast(torch.float64), named, seed)
        plain = outputs_and_gradients(kernel.reference, inputs.cast(dtype), named, seed)
        with poisoned_memory():
            fused = outputs_and_gradients(kernel.op, prepare(inputs.cast(dtype)), named, seed)
        assert fused.keys() == exact.keys()
        for name, value in fused.items():
            label = f"{kernel.name}, {size}, {dtype}: {name}"
            assert value.dtype == plain[name].dtype, label
            assert value.shape == exact[name].shape, label
            if value.is_floating_point():
                triple = [x[name].flatten() for x in (fused, plain, exact)]
                gathered.setdefault(label, []).append(triple)
            else:
                assert torch.equal(value, exact[name]), label
    for label, triples in gathered.items():
        fused, plain, exact = (torch.cat(column) for column in zip(*triples, strict=True))
        assert_as_exact(label, fused, plain, exact, slack=kernel.slack)


@in_each_type
@pytest.mark.parametrize("size", ["edge", "odd"])
def test_kernel_is_as_exact_as_its_reference(kernel, size, dtype, device):
    check_as_exact(kernel, size, dtype, device, draws=DRAWS[size])


@in_each_type
def test_kernel_takes_strided_inputs(kernel, dtype, device):
    check_as_exact(kernel, "odd", dtype, device, draws=DRAWS["odd"], prepare=strided)


def test_kernel_gives_the_same_bits_twice(kernel, device):
    runs = []
    for _ in range(2):
        inputs = kernel.inputs("odd", torch.Generator(device).manual_seed(0))
        arguments = inputs.cast(torch.float32)
        runs.append(outputs_and_gradients(kernel.op, arguments, inputs.differentiable, 0))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_kernel_is_a_proper_operator(kernel, device):
    """Schema, fake implementation and autograd registration of each custom op that it runs."""
    calls: list[tuple[Any, tuple[Any, ...], bool]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flap_kernels":
                calls.append((func, args, torch.is_grad_enabled()))
            return func(*args, **(kwargs or {}))

    inputs = kernel.inputs("odd", torch.Generator(device).manual_seed(0))
    with Record():
        outputs_and_gradients(kernel.op, inputs.cast(torch.float32), inputs.differentiable, 0)
    assert calls, "no custom op ran"
    for op, arguments, forward in calls:
        leaves = tuple(
            x.detach().requires_grad_(forward and x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        )
        torch.library.opcheck(op, leaves)
