"""InfoNCE's kernels on a rank's block of the logits: the plain path says what they must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flap_kernels import KERNELS
from flap_kernels import infonce_chunks as chunks
from flap_kernels import infonce_launch as launches
from tests.kernels.test_every_kernel import check_contract, strided
from tests.kernels.test_infonce import pairs

# Rows, columns, offset: a rank's share, one with extra captions, one row, more rows than columns.
BLOCKS = [(40, 150, 70), (33, 65, 0), (1, 70, 69), (90, 90, 0)]


def block(M, N, offset, device, ids, dtype=torch.float32):
    """Rows, columns and what else both paths take of a block."""
    x, y = (v.to(device, dtype) for v in pairs(N, 20))
    x = x[offset : offset + M].contiguous()
    keep: dict[str, Any] = {"offset": offset}
    if ids:
        groups = torch.arange(N, device=device) % 11
        keep |= {"x_ids": groups[offset : offset + M].contiguous(), "y_ids": groups}
    return x, y, torch.tensor(25.0, device=device), keep


@pytest.mark.parametrize("ids", [False, True], ids=["all", "grouped"])
@pytest.mark.parametrize(("M", "N", "offset"), BLOCKS)
def test_block_has_the_sums_and_gradients_of_the_plain_path(M, N, offset, ids, kernel_device):
    x, y, scale, keep = block(M, N, offset, kernel_device, ids)
    for rows, columns in ((True, True), (True, False), (False, True)):
        wanted: dict[str, Any] = {"rows": rows, "columns": columns, **keep}
        found = launches.negatives(x, y, scale, **wanted)
        exact = chunks.negatives(x.double(), y.double(), scale.double(), **wanted)
        sides = []
        for mine, theirs in ((found.rows, exact.rows), (found.columns, exact.columns)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5)
                sides.append(chunks.Side(theirs, torch.linspace(0.1, 0.9, len(theirs)).to(theirs)))
            else:
                sides.append(None)
        torch.testing.assert_close(found.positives.double(), exact.positives, rtol=1e-6, atol=1e-5)
        factor = torch.tensor(0.25, device=x.device)
        narrow = [
            None if side is None else chunks.Side(side.negatives.float(), side.misses.float())
            for side in sides
        ]
        for back in ((True, True), (True, False), (False, True)):
            wanted = {"rows": back[0], "columns": back[1], **keep}
            mine = launches.gradients(x, y, scale, narrow[0], narrow[1], factor, **wanted)
            theirs = chunks.gradients(
                x.double(),
                y.double(),
                scale.double(),
                sides[0],
                sides[1],
                factor.double(),
                **wanted,
            )
            for one, two in zip(mine, theirs, strict=True):
                assert (one is None) == (two is None)
                if one is not None and two is not None:
                    largest = two.abs().max().item()
                    torch.testing.assert_close(one.double(), two, rtol=0, atol=1e-5 * largest)


def test_vectors_with_a_stride_give_what_dense_ones_do(kernel_device):
    """Sums that ranks exchange are columns of one matrix, and ids may be a table's."""
    x, y, scale, keep = block(40, 150, 70, kernel_device, ids=True)
    factor = torch.ones((), device=x.device)
    sides = [chunks.Side(*torch.rand(2, n, device=x.device)) for n in (40, 150)]
    ids = {name: keep[name] for name in ("x_ids", "y_ids")}

    def apart(v):
        return torch.stack([v, -v, v], dim=1)[:, 0]

    found = []
    for way in (torch.Tensor.contiguous, apart):
        strided: dict[str, Any] = keep | {name: way(v) for name, v in ids.items()}
        sums = launches.negatives(x, y, scale, **strided)
        row, column = (chunks.Side(way(s.negatives), way(s.misses)) for s in sides)
        found.append((sums.rows, *launches.gradients(x, y, scale, row, column, factor, **strided)))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_small_workspace_gives_what_a_large_one_does(kernel_device):
    x, y, scale, keep = block(150, 150, 0, kernel_device, ids=True)
    large = launches.negatives(x, y, scale, **keep)
    small = launches.negatives(x, y, scale, workspace_mib=0.005, **keep)
    assert large.rows is not None
    assert large.columns is not None
    # Rows are whole in each chunk; columns are added up in another order.
    torch.testing.assert_close(small.rows, large.rows, rtol=0, atol=0)
    torch.testing.assert_close(small.columns, large.columns, rtol=1e-6, atol=1e-6)
    row = chunks.Side(large.rows, torch.full_like(large.rows, 0.5))
    column = chunks.Side(large.columns, torch.full_like(large.columns, 0.5))
    factor = torch.ones((), device=x.device)
    whole = launches.gradients(x, y, scale, row, column, factor, **keep)
    parts = launches.gradients(x, y, scale, row, column, factor, workspace_mib=0.02, **keep)
    for one, two in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_workspace_is_bounded():
    # 1 MiB holds two rows of tiles of 128 here, or 100 rows that are cut to one tile.
    for most, lengths in ((256, [256, 256, 256, 232]), (100, [128] * 7 + [104])):
        spans = list(launches._chunks(1000, most, 128))
        assert [span.stop - span.start for span in spans] == lengths


def take_in_parts(monkeypatch):
    """Take a tile's columns a quarter at a time, as on chips with the widest tiles."""
    choose = launches.blocks
    monkeypatch.setattr(launches, "blocks", lambda *chip: replace(choose(*chip), PARTS=4))


def test_a_tile_taken_in_parts_keeps_the_contract(kernel_device, monkeypatch):
    take_in_parts(monkeypatch)
    infonce = KERNELS["infonce"]
    check_contract(infonce, "odd", torch.float32, kernel_device, draws=2, prepare=strided)


def test_a_tile_taken_in_parts_leaves_out_rows_of_one_id(kernel_device, monkeypatch):
    x, y, scale, keep = block(40, 150, 70, kernel_device, ids=True)
    row, column = (chunks.Side(x.new_zeros(n), x.new_ones(n)) for n in (40, 150))
    factor = torch.ones((), device=x.device)
    found = []
    for parts in (False, True):
        if parts:
            take_in_parts(monkeypatch)
        sums = launches.negatives(x, y, scale, **keep)
        gradients = launches.gradients(x, y, scale, row, column, factor, **keep)
        found.append((sums.rows, sums.columns, sums.positives, *gradients))
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_a_row_far_below_its_tile_is_summed_from_its_own_reference(
    parts, kernel_device, monkeypatch
):
    if parts:
        take_in_parts(monkeypatch)
    # Logits of 144 and -144 bits in one tile: a row, then a column, that one reference loses.
    for flip in (False, True):
        x = torch.ones(20, 1, device=kernel_device)
        y = torch.ones(20, 1, device=kernel_device)
        (y if flip else x)[3] = -1.0
        scale = torch.tensor(100.0, device=kernel_device)
        found = launches.negatives(x, y, scale, offset=0)
        exact = chunks.negatives(x.double(), y.double(), scale.double(), offset=0)
        for mine, theirs in ((found.rows, exact.rows), (found.columns, exact.columns)):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0, check_dtype=False)
