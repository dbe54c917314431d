"""masked_mse: the target by hand, what is read, and nothing masked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flap_kernels import masked_mse, masked_mse_layer
from flap_kernels.masked_mse import masked_mse_reference
from tests.closeness import assert_as_exact

NAMES = ("hidden", "weight", "bias")


def draw(device, B=3, T=32, F=48, M=4, H=20, seed=0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    N = T * F // 256
    arguments = {
        "hidden": torch.randn(B, M, H, generator=generator).bfloat16().float(),
        "weight": (torch.randn(256, H, generator=generator) / H**0.5).bfloat16().float(),
        "bias": torch.randn(256, generator=generator).bfloat16().float(),
        "mel": torch.randn(B, T, F, generator=generator).bfloat16().float(),
        "ids_drop": torch.rand(B, N, generator=generator).argsort(1)[:, :M].sort(1).values,
    }
    return {name: value.to(device) for name, value in arguments.items()}


def loss_and_gradients(op, arguments: dict[str, Any], upstream=1.0, **options) -> list[Tensor]:
    leaves = {
        name: value.detach().clone().requires_grad_(name in NAMES)
        for name, value in arguments.items()
    }
    loss = op(**leaves, **options)
    wanted = [leaves[name] for name in NAMES]
    return [loss.detach(), *torch.autograd.grad(loss * upstream, wanted)]


def by_hand(device) -> dict[str, Any]:
    """Two patches of 2 x 2 pixels; the second is masked, and predicted as [1, 1, 1, 1]."""
    return {
        "hidden": torch.tensor([[[2.0]]], device=device),
        "weight": torch.full((4, 1), 0.25, device=device),
        "bias": torch.full((4,), 0.5, device=device),
        "mel": torch.tensor([[[9.0, 9, 1, 2], [9, 9, 3, 6]]], device=device),
        "ids_drop": torch.tensor([[1]], device=device),
    }


def test_two_patches_by_hand(device):
    # Errors 0, -1, -2, -5: the mean of their squares is 30 / 4, its gradient e / 2.
    loss, by_hidden, by_weight, by_bias = loss_and_gradients(
        masked_mse, by_hand(device), norm_pix=False
    )
    assert loss.item() == 7.5
    assert by_hidden.tolist() == [[[0.25 * (0 - 1 - 2 - 5) / 2]]]
    assert by_weight.flatten().tolist() == [0, -1, -2, -5]
    assert by_bias.tolist() == [0, -0.5, -1, -2.5]


def test_normalised_targets_by_hand(device):
    # Pixels 1, 2, 3, 6: mean 3, unbiased variance (4 + 1 + 0 + 9) / 3.
    spread = math.sqrt(14 / 3 + 1e-6)
    errors = [1 - (x - 3) / spread for x in (1, 2, 3, 6)]
    loss, _, _, by_bias = loss_and_gradients(masked_mse, by_hand(device), norm_pix=True)
    assert loss.item() == pytest.approx(sum(e * e for e in errors) / 4, rel=1e-6)
    assert by_bias.tolist() == pytest.approx([e / 2 for e in errors], rel=1e-6)


def test_a_flat_patch_has_a_target_of_zeros(device):
    # Without the 1e-6 under the root this is 0 / 0.
    arguments = by_hand(device)
    arguments["mel"] = torch.full_like(arguments["mel"], -3.25)
    assert masked_mse(**arguments, norm_pix=True).item() == 1


def test_the_eps_is_under_the_root(device):
    # Unbiased variance 1e-6 beside an eps of 1e-6: targets are divided by sqrt(2) too much.
    arguments = by_hand(device)
    pixels = torch.tensor([-1.0, 1.0, -1.0, 1.0], device=device) * math.sqrt(0.75e-6)
    arguments["mel"][0, :, 2:] = pixels.view(2, 2)
    target = math.sqrt(0.75 / 2)
    expected = ((1 + target) ** 2 + (1 - target) ** 2) / 2
    assert masked_mse(**arguments, norm_pix=True).item() == pytest.approx(expected, rel=1e-5)


def test_kept_patches_are_not_read(device):
    arguments = draw(device)
    clean = masked_mse(**arguments, norm_pix=True)
    read = torch.zeros_like(arguments["mel"], dtype=torch.bool)
    for b, masked in enumerate(arguments["ids_drop"].tolist()):
        for n in masked:
            time, freq = n // 3 * 16, n % 3 * 16
            read[b, time : time + 16, freq : freq + 16] = True
    arguments["mel"] = arguments["mel"].masked_fill(~read, torch.nan)
    assert torch.equal(masked_mse(**arguments, norm_pix=True), clean)


def test_an_index_out_of_range_is_not_passed_over_in_silence(device):
    arguments = draw(device)
    arguments["ids_drop"][1, 2] = 6
    try:
        loss = masked_mse(**arguments, norm_pix=True)
    except IndexError:
        return
    assert loss.isnan()


def test_rows_are_weighted_by_hand(device):
    arguments = by_hand(device)
    arguments["hidden"] = torch.tensor([[[2.0], [2.0]]], device=device)
    arguments["ids_drop"] = torch.tensor([[0, 1]], device=device)
    arguments["row_weight"] = torch.tensor([[2.0, 0.5]], device=device)
    # Patch 0 is 9 four times, predicted as 1: 64. Patch 1, as above: 30 / 4.
    loss, by_hidden, by_weight, by_bias = loss_and_gradients(masked_mse, arguments, norm_pix=False)
    assert loss.item() == 2 * 64 + 0.5 * 30 / 4
    errors = [[-8.0] * 4, [0.0, -1, -2, -5]]
    per_pixel = [[2 * w * e / 4 for e in row] for w, row in zip((2, 0.5), errors, strict=True)]
    assert by_bias.tolist() == [a + b for a, b in zip(*per_pixel, strict=True)]
    assert by_weight.flatten().tolist() == [2 * (a + b) for a, b in zip(*per_pixel, strict=True)]
    assert by_hidden.flatten().tolist() == [0.25 * sum(row) for row in per_pixel]


def test_equal_weights_are_the_mean(device):
    arguments = draw(device)
    mean = loss_and_gradients(masked_mse, arguments, norm_pix=True)
    arguments["row_weight"] = torch.full((3, 4), 1 / 12, device=device)
    for found, expected in zip(
        loss_and_gradients(masked_mse, arguments, norm_pix=True), mean, strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("empty", ["patches", "clips"])
def test_nothing_masked_is_no_loss_and_no_gradient(empty, weighted, device):
    arguments = draw(device)
    cut = (slice(0, 0),) if empty == "clips" else (slice(None), slice(0, 0))
    if weighted:
        arguments["row_weight"] = torch.ones(3, 4, device=device)[cut]
    arguments["hidden"], arguments["ids_drop"] = (
        arguments["hidden"][cut],
        arguments["ids_drop"][cut],
    )
    if empty == "clips":
        arguments["mel"] = arguments["mel"][cut]
    loss, *gradients = loss_and_gradients(masked_mse, arguments, norm_pix=True)
    assert loss.item() == 0
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert gradient.shape == arguments[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_chunks_of_rows_make_no_difference(norm_pix, weighted, monkeypatch, device):
    arguments = draw(device, B=5, M=6)
    if weighted:
        arguments["row_weight"] = torch.arange(30.0, device=device).view(5, 6)
    whole = loss_and_gradients(masked_mse, arguments, upstream=3.0, norm_pix=norm_pix)
    monkeypatch.setattr(masked_mse_layer, "CHUNK_ROWS", {"cpu": 7, "cuda": 7})
    chunked = loss_and_gradients(masked_mse, arguments, upstream=3.0, norm_pix=norm_pix)
    for found, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", [2, 3, 8, 32, 48])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_patches_of_any_side(side, norm_pix, device):
    arguments = draw(device, T=96, F=96, M=1)
    generator = torch.Generator().manual_seed(1)
    N = 96 * 96 // side**2
    arguments["ids_drop"] = torch.tensor([[0], [N - 1], [N // 2]], device=device)
    arguments["weight"] = torch.randn(side**2, 20, generator=generator).to(device) / 5
    arguments["bias"] = torch.randn(side**2, generator=generator).to(device)
    found = loss_and_gradients(masked_mse, arguments, norm_pix=norm_pix)
    expected = loss_and_gradients(masked_mse_reference, arguments, norm_pix=norm_pix)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_the_factors_and_takes_errors_in_float32(hidden, device):
    arguments = draw(device)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    truth = loss_and_gradients(masked_mse_reference, exact, norm_pix=True)
    arguments["hidden"] = arguments["hidden"].to(hidden)
    with torch.autocast(device, torch.bfloat16):
        fused = loss_and_gradients(masked_mse, arguments, norm_pix=True)
        plain = loss_and_gradients(masked_mse_reference, arguments, norm_pix=True)
    for name, mine, theirs, right in zip(("loss", *NAMES), fused, plain, truth, strict=True):
        assert mine.dtype == (hidden if name == "hidden" else torch.float32)
        assert_as_exact(name, mine, theirs, right, slack=2.0)


def test_the_gradient_follows_what_comes_from_above(device):
    arguments = draw(device)
    once = loss_and_gradients(masked_mse, arguments, norm_pix=True)
    four = loss_and_gradients(masked_mse, arguments, upstream=4.0, norm_pix=True)
    for found, expected in zip(four[1:], once[1:], strict=True):
        assert torch.equal(found, 4 * expected)


def test_compiles_whole_with_its_gradients(device):
    arguments = draw(device)
    compiled = torch.compile(masked_mse, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(
        loss_and_gradients(compiled, arguments, norm_pix=True),
        loss_and_gradients(masked_mse, arguments, norm_pix=True),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 6, 20)}, r"hidden must be \(B, M, H\) with ids_drop \(B, M\)"),
        ({"mel": torch.zeros(3, 32, 40)}, "T and F multiples of P = 16"),
        ({"mel": torch.zeros(3, 32, 48, requires_grad=True)}, "mel must not require a gradient"),
        ({"weight": torch.zeros(255, 20)}, r"P \* P pixels, got 255"),
        ({"bias": torch.zeros(255)}, r"bias must be \(P \* P,\)"),
        ({"ids_drop": torch.zeros(3, 4)}, "ids_drop must be int32 or int64"),
        ({"row_weight": torch.zeros(3)}, r"row_weight must be \(B, M\) = \(3, 4\)"),
        ({"row_weight": torch.zeros(3, 4, dtype=torch.int64)}, "row_weight must be float"),
        (
            {"row_weight": torch.zeros(3, 4, requires_grad=True)},
            "row_weight must not require a gradient",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        masked_mse(**{**draw("cpu"), **change}, norm_pix=True)


def test_pixels_alone_have_no_variance():
    arguments = {**draw("cpu"), "weight": torch.zeros(1, 20), "bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="norm_pix must be False for patches of one pixel"):
        masked_mse(**arguments, norm_pix=True)
