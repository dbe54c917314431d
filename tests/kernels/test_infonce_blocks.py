"""InfoNCE's kernels on a rank's block of the logits: `torch_tiled` says what they must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_type

import pytest
import torch
from torch import Tensor

from flap_kernels import KERNELS
from flap_kernels.infonce import triton_launch, triton_tiles
from flap_kernels.infonce.arguments import choose_backend
from flap_kernels.infonce.backend import BlockSums, DirectionSums, Targets, TileBackend
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.infonce.triton_launch import TritonTiled
from flap_kernels.infonce.triton_tiles import chunks_of
from tests.kernels.test_every_kernel import check_as_exact, strided
from tests.kernels.test_infonce import pairs

# Rows, columns, offset: a rank's rows, one with extra captions, one row, more rows than columns.
BLOCKS = [(40, 150, 70), (33, 65, 0), (1, 70, 69), (90, 90, 0)]
TORCH, TRITON = TorchTiled(), TritonTiled()


def block(M, N, offset, device, ids, dtype=torch.float32):
    """What both backends take of a block: rows, columns, scale and targets."""
    x, y = (v.to(device, dtype) for v in pairs(N, 20))
    x = x[offset : offset + M].contiguous()
    targets = Targets(offset)
    if ids:
        row = torch.arange(N, device=device)
        groups = torch.stack([row % 11, row // 3 % 13], dim=1)[:, :ids]
        targets = Targets(offset, groups[offset : offset + M], groups)
    return x, y, torch.tensor(25.0, device=device), targets


def in_float64(x, y, scale) -> BlockSums:
    return TORCH.sums(x.double(), y.double(), scale.double(), Targets())


def in_float32(sums: DirectionSums | None) -> DirectionSums | None:
    if sums is None:
        return None
    return DirectionSums(sums.lse_negatives.float(), sums.one_minus_p.float())


@pytest.mark.parametrize("ids", [0, 1, 2], ids=["all", "by one id", "by two"])
@pytest.mark.parametrize(("M", "N", "offset"), BLOCKS)
def test_kernels_have_the_sums_and_gradients_of_plain_pytorch(M, N, offset, ids, kernel_device):
    x, y, scale, targets = block(M, N, offset, kernel_device, ids)
    doubles = x.double(), y.double(), scale.double()
    for rows, columns in ((True, True), (True, False), (False, True)):
        found = TRITON.sums(x, y, scale, targets, rows=rows, columns=columns)
        exact = TORCH.sums(*doubles, targets, rows=rows, columns=columns)
        directions: list[DirectionSums | None] = []
        for mine, theirs in (
            (found.row_lse_negatives, exact.row_lse_negatives),
            (found.column_lse_negatives, exact.column_lse_negatives),
        ):
            assert (mine is None) == (theirs is None)
            if mine is None or theirs is None:
                directions.append(None)
                continue
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
            one_minus_p = torch.linspace(0.1, 0.9, len(theirs)).to(theirs)
            directions.append(DirectionSums(theirs, one_minus_p))
        torch.testing.assert_close(
            found.positive_logits.double(), exact.positive_logits, rtol=1e-6, atol=1e-5
        )
        factor = torch.tensor(0.25, device=x.device)
        narrow = [in_float32(sums) for sums in directions]
        for x_wanted, y_wanted in ((True, True), (True, False), (False, True)):
            wanted: dict[str, Any] = {"x_wanted": x_wanted, "y_wanted": y_wanted}
            mine = TRITON.gradients(x, y, scale, narrow[0], narrow[1], factor, targets, **wanted)
            theirs = TORCH.gradients(
                *doubles, directions[0], directions[1], factor.double(), targets, **wanted
            )
            for one, two in zip(mine, theirs, strict=True):
                assert (one is None) == (two is None)
                if one is not None and two is not None:
                    largest = two.abs().max().item()
                    torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5 * largest)


def test_the_gradient_of_the_scale_has_a_type_from_the_op_to_the_kernel():
    """Checked by pyright: with an Any on the way, `assert_type` is an error there."""
    x = torch.eye(2)
    backend = choose_backend(x, "ieee", None)
    assert_type(backend, TileBackend)
    sums = DirectionSums(torch.zeros(2), torch.ones(2))
    found = backend.gradients(x, x, torch.ones(()), sums, None, torch.ones(()), Targets())
    assert_type(found.scale, Tensor)
    for every in (TORCH, TRITON):
        backend: TileBackend = every
        assert callable(backend.gradients)
    # S = I log2(e): off the diagonal 2^0 weighs cosines of 0; the positives have -1 each.
    assert found.scale.item() == -2


def test_vectors_with_a_stride_give_what_dense_ones_do(kernel_device):
    """Sums that ranks exchange are columns of one matrix, and ids may be a table's."""
    x, y, scale, targets = block(40, 150, 70, kernel_device, ids=2)
    factor = torch.ones((), device=x.device)
    directions = [DirectionSums(*torch.rand(2, n, device=x.device)) for n in (40, 150)]

    def apart(v: Tensor) -> Tensor:
        return torch.stack([v, -v, v], dim=-1)[..., 0]

    found = []
    x_ids, y_ids = targets.x_ids, targets.y_ids
    assert x_ids is not None
    assert y_ids is not None
    for layout in (torch.Tensor.contiguous, apart):
        laid = Targets(targets.offset, layout(x_ids), layout(y_ids))
        sums = TRITON.sums(x, y, scale, laid)
        row, column = (
            DirectionSums(layout(s.lse_negatives), layout(s.one_minus_p)) for s in directions
        )
        gradients = TRITON.gradients(x, y, scale, row, column, factor, laid)
        found.append((sums.row_lse_negatives, *gradients))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_small_workspace_gives_what_a_large_one_does(kernel_device):
    x, y, scale, targets = block(150, 150, 0, kernel_device, ids=2)
    large = TRITON.sums(x, y, scale, targets)
    small = TritonTiled(workspace_mib=0.005).sums(x, y, scale, targets)
    assert large.row_lse_negatives is not None
    assert large.column_lse_negatives is not None
    # Rows are whole in each chunk; columns are added up in another order.
    torch.testing.assert_close(small.row_lse_negatives, large.row_lse_negatives, rtol=0, atol=0)
    torch.testing.assert_close(
        small.column_lse_negatives, large.column_lse_negatives, rtol=1e-6, atol=1e-6
    )
    row, column = (
        DirectionSums(lse, torch.full_like(lse, 0.5))
        for lse in (large.row_lse_negatives, large.column_lse_negatives)
    )
    factor = torch.ones((), device=x.device)
    whole = TRITON.gradients(x, y, scale, row, column, factor, targets)
    chunked = TritonTiled(workspace_mib=0.02).gradients(x, y, scale, row, column, factor, targets)
    for one, two in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_workspace_is_bounded():
    # 1 MiB holds two rows of tiles of 128 here, or 100 rows that are cut to one tile.
    for most, lengths in ((256, [256, 256, 256, 232]), (100, [128] * 7 + [104])):
        spans = list(chunks_of(1000, most, 128))
        assert [span.stop - span.start for span in spans] == lengths


