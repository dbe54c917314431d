"""patch_embed: what it reads, what it leaves alone, and what autocast makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flap_fast.encoders.vit.patches import patchify
from flap_kernels import patch_embed
from flap_kernels.launch import runs_triton
from flap_kernels.patch_embed import patch_embed_reference
from tests.closeness import assert_as_exact

# Two rows (time) of three patches (frequency), 2 x 2 pixels each; patch n holds n + 1 four times.
BY_PATCH = [[1.0, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6]]
POSITION = [[100.0], [200.0], [300.0], [400.0], [500.0], [600.0]]


def numbers(values, device) -> Tensor:
    return torch.tensor(values, device=device)


def draw(device, B=3, T=32, F=48, K=4, D=24, seed=0) -> dict[str, Any]:
    """Arguments in float32 with values that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    N = T * F // 256
    arguments = {
        "mel": torch.randn(B, T, F, generator=generator).bfloat16().float(),
        "ids_keep": torch.rand(B, N, generator=generator).argsort(1)[:, :K].sort(1).values,
        "weight": torch.randn(D, 256, generator=generator).bfloat16().float() / 16,
        "bias": torch.randn(D, generator=generator).bfloat16().float(),
        "position": torch.randn(N, D, generator=generator).bfloat16().float(),
    }
    return {name: value.to(device) for name, value in arguments.items()}


def gradients(op, arguments: dict[str, Any], names: tuple[str, ...], upstream: Tensor):
    leaves = {
        name: value.detach().clone().requires_grad_(name in names)
        for name, value in arguments.items()
    }
    return torch.autograd.grad(op(**leaves), [leaves[name] for name in names], upstream)


def test_patches_are_in_time_major_order(device):
    mel = numbers([BY_PATCH], device)
    weight, bias = numbers([[1.0, 1, 1, 1]], device), numbers([0.5], device)
    ids_keep = numbers([[1, 2, 4]], device)
    found = patch_embed(mel, ids_keep, weight, bias, numbers(POSITION, device))
    assert found.tolist() == [[[208.5], [312.5], [520.5]]]
    everything = patch_embed(mel, None, weight, bias, numbers(POSITION, device))
    assert everything.flatten().tolist() == [104.5, 208.5, 312.5, 416.5, 520.5, 624.5]


def test_pixels_of_a_patch_are_in_time_major_order(device):
    mel = numbers([[[1.0, 10], [100, 1000]]], device)
    weight = numbers([[1.0, 2, 3, 4]], device)
    zero = numbers([0.0], device)
    found = patch_embed(mel, numbers([[0]], device), weight, zero, zero[None])
    assert found.item() == 1 + 20 + 300 + 4000


def test_gradients_by_hand(device):
    mel = numbers([BY_PATCH], device).requires_grad_()
    weight = numbers([[1.0, 2, 3, 4]], device).requires_grad_()
    bias = numbers([0.5], device).requires_grad_()
    position = numbers(POSITION, device).requires_grad_()
    found = patch_embed(mel, numbers([[1, 5]], device), weight, bias, position)
    leaves = (mel, weight, bias, position)
    by_mel, by_weight, by_bias, by_position = torch.autograd.grad(
        found, leaves, numbers([[[10.0], [100.0]]], device)
    )
    assert by_weight.tolist() == [[2 * 10 + 6 * 100] * 4]
    assert by_bias.tolist() == [110]
    assert by_position.flatten().tolist() == [0, 10, 0, 0, 0, 100]
    assert by_mel.tolist() == [
        [[0, 0, 10, 20, 0, 0], [0, 0, 30, 40, 0, 0], [0, 0, 0, 0, 100, 200], [0, 0, 0, 0, 300, 400]]
    ]


