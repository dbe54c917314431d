"""The contract that every kernel of `KERNELS` is under, in values and in all gradients."""

from __future__ import annotations

import pytest
import torch
from flap_kernels import KERNELS
from flap_kernels.spec import Kernel, Size
from torch import Tensor

from tests.closeness import assert_as_exact

DRAWS: dict[Size, int] = {"edge": 100, "odd": 4, "paper": 1}


@pytest.fixture(params=sorted(KERNELS))
def kernel(request) -> Kernel:
    return KERNELS[request.param]


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


def check_contract(
    kernel: Kernel, size: Size, dtype: torch.dtype, device: str = "cpu", prepare=lambda x: x
) -> None:
    """Fail unless the op is as close to the truth as its reference is, in this type.

    Errors are gathered over several draws: of one number, the reference's may be nil by luck.
    """
    gathered: dict[str, list[list[Tensor]]] = {}
    generator = torch.Generator(device).manual_seed(0)
    for seed in range(DRAWS[size]):
        inputs = kernel.inputs(size, generator).rounded(dtype)
        named = inputs.differentiable
        exact = outputs_and_gradients(kernel.reference, inputs.cast(torch.float64), named, seed)
        plain = outputs_and_gradients(kernel.reference, inputs.cast(dtype), named, seed)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["edge", "odd"])
def test_kernel_is_as_exact_as_its_reference(kernel, size, dtype, device):
    check_contract(kernel, size, dtype, device)
