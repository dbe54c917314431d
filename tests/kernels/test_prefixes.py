"""InfoNCE of prefixes of the embeddings: the sum of the prefixes' own losses, on every way."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from flap_kernels import distributed_infonce, infonce
from flap_kernels.infonce import infonce_reference, torch_prefixes
from flap_kernels.infonce.backend import Targets, losses_and_sums
from flap_kernels.infonce.prefixes import ByPrefix
from flap_kernels.infonce.torch_prefixes import TorchPrefixes
from flap_kernels.infonce.torch_tiled import TorchTiled
from tests.kernels.test_distributed_infonce import CUTS, SCHEMES, ids_of
from tests.kernels.test_infonce import DIRECTIONS, DUPLICATES, loss_and_gradients, pairs
from tests.kernels.test_infonce_blocks import BLOCKS, block
from tests.ranks import on_ranks

WIDTHS = {
    "nested": (3, 5, 12),
    "not the whole": (2, 7),
    "one": (4,),
    "the whole": (12,),
    "each": tuple(range(1, 13)),
}
NAMES = ("loss", "audio", "text", "scale")


def assert_same(found, exact, rtol=1e-11, atol=1e-13):
    for name, mine, theirs in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def rows(B, D=12, dtype=torch.float64):
    """Pairs that are not of length 1: prefixes are brought to it, the whole is not."""
    audio, text = pairs(B, D, dtype=dtype)
    length = torch.linspace(0.7, 1.3, B, dtype=dtype)[:, None]
    return audio * length, text / length


def check_against_autograd(B, widths, direction="symmetric", scale=20.0, **options):
    scale = torch.tensor(scale, dtype=torch.float64)
    options |= {"prefixes": widths, "direction": direction}
    exact = loss_and_gradients(infonce_reference, *rows(B), scale, **options)
    assert_same(loss_and_gradients(infonce, *rows(B), scale, **options), exact)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", [1, 2, 33, 700])
def test_float64_agrees_with_autograd(B, direction, widths):
    check_against_autograd(B, widths, direction)


@pytest.mark.parametrize("scale", [0.5, 90.0, 400.0])
def test_large_scales_are_summed_from_their_own_reference(scale):
    check_against_autograd(600, (4, 9, 12), scale=scale)


def test_weights_are_those_of_the_prefixes():
    audio, text = rows(9)
    loss = infonce(audio, text, 20.0, prefixes=(4, 12), prefix_weights=(0.25, 3.0))
    first = infonce(audio, text, 20.0, prefixes=(4,))
    whole = infonce(audio, text, 20.0)
    torch.testing.assert_close(loss, 0.25 * first + 3 * whole, rtol=1e-12, atol=0)
    check_against_autograd(33, (4, 12), prefix_weights=(0.25, 3.0))


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_with_shared_ids(duplicates):
    check_against_autograd(33, (4, 9, 12), ids=ids_of(33), duplicates=duplicates)


@pytest.mark.parametrize("direction", ["symmetric", "a2t"])
def test_with_extra_captions(direction):
    audio, text = rows(9)
    text = torch.cat([text, pairs(5, 12, seed=1)[1]])
    scale = torch.tensor(20.0, dtype=torch.float64)
    options = {"prefixes": (4, 12), "direction": direction}
    exact = loss_and_gradients(infonce_reference, audio, text, scale, **options)
    assert_same(loss_and_gradients(infonce, audio, text, scale, **options), exact)


def test_it_is_as_exact_in_float32(device):
    check_in_float32(40, device)


def test_many_rows_are_as_exact_in_float32():
    check_in_float32(700, "cpu")


def check_in_float32(B, device):
    audio, text = (x.to(device) for x in pairs(B, 24, dtype=torch.float32))
    scale = torch.tensor(14.3, device=device)
    options = {"prefixes": (6, 12, 24)}
    exact = loss_and_gradients(
        infonce_reference, audio.double(), text.double(), scale.double(), **options
    )
    found = loss_and_gradients(infonce, audio, text, scale, **options)
    for name, mine, theirs in zip(NAMES, found, exact, strict=True):
        budget = 1e-6 * (3 if mine.ndim else 1) * max(theirs.abs().max().item(), 1e-2)
        error = (mine.double() - theirs).abs().max().item()
        assert error <= budget, f"{name}: {error:.1e} over {budget:.1e}"


@pytest.mark.parametrize("ids", [0, 2], ids=["all", "by two ids"])
@pytest.mark.parametrize(("M", "N", "offset"), BLOCKS)
def test_one_pass_has_what_one_prefix_after_another_has(M, N, offset, ids):
    x, y, scale, targets = block(M, N, offset, "cpu", ids, torch.float64)
    scale, widths = scale.double(), (3, 4, 15, 20)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    backends = TorchPrefixes(widths, weights), ByPrefix(TorchTiled(), widths, weights)
    for by_row, by_column in ((True, True), (True, False), (False, True)):
        one, two = (
            each.sums(x, y, scale, targets, rows=by_row, columns=by_column) for each in backends
        )
        directions = []
        for mine, theirs in (
            (one.row_lse_negatives, two.row_lse_negatives),
            (one.column_lse_negatives, two.column_lse_negatives),
            (one.positive_logits, two.positive_logits),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        for lse in (two.row_lse_negatives, two.column_lse_negatives):
            if lse is None:
                directions.append(None)
                continue
            share = torch.rand(lse.shape, dtype=lse.dtype)
            directions.append(torch_prefixes.DirectionSums(lse, share))
        factor = torch.tensor(0.25).double()
        row, column = directions
        for x_wanted, y_wanted in ((True, True), (True, False), (False, True)):
            wanted: Any = {"x_wanted": x_wanted, "y_wanted": y_wanted}
            of_one, of_two = (
                each.gradients(x, y, scale, row, column, factor, targets, **wanted)
                for each in backends
            )
            for mine, theirs in zip(of_one, of_two, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_its_op_is_a_proper_operator():
    audio, text = (x.requires_grad_() for x in rows(9))
    op = torch.ops.flap_kernels.infonce.default
    for direction in DIRECTIONS:
        given = audio, text, torch.tensor(20.0).double().requires_grad_(), None, direction
        torch.library.opcheck(op, (*given, "ieee", None, [4, 12], [1.0, 2.0]))


@pytest.mark.parametrize("backend", ["in one pass", "by prefix"])
def test_its_gradients_are_contiguous_as_their_fakes_are(backend):
    x, y = (each.T.contiguous().T for each in rows(9))
    one = torch.ones((), dtype=x.dtype)
    made = TorchPrefixes((4, 12), None)
    if backend == "by prefix":
        made = ByPrefix(TorchTiled(), (4, 12), None)
    sums = made.sums(x, y, one, Targets())
    lse, positive = sums.row_lse_negatives, sums.positive_logits
    assert lse is not None
    row = losses_and_sums(lse, positive, one.new_ones(2))[1]
    found = made.gradients(x, y, one, row, None, one, Targets())
    assert all(each is not None and each.is_contiguous() for each in (found.x, found.y))


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_prefix_of_zeros_has_a_loss(dtype, duplicates):
    audio, text = rows(6, dtype=torch.float32)
    audio[0, :4] = 0
    audio, text = audio.to(dtype), text.to(dtype)
    options: Any = {"prefixes": (4, 12), "ids": torch.tensor([0, 0, 1, 2, 3, 4])}
    options["duplicates"] = duplicates
    near: Any = {"rtol": 1e-5, "atol": 0.0}
    exact = infonce_reference(audio.double(), text.double(), torch.tensor(90.0), **options)
    torch.testing.assert_close(infonce(audio, text, 90.0, **options).double(), exact, **near)


def test_the_flop_are_those_of_the_longest_prefix():
    audio, text = (torch.rand(6, 12, device="meta", requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        infonce(audio, text, 20.0, prefixes=(3, 5)).backward()
    assert counter.get_total_flops() == 4 * 2 * 6 * 6 * 5


@pytest.mark.parametrize("prefixes", [4, (2.5, 12)])
def test_prefixes_that_are_no_whole_numbers_are_refused(prefixes: Any):
    with pytest.raises(TypeError, match=r"^prefixes must be whole numbers, got "):
        infonce(*rows(5), 20.0, prefixes=prefixes)


def compared(audio, text, ids, cuts):
    """On one rank: this rank's loss and gradients against the whole's, for each run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(cuts[rank], cuts[rank + 1])
    scale = torch.tensor(20.0, dtype=audio.dtype)
    shared = ({}, *({"duplicates": each} for each in DUPLICATES))
    for direction in DIRECTIONS:
        for more in shared:
            options: dict[str, Any] = {"prefixes": (3, 8), "prefix_weights": (0.5, 1.0)}
            options |= {"direction": direction, **more}
            whole = {"ids": ids} if more else {}
            exact = loss_and_gradients(infonce_reference, audio, text, scale, **options, **whole)
            own = {"ids": ids[mine]} if more else {}
            for scheme in SCHEMES:
                found = loss_and_gradients(
                    distributed_infonce,
                    audio[mine],
                    text[mine],
                    scale,
                    scheme=scheme,
                    **options,
                    **own,
                )
                average = found[3].clone()
                dist.all_reduce(average)
                parts = [found[0], found[1] / world, found[2] / world, average / world]
                assert_same(parts, [exact[0], exact[1][mine], exact[2][mine], exact[3]])


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_match_the_whole(cuts):
    on_ranks(len(cuts) - 1, compared, *rows(cuts[-1], 8), ids_of(cuts[-1]), cuts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefixes": (4, 2)}, r"prefixes must be ascending and in \[1, 3\], got \(4, 2\)"),
        ({"prefixes": (0, 2)}, "prefixes must be ascending"),
        ({"prefixes": (2, 4)}, "prefixes must be ascending"),
        (
            {"prefixes": (2, 3), "prefix_weights": (1.0,)},
            "prefix_weights must be one for each of 2",
        ),
        (
            {"prefixes": (2, 3), "prefix_weights": (1.0, float("nan"))},
            "prefix_weights must be numbers of at least 0",
        ),
    ],
)
def test_what_does_not_fit_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        infonce(*pairs(4, 3), 1.0, **options)


FAULTS = {
    "norms forgotten": (torch_prefixes._PrefixBlock, "is_whole", lambda self, k: True),
    "the norms' gradient forgotten": (
        torch_prefixes._PrefixBlock,
        "of_norms",
        lambda self, rows, dots, norms: torch.zeros_like(rows),
    ),
    "weights forgotten": (
        sys.modules["flap_kernels.infonce.op"],
        "check_prefixes",
        lambda widths, weights, D: (tuple(widths), (1.0,) * len(widths)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_these_tests_find(fault, monkeypatch):
    where, name, wrong = fault
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_against_autograd(33, (4, 9, 12), prefix_weights=(0.5, 1.0, 2.0))