def test_positions_may_be_named_and_repeat(device):
    mel = numbers([BY_PATCH], device)
    weight, bias = numbers([[1.0, 1, 1, 1]], device), numbers([0.5], device)
    position = numbers([[1000.0], [2000.0], [3000.0]], device).requires_grad_()
    index = numbers([[2, 0, 2]], device).int()
    found = patch_embed(mel, numbers([[1, 2, 4]], device), weight, bias, position, index)
    assert found.flatten().tolist() == [3008.5, 1012.5, 3020.5]
    (by_position,) = torch.autograd.grad(found, position, numbers([[[1.0], [10], [100]]], device))
    assert by_position.flatten().tolist() == [10, 0, 101]


@pytest.mark.parametrize("outside", [6, -1])
def test_a_position_out_of_range_is_not_passed_over_in_silence(device, outside):
    arguments = draw(device)
    clean = patch_embed(**arguments)
    arguments["position_index"] = arguments["ids_keep"].clone()
    arguments["position_index"][1, 2] = outside
    try:
        found = patch_embed(**arguments)
    except IndexError:
        return
    assert found[1, 2].isnan().all()
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


def test_dropped_patches_are_not_read(device):
    arguments = draw(device)
    clean = patch_embed(**arguments)
    read = torch.zeros_like(arguments["mel"], dtype=torch.bool)
    for b, kept in enumerate(arguments["ids_keep"].tolist()):
        for n in kept:
            time, freq = n // 3 * 16, n % 3 * 16
            read[b, time : time + 16, freq : freq + 16] = True
    arguments["mel"] = arguments["mel"].masked_fill(~read, torch.nan)
    assert read.float().mean().item() == pytest.approx(4 / 6)
    assert torch.equal(patch_embed(**arguments), clean)
    for gradient in gradients(patch_embed, arguments, ("weight", "bias"), torch.ones_like(clean)):
        assert gradient.isfinite().all()


def test_an_index_out_of_range_is_not_passed_over_in_silence(device):
    arguments = draw(device)
    clean = patch_embed(**arguments)
    arguments["ids_keep"][1, 2] = 6
    try:
        found = patch_embed(**arguments)
    except IndexError:
        return
    assert found[1, 2].isnan().all()
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("outside", [6, -1, 10**9])
def test_an_index_out_of_range_reaches_no_other_memory_backwards(device, outside):
    arguments = draw(device)
    upstream = torch.ones_like(patch_embed(**arguments))
    arguments["ids_keep"][1, 2] = outside
    try:
        (found,) = gradients(patch_embed, arguments, ("weight",), upstream)
    except IndexError:
        return
    assert found.isnan().any()


def test_agrees_with_the_convolution_over_all_patches(device):
    arguments = draw(device)
    mel, ids_keep, weight = arguments["mel"], arguments["ids_keep"], arguments["weight"]
    everything = nn.functional.conv2d(
        mel[:, None], weight.view(-1, 1, 16, 16), arguments["bias"], stride=16
    )
    tokens = everything.flatten(2).transpose(1, 2) + arguments["position"]
    expected = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))
    torch.testing.assert_close(patch_embed(**arguments), expected)
    linear = patchify(mel[:, None], 16) @ weight.T + arguments["bias"] + arguments["position"]
    torch.testing.assert_close(patch_embed(**{**arguments, "ids_keep": None}), linear)


