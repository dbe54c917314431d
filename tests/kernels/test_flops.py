"""PyTorch's FLOP counter on the ops: on the meta device, and as many as in the plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flap_kernels import KERNELS, cyclic, distributed_infonce, infonce
from flap_kernels.infonce import infonce_reference
from flap_kernels.spec import Kernel

# Ops that compute again in the backward what they do not keep: the logits, the prediction.
RECOMPUTE = ("infonce", "masked_mse")
# Ops that compute their gradients in the forward.
AT_ONCE = ("sigmoid_loss",)


def counts(op, arguments: dict[str, Any], differentiable: tuple[str, ...]) -> tuple[int, int]:
    """FLOP of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        outputs = op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leading = [output for output in outputs if output.requires_grad]
    with FlopCounterMode(display=False) as backward:
        if leading:
            leaves = [arguments[name] for name in differentiable]
            torch.autograd.grad(leading, leaves, [torch.ones_like(x) for x in leading])
    return forward.get_total_flops(), backward.get_total_flops()


def on_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


@pytest.fixture(params=sorted(KERNELS))
def kernel(request) -> Kernel:
    return KERNELS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_op_counts_as_many_flop_as_its_reference(kernel, dtype):
    inputs = kernel.inputs("odd", torch.Generator().manual_seed(0))
    names = inputs.differentiable
    forward, backward = counts(kernel.reference, inputs.cast(dtype), names)
    if kernel.op.__name__ in RECOMPUTE:
        backward += forward
    if kernel.op.__name__ in AT_ONCE:
        forward, backward = forward + backward, 0
    for arguments in (inputs.cast(dtype), on_meta(inputs.cast(dtype))):
        assert counts(kernel.op, arguments, names) == (forward, backward)
    assert bool(forward) == (kernel.op.__name__ in (*RECOMPUTE, *AT_ONCE, "patch_embed"))


def test_a_gradient_that_is_not_wanted_is_not_counted():
    audio, text = torch.rand(6, 4, device="meta"), torch.rand(6, 4, device="meta")
    audio.requires_grad_()
    forward, backward = counts(
        lambda **given: infonce(**given, scale=20.0), {"audio": audio, "text": text}, ("audio",)
    )
    assert (forward, backward) == (2 * 6 * 6 * 4, 2 * 2 * 6 * 6 * 4)


@pytest.mark.parametrize("form", ["tiled", "gram"])
def test_cyclic_counts_every_product_of_its_form(form):
    B, D = 12, 5
    for device in ("cpu", "meta"):
        audio, text = (torch.rand(B, D, device=device, requires_grad=True) for _ in range(2))
        given = {"audio": audio, "text": text}
        found = counts(lambda **x: cyclic(**x, form=form), given, ("audio", "text"))
        products = {"tiled": (4 * B * B * D, 8 * B * B * D), "gram": (3 * B * D * D, 4 * B * D * D)}
        assert found == tuple(2 * n for n in products[form]), device


def test_infonce_on_one_rank_counts_as_infonce():
    audio, text = (torch.rand(6, 4, device="meta", requires_grad=True) for _ in range(2))
    scale = torch.ones((), device="meta", requires_grad=True)
    given = {"audio": audio, "text": text, "scale": scale}
    assert counts(distributed_infonce, given, tuple(given)) == counts(infonce, given, tuple(given))
    forward, _ = counts(infonce_reference, given, tuple(given))
    assert forward == counts(infonce, given, tuple(given))[0]
