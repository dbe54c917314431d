"""InfoNCE on tensor cores: as far from float64 as rounding the operands takes it, no further."""

from __future__ import annotations

import pytest
import torch

from bench.infonce_precision import (
    NAMES,
    ROUNDINGS,
    alike,
    bf16,
    cut_off,
    errors,
    loss_and_gradients,
    measure,
    rounded,
    tf32,
)
from flap_kernels import infonce
from flap_kernels.infonce import infonce_reference

SCALE = torch.tensor(14.3, dtype=torch.float64)


def test_rounding_by_hand():
    """A fraction keeps 10 bits in tf32, 7 in bf16; half a last bit is rounded up or cut off."""
    one = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12])
    assert tf32(one).tolist() == [1 + 2**-10, -1 - 2**-10, 1]
    assert cut_off(one).tolist() == [1, -1, 1]
    assert bf16(torch.tensor([1 + 2**-7 + 2**-9])).tolist() == [1 + 2**-7]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_kernel_rounds_its_operands_to_the_nearest_and_nothing_else(precision, kernel_device):
    given = [x.to(kernel_device) for x in (*alike(150, 40, seed=0), SCALE)]
    exact = loss_and_gradients(infonce_reference, *given)
    audio, text, scale = (x.float() for x in given)
    reference = rounded(audio, text, scale, precision)
    found = loss_and_gradients(
        lambda a, t, s: infonce(a, t, s, precision=precision), audio, text, scale
    )
    apart = errors(found, [x.double() for x in reference])
    away = errors(reference, exact)
    # Triton's interpreter cuts a bfloat16's bits off where a GPU rounds: the weights', here.
    most = 1.0 if precision == "bf16" and kernel_device == "cpu" else 0.3
    for name, one, other in zip(NAMES, apart, away, strict=True):
        assert one < most * other, f"{name}: {one:.1e} from the rounded, {other:.1e} from the exact"
    # Tensor cores alone would cut bits off: each cosine a little smaller, and the loss with them.
    cut = errors(rounded(audio, text, scale, "cut off"), exact)
    assert precision == "bf16" or cut[0] > 20 * away[0]


def test_without_a_gpu_bf16_rounds_embeddings_and_gradients_and_tf32_nothing():
    audio, text = (x.float() for x in alike(60, 40, seed=1))
    scale = SCALE.float()
    found = loss_and_gradients(lambda *x: infonce(*x, precision="bf16"), audio, text, scale)
    narrow = loss_and_gradients(infonce, audio.bfloat16(), text.bfloat16(), scale)
    assert found[1].dtype == torch.float32
    assert all(torch.equal(one, two.float()) for one, two in zip(found, narrow, strict=True))
    exactly = loss_and_gradients(infonce, audio, text, scale)
    assert not torch.equal(found[0], exactly[0])
    same = loss_and_gradients(lambda *x: infonce(*x, precision="tf32"), audio, text, scale)
    assert all(torch.equal(one, two) for one, two in zip(same, exactly, strict=True))


def test_float64_is_for_checking_in_any_precision():
    given = *alike(9, 5, seed=2), SCALE
    losses = [infonce(*given, precision=precision) for precision in ("ieee", "tf32", "bf16")]
    assert losses[0] == losses[1] == losses[2]


def test_each_precision_costs_about_what_the_readme_says():
    """A loss of 64 clips; at 4608 the errors are smaller, for more of them cancel."""
    found = measure(64, d=512)
    assert list(found) == ["ieee", *ROUNDINGS]
    for name, loss, gradient in (("ieee", 1e-6, 5e-6), ("tf32", 1e-4, 2e-3), ("bf16", 5e-3, 2e-2)):
        assert found[name][0] < loss
        assert max(found[name][1:3]) < gradient
    assert found["ieee"][1] < found["tf32"][1] / 50 < found["bf16"][1] / 100


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_a_gpus_nan_stays_one(precision, device):
    """0x7fffffff: rounding to tf32 would carry into the sign, and leave minus nothing."""
    audio, text = (x.float().to(device) for x in alike(40, 8, seed=3))
    audio.view(torch.int32)[7, 2] = 0x7FFFFFFF
    scale = torch.tensor(20.0, device=device)
    found = loss_and_gradients(lambda *x: infonce(*x, precision=precision), audio, text, scale)
    assert found[0].isnan()
    assert found[3].isnan()
