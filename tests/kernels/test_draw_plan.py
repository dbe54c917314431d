"""draw_plan: the same draws as the trainer's, bit for bit, wherever they are made."""

from __future__ import annotations

import pytest
import torch

from flap_fast.config import Mask
from flap_fast.data.draws import Stream, uniforms
from flap_fast.model.masking import kept, mask_plan
from flap_kernels import draw_plan
from flap_kernels.draw_plan import Plan, _words

STREAMS = (int(Stream.MASK), int(Stream.MASK_INNER))
VISITS = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**40 + 3])
MASKS = {
    "1-D patches": Mask(kind="1d", ratio=0.4),
    "1-D frames": Mask(kind="1d", ratio=0.4, unit="frame"),
    "2-D": Mask(kind="2d", time_ratio=0.3, freq_ratio=0.4),
    "2-D, rows drawn for each column": Mask(kind="2d", shared_inner=False),
}


def drawn(mask: Mask, grid: tuple[int, int], seed: int, visits: torch.Tensor) -> Plan:
    """What `mask_plan` means, said in `draw_plan`'s arguments."""
    C, R = grid
    if mask.kind == "2d":
        columns = kept(C, mask.time_ratio, mask.rounding)
        rows = kept(R, mask.freq_ratio, mask.rounding)
        return draw_plan(visits, seed, STREAMS, grid, columns, rows, mask.shared_inner)
    grid = grid if mask.unit == "frame" else (C * R, 1)
    columns = kept(grid[0], mask.ratio, mask.rounding)
    return draw_plan(visits, seed, STREAMS, grid, columns, None, True)


def assert_same(mask: Mask, grid: tuple[int, int], seed: int, visits: torch.Tensor) -> None:
    expected, found = mask_plan(mask, grid, seed, visits), drawn(mask, grid, seed, visits)
    assert expected is not None
    assert torch.equal(found.keep, expected.keep)
    assert torch.equal(found.drop, expected.drop)
    assert torch.equal(found.restore, expected.restore)


def test_words_are_the_published_ones():
    # Random123's known answers for philox4x32-10 with key and counter zero, less 8 bits.
    found = _words(0, 0, torch.zeros(1, dtype=torch.int64), 4)
    assert found.tolist() == [[0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]]


@pytest.mark.parametrize("seed", [0, 2**31 + 7, 2**40 + 5])
def test_words_are_the_trainers_uniforms(seed):
    words = _words(seed, Stream.MASK, VISITS, 13)
    assert torch.equal(words.float() * 2.0**-24, uniforms(seed, Stream.MASK, VISITS, 13))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("grid", [(1, 1), (7, 3), (64, 8)], ids=str)
def test_plan_is_the_trainers(mask, grid, device):
    assert_same(mask, grid, 2**31 + 9, VISITS[3:].to(device))


def test_a_tie_goes_to_the_smaller_index(device):
    # Of 512 numbers of 24 bits, ranks 306 and 307 are equal for this visit: patches 79 and 423.
    visits = torch.tensor([61281], device=device)
    keep, drop, _ = drawn(MASKS["1-D patches"], (64, 8), 0, visits)
    assert 79 in keep[0]
    assert 423 in drop[0]
    assert_same(MASKS["1-D patches"], (64, 8), 0, visits)


def test_a_tie_of_rows_goes_to_the_smaller_index(device):
    # Of the 8 rows of column 42, ranks 5 and 6 are equal for this visit: rows 5 and 7.
    visits = torch.tensor([70429], device=device)
    keep, drop, _ = drawn(MASKS["2-D, rows drawn for each column"], (64, 8), 0, visits)
    assert 8 * 42 + 5 in keep[0]
    assert 8 * 42 + 7 in drop[0]
    assert_same(MASKS["2-D, rows drawn for each column"], (64, 8), 0, visits)


def test_visits_may_be_narrow_and_strided(device):
    narrow = torch.tensor([[5, -1], [9, -1]], dtype=torch.int32, device=device)[:, 0]
    for found, expected in zip(
        draw_plan(narrow, 3, STREAMS, (7, 3), 4, 2, True),
        draw_plan(narrow.long(), 3, STREAMS, (7, 3), 4, 2, True),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_no_visits_give_an_empty_plan(device):
    visits = torch.empty(0, dtype=torch.int64, device=device)
    keep, drop, restore = draw_plan(visits, 3, STREAMS, (7, 3), 4, 2, True)
    assert (keep.shape, drop.shape, restore.shape) == ((0, 8), (0, 13), (0, 21))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visits": torch.zeros(2)}, "visits must be int32 or int64"),
        ({"visits": torch.zeros(2, 1, dtype=torch.int64)}, r"visits must be \(B,\)"),
        ({"grid": (0, 3)}, "grid must be of at least one patch each way"),
        ({"columns": 8}, r"columns must be in \[1, 7\], got 8"),
        ({"columns": 0}, r"columns must be in \[1, 7\], got 0"),
        ({"rows": 0}, r"rows must be None or in \[1, 3\], got 0"),
        ({"streams": (3, -1)}, "streams must be in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    arguments = {
        "visits": torch.zeros(2, dtype=torch.int64),
        "seed": 0,
        "streams": STREAMS,
        "grid": (7, 3),
        "columns": 4,
        "rows": 2,
        "shared": True,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        draw_plan(**{**arguments, **change})