@pytest.mark.parametrize("side", [1, 3, 8, 32, 48])
def test_patches_of_any_side(side, device):
    arguments = draw(device, T=96, F=96, K=1)
    generator = torch.Generator().manual_seed(1)
    N = 96 * 96 // side**2
    arguments["ids_keep"] = torch.tensor([[0], [N - 1], [N // 2]], device=device)
    arguments["weight"] = torch.randn(24, side**2, generator=generator).to(device) / side
    arguments["position"] = torch.randn(N, 24, generator=generator).to(device)
    torch.testing.assert_close(patch_embed(**arguments), patch_embed_reference(**arguments))


def test_autocast_rounds_the_factors_and_sums_in_float32(device):
    arguments = draw(device)
    names = ("weight", "bias", "position", "mel")
    exact: dict[str, Any] = {
        name: x.double() if x.is_floating_point() else x for name, x in arguments.items()
    }
    upstream = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(2)).to(device)
    truth = [patch_embed_reference(**exact)]
    truth += gradients(patch_embed_reference, exact, names, upstream.double())
    with torch.autocast(device, torch.bfloat16):
        fused = [patch_embed(**arguments)]
        fused += gradients(patch_embed, arguments, names, upstream)
        plain = [patch_embed_reference(**arguments)]
        plain += gradients(patch_embed_reference, arguments, names, upstream)
    for name, mine, theirs, right in zip(("output", *names), fused, plain, truth, strict=True):
        assert mine.dtype == torch.float32
        assert_as_exact(name, mine, theirs, right, slack=1.0)
    # The factors are bfloat16 numbers already: only sums in float32 come as close as this. On a
    # CPU the library's bfloat16 product rounds its result.
    if runs_triton(arguments["mel"]):
        torch.testing.assert_close(fused[0].double(), truth[0], rtol=1e-6, atol=1e-5)


def test_the_result_may_be_asked_for_in_bfloat16(device):
    arguments = draw(device)
    with torch.autocast(device, torch.bfloat16):
        assert patch_embed(**arguments).dtype == torch.float32
        assert patch_embed(**arguments, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_without_a_batch_or_without_patches(device):
    arguments = draw(device)
    for empty in (
        {"mel": arguments["mel"][:0], "ids_keep": arguments["ids_keep"][:0]},
        {"ids_keep": arguments["ids_keep"][:, :0]},
    ):
        some = {**arguments, **empty}
        shape = (*some["ids_keep"].shape, 24)
        assert patch_embed(**some).shape == shape
        found = gradients(patch_embed, some, ("weight", "bias"), torch.zeros(shape, device=device))
        assert not any(gradient.any() for gradient in found)


def test_compiles_whole_with_its_gradients_under_autocast(device):
    arguments = draw(device)
    names = ("weight", "bias", "mel")
    upstream = torch.ones(3, 4, 24, device=device)

    def embed(**given):
        with torch.autocast(device, torch.bfloat16):
            return patch_embed(**given)

    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**arguments), embed(**arguments))
    for mine, theirs in zip(
        gradients(compiled, arguments, names, upstream),
        gradients(embed, arguments, names, upstream),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mel": torch.zeros(3, 1, 32, 48)}, r"mel must be \(B, T, F\)"),
        ({"mel": torch.zeros(3, 32, 40)}, "T and F multiples of P = 16"),
        ({"mel": torch.zeros(3, 32, 48, dtype=torch.int64)}, "mel must be float"),
        ({"weight": torch.zeros(24, 255)}, r"P \* P pixels, got 255"),
        ({"weight": torch.zeros(24)}, r"weight must be \(D, P \* P\)"),
        ({"ids_keep": torch.zeros(2, 4, dtype=torch.int64)}, r"ids_keep must be \(B, K\)"),
        ({"ids_keep": torch.zeros(3, 4)}, "ids_keep must be int32 or int64"),
        ({"bias": torch.zeros(23)}, r"bias must be \(D,\)"),
        ({"position": torch.zeros(5, 24)}, r"position must be \(N, D\) = \(6, 24\)"),
        ({"position_index": torch.zeros(3, 4)}, "position_index must be int32 or int64"),
        (
            {"position_index": torch.zeros(3, 5, dtype=torch.int64)},
            r"position_index must be the shape of ids_keep = \(3, 4\)",
        ),
    ],
)
def test_what_cannot_be_embedded_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        patch_embed(**{**draw("cpu"), **change})


def test_of_a_long_table_of_positions_only_the_rows_taken_are_computed_with():
    """That of clips of up to an hour would else take more time than its patches."""
    mel, weight, bias = torch.randn(1, 8, 8), torch.randn(3, 16), torch.randn(3)
    position = torch.ones(1, 3).expand(2**40, 3)  # 12 TiB, were it held
    index = torch.tensor([[0, 2**40 - 1, 5, 5]])
    found = patch_embed(mel, None, weight, bias, position, index)
    assert torch.equal(
        found, patch_embed(mel, None, weight, bias, position[:6], index.clamp(max=5))
    )