@pytest.mark.parametrize(
    ("M", "N", "dtype", "parts"),
    [
        (4608, 4608, torch.bfloat16, (4608, 4608)),
        (65_536, 65_536, torch.bfloat16, (8192, 16_384)),
        (65_536, 65_536, torch.float32, (8192, 8192)),
        (1024, 65_536, torch.bfloat16, (1024, 65_536)),
    ],
)
def test_dlogits_are_in_parts_that_fill_a_gpu(M, N, dtype, parts):
    tile = triton_launch.tile_shape(90, dtype, "tf32", "dlogits")
    rows, columns = triton_tiles.dlogits_parts(M, N, dtype, tile, None)
    assert (rows[0].stop, columns[0].stop) == parts
    assert rows[-1].stop == M
    assert columns[-1].stop == N
    # Tiles of 128 x 256 of the gradients, 512 wide, for 132 multiprocessors: no fewer than 0.9.
    if M == N == 65_536:
        assert parts[0] // 128 * (512 // 256) >= 0.9 * 132


def take_in_slabs(monkeypatch):
    """Take a tile's columns a quarter at a time, as on chips with the largest tiles."""
    choose = triton_launch.tile_shape
    monkeypatch.setattr(triton_launch, "tile_shape", lambda *chip: replace(choose(*chip), SLABS=4))


def test_a_tile_taken_in_slabs_is_as_exact(kernel_device, monkeypatch):
    take_in_slabs(monkeypatch)
    infonce = KERNELS["infonce"]
    check_as_exact(infonce, "odd", torch.float32, kernel_device, draws=2, prepare=strided)


def test_a_tile_taken_in_slabs_leaves_out_rows_of_one_id(kernel_device, monkeypatch):
    x, y, scale, targets = block(40, 150, 70, kernel_device, ids=2)
    row, column = (DirectionSums(x.new_zeros(n), x.new_ones(n)) for n in (40, 150))
    factor = torch.ones((), device=x.device)
    found = []
    for slabs in (False, True):
        if slabs:
            take_in_slabs(monkeypatch)
        sums = TRITON.sums(x, y, scale, targets)
        gradients = TRITON.gradients(x, y, scale, row, column, factor, targets)
        found.append(
            (sums.row_lse_negatives, sums.column_lse_negatives, sums.positive_logits, *gradients)
        )
    for whole, slabbed in zip(*found, strict=True):
        torch.testing.assert_close(slabbed, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("slabs", [False, True], ids=["whole", "slabs"])
def test_a_row_far_below_its_tile_is_summed_from_its_own_reference(
    slabs, kernel_device, monkeypatch
):
    if slabs:
        take_in_slabs(monkeypatch)
    # Logits of 144 and -144 bits in one tile: a row, then a column, that one reference loses.
    for flip in (False, True):
        x = torch.ones(20, 1, device=kernel_device)
        y = torch.ones(20, 1, device=kernel_device)
        (y if flip else x)[3] = -1.0
        scale = torch.tensor(100.0, device=kernel_device)
        found, exact = TRITON.sums(x, y, scale, Targets()), in_float64(x, y, scale)
        for mine, theirs in (
            (found.row_lse_negatives, exact.row_lse_negatives),
            (found.column_lse_negatives, exact.column_lse_negatives),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0, check_dtype=False)
