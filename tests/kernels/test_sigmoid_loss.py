"""The sigmoid loss: alone, with shared ids and extra captions, and over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_kernels import sigmoid_loss
from flap_kernels.infonce.backend import Targets
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.infonce.triton_launch import TritonTiled
from flap_kernels.infonce.triton_sigmoid import sigmoid_kernel
from flap_kernels.sigmoid_loss import sigmoid_loss_reference
from tests.kernels.faults import Fault, put_in
from tests.kernels.test_distributed_infonce import CUTS, SCHEMES, ids_of
from tests.kernels.test_infonce import DUPLICATES, IDS, pairs
from tests.kernels.test_infonce_blocks import BLOCKS, block
from tests.ranks import on_ranks

NAMES = ("loss", "audio", "text", "scale", "bias")


def loss_and_gradients(loss, audio, text, scale=10.0, bias=-6.0, **options):
    numbers = (torch.tensor(x, dtype=audio.dtype, device=audio.device) for x in (scale, bias))
    leaves = [x.detach().clone().requires_grad_() for x in (audio, text, *numbers)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(found, exact, **tolerance):
    for name, mine, theirs in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_two_pairs_by_hand():
    # l = [[2, -1], [-1, 2]]: pairs have log(1 + e^-2), the others log(1 + e^-1).
    loss = sigmoid_loss(torch.eye(2), torch.eye(2), 3.0, -1.0)
    by_hand = 2 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("B", [1, 2, 33, 700])
def test_float64_agrees_with_autograd(B):
    inputs = pairs(B, 12)
    exact = loss_and_gradients(sigmoid_loss_reference, *inputs)
    assert_same(loss_and_gradients(sigmoid_loss, *inputs), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_clips_that_share_an_id(ids, duplicates):
    inputs, options = pairs(7, 4), {"ids": ids, "duplicates": duplicates}
    exact = loss_and_gradients(sigmoid_loss_reference, *inputs, **options)
    assert_same(loss_and_gradients(sigmoid_loss, *inputs, **options), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_extra_captions_are_pairs_of_no_clip(masked):
    audio, text = pairs(5, 4)
    text = torch.cat([text, pairs(7, 4, seed=1)[1]])
    ids = torch.tensor([0, 1, 2, 1, 4, 5, 1, 7, 2, 9, 10, 11]) if masked else None
    exact = loss_and_gradients(sigmoid_loss_reference, audio, text, ids=ids)
    found = loss_and_gradients(sigmoid_loss, audio, text, ids=ids)
    assert_same(found, exact, rtol=1e-12, atol=1e-14)


def test_what_needs_no_gradient_gets_none_and_changes_no_bit():
    audio, text = pairs(9, 5, dtype=torch.float32)
    plain = sigmoid_loss(audio, text, 10.0, -6.0)
    whole = loss_and_gradients(sigmoid_loss, audio, text)
    assert torch.equal(plain, whole[0])
    bias = torch.tensor(-6.0, requires_grad=True)
    (bias_grad,) = torch.autograd.grad(sigmoid_loss(audio, text, 10.0, bias), bias)
    assert torch.equal(bias_grad, whole[4])
    leaf = text.clone().requires_grad_()
    loss = sigmoid_loss(audio, leaf, 10.0, -6.0)
    twice = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(twice[0], twice[1])
    torch.testing.assert_close(twice[0], whole[2])


def test_the_bias_is_not_rounded_to_the_scales_type():
    audio, text = pairs(9, 5, dtype=torch.float32)
    scale, ids = torch.tensor(8.0, dtype=torch.bfloat16), torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5])
    exact = sigmoid_loss(audio, text, 8.0, -9.3)
    assert torch.equal(sigmoid_loss(audio, text, scale, -9.3), exact)
    runs: list[dict[str, Any]] = [{}, {"ids": ids}, {"ids": ids, "duplicates": "positive"}]
    for options in runs:
        bias = torch.tensor(-9.3, requires_grad=True)
        mine, theirs = (
            torch.autograd.grad(sigmoid_loss(audio, text, each, bias, **options), bias)[0]
            for each in (scale, 8.0)
        )
        assert torch.equal(mine, theirs), options


def test_float16_has_what_a_gradient_scaler_multiplies_by(device):
    narrow = [x.to(device, torch.float16) for x in pairs(64, 16, dtype=torch.float32)]
    wide = [x.double() for x in narrow]
    for loss_scale in (0.37, 65536.0):  # 65536 is not a number of float16
        found, exact = (
            torch.autograd.grad(loss_scale * sigmoid_loss(a, t, 10.0, -6.0), (a, t))
            for a, t in ([x.requires_grad_() for x in each] for each in (narrow, wide))
        )
        for mine, theirs in zip(found, exact, strict=True):
            error = (mine.double() - theirs).abs().max().item()
            assert error <= torch.finfo(torch.float16).eps * theirs.abs().max().item(), loss_scale


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_its_op_is_a_proper_operator_of_transposed_inputs(wanted, device):
    x, y = (v.to(device).T.contiguous().T for v in pairs(9, 5, dtype=torch.float32))
    numbers = (torch.tensor(v, device=device) for v in (10.0, -6.0, 1.0))
    given = x, y, *numbers, None, None, 0, *wanted, "ieee", None
    torch.library.opcheck(torch.ops.flap_kernels.sigmoid_block.default, given)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_numbers_that_are_not_floating_are_refused(name):
    given: Any = {"scale": 10.0, "bias": -9.5} | {name: torch.tensor(10)}
    with pytest.raises(TypeError, match=rf"^{name} must be float32, .*, got torch.int64$"):
        sigmoid_loss(*pairs(4, 3), **given)


def check_digits(scale, bias, device):
    # At scale 40, pairs that are the same and nothing else alike: all terms are e^-20.
    apart = (torch.eye(64), torch.eye(64))
    both = apart if scale == 40 else pairs(64, 16, dtype=torch.float32)
    audio, text = (x.to(device) for x in both)
    found = loss_and_gradients(sigmoid_loss, audio, text, scale, bias)
    exact = loss_and_gradients(sigmoid_loss_reference, audio.double(), text.double(), scale, bias)
    for name, mine, theirs in zip(NAMES, found, exact, strict=True):
        # A logit of 100 is known to 4e-6.
        budget = 1e-6 * max(1.0, scale / 20) * theirs.abs().max().item()
        error = (mine.double() - theirs).abs().max().item()
        assert error <= budget, f"{name}: error {error:.1e} over {budget:.1e}"


@pytest.mark.parametrize(
    ("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (40.0, -20.0), (100.0, -60)]
)
def test_a_loss_of_tiny_and_of_large_terms_keeps_its_digits(scale, bias, device):
    check_digits(scale, bias, device)


def test_the_loss_of_tiny_terms_finds_a_plain_logarithm(kernel_device, monkeypatch, tmp_path):
    """e^-20 beside 1 is lost in log(1 + x)."""
    right, wrong = "tl.where(rounded == 0.0, e, ", "(0.0 * e + "
    put_in(Fault("", "sigmoid_loss", sigmoid_kernel, right, wrong), monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="loss: error"):
        check_digits(40.0, -20.0, kernel_device)


@pytest.mark.parametrize("ids", [0, 1, 2], ids=["all", "by one id", "by two"])
@pytest.mark.parametrize(("M", "N", "offset"), [*BLOCKS, (40, 70, 70)])
def test_kernel_has_the_sums_of_plain_pytorch(M, N, offset, ids, kernel_device):
    if offset == N:  # a block without positives
        x, y, scale, targets = block(M, N, 0, kernel_device, ids)
        targets = Targets(N, targets.x_ids, targets.y_ids)
    else:
        x, y, scale, targets = block(M, N, offset, kernel_device, ids)
    bias, factor = (torch.tensor(v, device=kernel_device) for v in (-9.0, 0.25))
    exact = TorchTiled().sigmoid(
        x.double(), y.double(), scale.double(), bias.double(), factor.double(), targets
    )
    for small in (None, 0.02):
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            found = TritonTiled(workspace_mib=small).sigmoid(
                x, y, scale, bias, factor, targets, x_wanted=wanted[0], y_wanted=wanted[1]
            )
            given = (True, *wanted, any(wanted), any(wanted))
            for mine, theirs, want in zip(found, exact, given, strict=True):
                if want:
                    assert mine is not None
                    assert theirs is not None
                    largest = theirs.abs().max().item()
                    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5 * largest)
                else:
                    assert mine is None or mine.item() == 0


def compared(audio, text, ids, cuts, runs):
    """On one rank: this rank's loss and gradients against the whole's, for each run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(cuts[rank], cuts[rank + 1])
    for options in runs:
        shared: dict[str, Any] = {k: v for k, v in options.items() if k != "scheme"}
        own = dict(options)
        if "duplicates" in options:
            own["ids"], shared["ids"] = ids[mine], ids
        found = loss_and_gradients(sigmoid_loss, audio[mine], text[mine], **own)
        exact = loss_and_gradients(sigmoid_loss_reference, audio, text, **shared)
        averages = torch.stack(found[3:])
        dist.all_reduce(averages)
        parts = [found[0], found[1] / world, found[2] / world, *(averages / world)]
        wholes = [exact[0], exact[1][mine], exact[2][mine], *exact[3:]]
        assert_same(parts, wholes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_match_the_whole(cuts):
    runs = [
        {"scheme": scheme, **shared}
        for scheme in SCHEMES
        for shared in ({}, *({"duplicates": each} for each in DUPLICATES))
    ]
    on_ranks(len(cuts) - 1, compared, *pairs(cuts[-1], 8), ids_of(cuts[-1]), cuts, runs)


def extra_captions_match_whole(audio, text, ids, audio_cuts, text_cuts, order):
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(audio_cuts[rank], audio_cuts[rank + 1])
    part = slice(text_cuts[rank], text_cuts[rank + 1])
    for masked in (False, True):
        whole_ids, own_ids = (ids[order], ids[part]) if masked else (None, None)
        exact = loss_and_gradients(sigmoid_loss_reference, audio, text[order], ids=whole_ids)
        text_grad = torch.empty_like(text)
        text_grad[order] = exact[2]
        for scheme in SCHEMES:
            options = {"scheme": scheme, "ids": own_ids}
            found = loss_and_gradients(sigmoid_loss, audio[mine], text[part], **options)
            averages = torch.stack(found[3:])
            dist.all_reduce(averages)
            parts = [found[0], found[1] / world, found[2] / world, *(averages / world)]
            wholes = [exact[0], exact[1][mine], text_grad[part], *exact[3:]]
            assert_same(parts, wholes, rtol=1e-12, atol=1e-14)


def test_extra_captions_of_all_ranks_are_pairs_of_no_clip():
    audio, text = pairs(9, 4)
    order = torch.tensor([0, 1, 2, 4, 5, 3, 6, 7, 8])
    ids = torch.tensor([0, 1, 2, 4, 1, 5, 2, 6, 4])
    on_ranks(2, extra_captions_match_whole, audio[:5], text, ids, (0, 3, 5), (0, 4, 9), order)
