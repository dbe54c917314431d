"""Clips of different lengths end to end: every op gives what it gives of each clip alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flap_kernels import (
    PatchMask,
    draw_patch_mask,
    draw_ragged_patch_mask,
    gather_tokens,
    masked_mse,
    patch_embed,
    unshuffle_tokens,
)

STREAMS, SEED = (3, 4), 2**31 + 9
SAMPLES = torch.tensor([2**32 + 5, 0, 2**40 + 3, 7, 2**31])


@dataclass(frozen=True)
class Clips:
    """Columns of each clip and rows of all, and how many of them stay."""

    columns: tuple[int, ...]
    rows: int
    keep_columns: tuple[int, ...]
    keep_rows: int | None
    shared: bool = True

    @property
    def sample_index(self) -> Tensor:
        return SAMPLES[: len(self.columns)]

    def mask(self, device: str) -> PatchMask:
        counts = (self.columns, self.rows, self.keep_columns, self.keep_rows, self.shared)
        return draw_ragged_patch_mask(self.sample_index.to(device), SEED, STREAMS, *counts)

    def masks(self, device: str) -> list[PatchMask]:
        """Each clip's own, by the op of fixed batches."""
        return [
            draw_patch_mask(
                sample[None], SEED, STREAMS, (C, self.rows), k, self.keep_rows, self.shared
            )
            for sample, C, k in zip(
                self.sample_index.to(device), self.columns, self.keep_columns, strict=True
            )
        ]


BATCHES = {
    "one column beside 187": Clips((1, 187, 13, 13, 2), 8, (1, 149, 10, 10, 1), 6),
    "rows drawn for each column": Clips((1, 187, 13, 13, 2), 8, (1, 149, 10, 10, 1), 6, False),
    "1-D frames, some clips drop none": Clips((1, 5, 187), 8, (1, 5, 100), None),
    "1-D patches": Clips((8, 40, 1496), 1, (6, 24, 897), None),
    "all stay": Clips((3, 20), 5, (3, 20), 5),
    "one clip": Clips((17,), 3, (9,), 2),
    "one patch": Clips((1,), 1, (1,), None),
    "a clip of three minutes": Clips((2, 1125), 8, (1, 900), 6),
    "unsorted lengths": Clips((20, 3, 64, 1, 3), 4, (11, 1, 33, 1, 3), 3),
}
SMALL = Clips((1, 2, 7), 3, (1, 1, 4), 2, False)


@pytest.mark.parametrize("clips", BATCHES.values(), ids=BATCHES)
def test_a_ragged_mask_is_the_clips_own_masks_end_to_end(clips, device):
    ids_keep, ids_drop, first = [], [], 0
    for own, C in zip(clips.masks(device), clips.columns, strict=True):
        ids_keep.append(own.ids_keep + first)
        ids_drop.append(own.ids_drop + first)
        first += C * clips.rows
    keep, drop = torch.cat(ids_keep, 1), torch.cat(ids_drop, 1)
    found = clips.mask(device)
    assert torch.equal(found.ids_keep, keep)
    assert torch.equal(found.ids_drop, drop)
    order = torch.cat([keep, drop], 1)
    assert found.ids_restore.shape == (1, first)
    assert torch.equal(order.gather(1, found.ids_restore), torch.arange(first, device=device)[None])


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return normal


