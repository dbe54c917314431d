"""draw_patch_mask: the same draws as the trainer's, bit for bit, wherever they are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flap_fast.config import Mask
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.model.masking import kept, patch_mask
from flap_kernels import PatchMask, draw_patch_mask
from flap_kernels.philox import philox_words

STREAMS = (int(Stream.MASK), int(Stream.MASK_INNER))
SAMPLES = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**40 + 3])
MASKS = {
    "1-D patches": Mask(kind="1d", ratio=0.4),
    "1-D frames": Mask(kind="1d", ratio=0.4, unit="frame"),
    "2-D": Mask(kind="2d", time_ratio=0.3, freq_ratio=0.4),
    "2-D, rows drawn for each column": Mask(kind="2d", shared_inner=False),
}


def wanted(mask: Mask, grid: tuple[int, int], seed: int, sample_index: torch.Tensor) -> np.ndarray:
    """(B, N) bool: what stays, counted in NumPy from the trainer's uniforms."""
    C, R = grid

    def lowest(stream: Stream, count: int, ratio: float, axes: tuple[int, ...]) -> np.ndarray:
        noise = (
            uniforms(seed, stream, sample_index.cpu(), count)
            .numpy()
            .reshape(len(sample_index), *axes)
        )
        order = np.argsort(noise, axis=-1, kind="stable")[..., : kept(axes[-1], ratio, "floor")]
        stay = np.zeros(noise.shape, bool)
        np.put_along_axis(stay, order, True, -1)
        return stay

    if mask.kind == "2d":
        columns = lowest(Stream.MASK, C, mask.time_ratio, (C,))
        inner = (R, (1, R)) if mask.shared_inner else (C * R, (C, R))
        stay = columns[:, :, None] & lowest(Stream.MASK_INNER, inner[0], mask.freq_ratio, inner[1])
    elif mask.unit == "frame":
        stay = np.repeat(lowest(Stream.MASK, C, mask.ratio, (C,)), R, axis=1)
    else:
        stay = lowest(Stream.MASK, C * R, mask.ratio, (C * R,))
    return stay.reshape(len(sample_index), C * R)


def planned(mask: Mask, grid: tuple[int, int], seed: int, sample_index: torch.Tensor) -> PatchMask:
    """The mask that the settings give, held to what is wanted."""
    found = patch_mask(mask, grid, seed, sample_index)
    assert found is not None
    assert mask.rounding == "floor"
    for stay, ids_keep, ids_drop, ids_restore in zip(
        wanted(mask, grid, seed, sample_index), *found, strict=True
    ):
        assert ids_keep.tolist() == np.flatnonzero(stay).tolist()
        assert ids_drop.tolist() == np.flatnonzero(~stay).tolist()
        order = torch.cat([ids_keep, ids_drop])
        assert torch.equal(order[ids_restore], torch.arange(len(stay), device=order.device))
    return found


def test_words_are_the_published_ones():
    # Random123's known answers for philox4x32-10 with key and counter zero, less 8 bits.
    found = philox_words(0, 0, torch.zeros(1, dtype=torch.int64), 4)
    assert found.tolist() == [[0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]]


@pytest.mark.parametrize("seed", [0, 2**31 + 7, 2**40 + 5])
def test_words_are_the_trainers_uniforms(seed):
    words = philox_words(seed, Stream.MASK, SAMPLES, 13)
    assert torch.equal(words.float() * 2.0**-24, uniforms(seed, Stream.MASK, SAMPLES, 13))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("grid", [(1, 1), (7, 3), (64, 8)], ids=str)
def test_what_stays_is_what_the_uniforms_say(mask, grid, device):
    planned(mask, grid, 2**31 + 9, SAMPLES[3:].to(device))


def test_a_tie_goes_to_the_smaller_index(device):
    # Of 512 numbers of 24 bits, ranks 306 and 307 are equal for this sample: patches 79 and 423.
    sample_index = torch.tensor([61281], device=device)
    ids_keep, ids_drop, _ = planned(MASKS["1-D patches"], (64, 8), 0, sample_index)
    assert 79 in ids_keep[0]
    assert 423 in ids_drop[0]


def test_a_tie_of_rows_goes_to_the_smaller_index(device):
    # Of the 8 rows of column 42, ranks 5 and 6 are equal for this sample: rows 5 and 7.
    sample_index = torch.tensor([70429], device=device)
    ids_keep, ids_drop, _ = planned(
        MASKS["2-D, rows drawn for each column"], (64, 8), 0, sample_index
    )
    assert 8 * 42 + 5 in ids_keep[0]
    assert 8 * 42 + 7 in ids_drop[0]


def test_sample_index_may_be_narrow_and_strided(device):
    narrow = torch.tensor([[5, -1], [9, -1]], dtype=torch.int32, device=device)[:, 0]
    for found, expected in zip(
        draw_patch_mask(narrow, 3, STREAMS, (7, 3), 4, 2, True),
        draw_patch_mask(narrow.long(), 3, STREAMS, (7, 3), 4, 2, True),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_no_samples_give_an_empty_mask(device):
    sample_index = torch.empty(0, dtype=torch.int64, device=device)
    ids_keep, ids_drop, ids_restore = draw_patch_mask(sample_index, 3, STREAMS, (7, 3), 4, 2, True)
    assert (ids_keep.shape, ids_drop.shape, ids_restore.shape) == ((0, 8), (0, 13), (0, 21))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_index": torch.zeros(2)}, "sample_index must be int32 or int64"),
        ({"sample_index": torch.zeros(2, 1, dtype=torch.int64)}, r"sample_index must be \(B,\)"),
        ({"grid": (0, 3)}, "grid must be of at least one patch each way"),
        ({"columns": 8}, r"columns must be in \[1, 7\], got 8"),
        ({"columns": 0}, r"columns must be in \[1, 7\], got 0"),
        ({"rows": 0}, r"rows must be None or in \[1, 3\], got 0"),
        ({"streams": (3, -1)}, "streams must be in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    arguments = {
        "sample_index": torch.zeros(2, dtype=torch.int64),
        "seed": 0,
        "streams": STREAMS,
        "grid": (7, 3),
        "columns": 4,
        "rows": 2,
        "shared": True,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        draw_patch_mask(**{**arguments, **change})