def test_each_clip_is_embedded_restored_and_compared_as_alone(draw, device):
    clips, P, D = SMALL, 4, 10
    patches = [C * clips.rows for C in clips.columns]
    mel, mask = draw(1, sum(clips.columns) * P, clips.rows * P), clips.mask(device)
    number = torch.cat([torch.arange(N, device=device) for N in patches])[None]
    weight, bias, position = draw(D, P * P), draw(D), draw(30, D)
    token, added, back, shift = draw(D), draw(30, D), draw(P * P, D), draw(P * P)
    masks = clips.masks(device)
    count = [own.ids_drop.shape[1] for own in masks]
    row_weight = torch.cat([torch.full((1, M), 1 / (3 * M)) for M in count], 1).to(device)

    kept = patch_embed(mel, mask.ids_keep, weight, bias, position, number.gather(1, mask.ids_keep))
    full = unshuffle_tokens(kept, mask.ids_restore, token, added, number)
    hidden = gather_tokens(full, mask.ids_drop)
    loss = masked_mse(hidden, back, shift, mel, mask.ids_drop, row_weight, norm_pix=True)

    mels = mel.split([C * P for C in clips.columns], 1)
    embedded, restored, losses = [], [], []
    for own, own_mel, N in zip(masks, mels, patches, strict=True):
        embedded.append(patch_embed(own_mel, own.ids_keep, weight, bias, position[:N]))
        restored.append(unshuffle_tokens(embedded[-1], own.ids_restore, token, added[:N]))
        dropped = gather_tokens(restored[-1], own.ids_drop)
        losses.append(masked_mse(dropped, back, shift, own_mel, own.ids_drop, norm_pix=True))
    torch.testing.assert_close(kept, torch.cat(embedded, 1))
    torch.testing.assert_close(full, torch.cat(restored, 1))
    torch.testing.assert_close(loss, sum(losses) / 3)


def test_no_clips_give_an_empty_mask(device):
    sample_index = torch.empty(0, dtype=torch.int64, device=device)
    mask = draw_ragged_patch_mask(sample_index, SEED, STREAMS, [], 3, [], 2, True)
    assert [x.shape for x in mask] == [(1, 0)] * 3


def test_a_ragged_mask_without_data_has_its_sizes():
    meta = SAMPLES[:3].to("meta")
    counts = (SMALL.columns, SMALL.rows, SMALL.keep_columns, SMALL.keep_rows, SMALL.shared)
    mask = draw_ragged_patch_mask(meta, SEED, STREAMS, *counts)
    assert [x.shape for x in mask] == [(1, 12), (1, 18), (1, 30)]
    assert {x.device.type for x in mask} == {"meta"}


def test_sample_index_may_be_narrow_and_strided(device):
    narrow = torch.tensor([[5, -1], [9, -1]], dtype=torch.int32, device=device)[:, 0]
    for found, expected in zip(
        draw_ragged_patch_mask(narrow, 3, STREAMS, (7, 2), 3, (4, 1), 2, True),
        draw_ragged_patch_mask(narrow.long(), 3, STREAMS, (7, 2), 3, (4, 1), 2, True),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_compiles_whole(device):
    def draw(sample_index: Tensor) -> PatchMask:
        counts = (SMALL.columns, SMALL.rows, SMALL.keep_columns, SMALL.keep_rows, SMALL.shared)
        return draw_ragged_patch_mask(sample_index, SEED, STREAMS, *counts)

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    sample_index = SMALL.sample_index.to(device)
    for found, expected in zip(compiled(sample_index), draw(sample_index), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_index": torch.zeros(2)}, "sample_index must be int32 or int64"),
        ({"sample_index": torch.zeros(2, 1, dtype=torch.int64)}, r"sample_index must be \(B,\)"),
        ({"columns": (7,)}, "columns must have a count for each of 2 clips, got 1"),
        ({"keep_columns": (4, 1, 1)}, "keep_columns must have a count for each of 2 clips, got 3"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"keep_columns": (4, 3)}, r"keep_columns must be in \[1, 2\] for clip 1, got 3"),
        ({"keep_columns": (0, 1)}, r"keep_columns must be in \[1, 7\] for clip 0, got 0"),
        ({"columns": (7, 0)}, "columns must be at least 1, got 0 for clip 1"),
        ({"keep_rows": 4}, r"keep_rows must be None or in \[1, 3\], got 4"),
        ({"streams": (3, -1)}, "streams must be in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    arguments = {
        "sample_index": torch.zeros(2, dtype=torch.int64),
        "seed": 0,
        "streams": STREAMS,
        "columns": (7, 2),
        "rows": 3,
        "keep_columns": (4, 1),
        "keep_rows": 2,
        "shared": True,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        draw_ragged_patch_mask(**{**arguments, **change})
