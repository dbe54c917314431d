"""draw_ragged_patch_mask: the kept patches of clips of different lengths, laid end to end.

    mask[b]           = draw_patch_mask of clip b alone, of C[b] columns of R rows
    ids_keep          = cat over b of  ids_keep[b] + first[b],      ids_drop likewise
    ids_restore       = the index of each patch in cat(ids_keep, ids_drop)
    first[b]          = R * (C[0] + ... + C[b - 1])

    B clips   C[b] columns (time) of clip b   R rows (frequency)   N patches of all clips
    K kept patches of all clips

So numbered, the patches are those of one long clip, and every op that takes (B, N) takes the batch
as (1, N). The kernel is that of `draw_patch_mask`: a program draws a clip, with its counts from a
small table.

Least traffic: B sample indices and 4 * B counts read, 2 * N indices written, of 8 bytes each.
Source: as for `draw_patch_mask`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flap_kernels.checks import check_integers, check_shape
from flap_kernels.launch import runs_triton
from flap_kernels.patch_mask import Indices, PatchMask, empty_mask, launch, lowest
from flap_kernels.philox import LOW, philox_words
from flap_kernels.spec import Inputs, Kernel, Size


def draw_ragged_patch_mask_reference(
    sample_index: Tensor,
    seed: int,
    streams: tuple[int, int],
    columns: Sequence[int],
    rows: int,
    keep_columns: Sequence[int],
    keep_rows: int | None,
    shared: bool,
) -> PatchMask:
    """The reference of `draw_ragged_patch_mask`: one sort of all clips' patches."""
    C, k = torch.tensor([columns, keep_columns], device=sample_index.device)
    longest, K = max(columns), sum(keep_columns) * (keep_rows or rows)
    exists = torch.arange(longest, device=C.device) < C[:, None]
    # A column that a clip does not have gets a word above all others.
    words = philox_words(seed, streams[0], sample_index, longest).where(exists, LOW)
    stay = lowest(words, k[:, None])[:, :, None].expand(-1, -1, rows)
    if keep_rows is not None:
        words = philox_words(seed, streams[1], sample_index, rows if shared else longest * rows)
        stay = stay & lowest(words.unflatten(1, (-1, rows)), keep_rows)
    # The columns of all clips, end to end: the clip of each, and its number there.
    b = torch.arange(len(C), device=C.device).repeat_interleave(C, output_size=sum(columns))
    c = torch.arange(len(b), device=C.device) - (C.cumsum(0) - C)[b]
    order = (~stay[b, c]).flatten().to(torch.uint8).argsort(stable=True)
    return PatchMask(order[:K].clone()[None], order[K:].clone()[None], order.argsort()[None])


@torch.library.custom_op("flap_kernels::draw_ragged_patch_mask", mutates_args=())
def _draw_ragged_patch_mask(
    sample_index: Tensor,
    seed: int,
    outer: int,
    inner: int,
    columns: Sequence[int],
    rows: int,
    keep_columns: Sequence[int],
    keep_rows: int | None,
    shared: bool,
) -> Indices:
    counts = (columns, rows, keep_columns, keep_rows, shared)
    mask = _empty_mask(sample_index, seed, outer, inner, *counts)
    if len(sample_index) == 0:
        return mask
    if not runs_triton(sample_index):
        return draw_ragged_patch_mask_reference(sample_index, seed, (outer, inner), *counts)
    clips = _clips(columns, rows, keep_columns, keep_rows or rows, sample_index.device)
    grid, kept = (max(columns), rows), 0  # kept columns are each clip's own, from the table
    launch(sample_index, clips, mask, seed, (outer, inner), grid, kept, keep_rows, shared)
    return mask


@_draw_ragged_patch_mask.register_fake
def _empty_mask(sample_index, seed, outer, inner, columns, rows, keep_columns, keep_rows, shared):
    return empty_mask(sample_index, 1, sum(columns) * rows, sum(keep_columns) * (keep_rows or rows))


def _clips(
    columns: Sequence[int],
    rows: int,
    keep_columns: Sequence[int],
    keep_rows: int,
    device: torch.device,
) -> Tensor:
    """(B, 4) int64: columns, kept columns, and the patches and kept patches of clips before."""
    first_n = first_k = 0
    table = []
    for C, k in zip(columns, keep_columns, strict=True):
        table.append((C, k, first_n, first_k))
        first_n, first_k = first_n + rows * C, first_k + keep_rows * k
    table = torch.tensor(table)
    # Only from pinned memory does a copy never wait.
    table = table.pin_memory() if device.type == "cuda" else table
    return table.to(device, non_blocking=True)


def draw_ragged_patch_mask(
    sample_index: Tensor,
    seed: int,
    streams: tuple[int, int],
    columns: Sequence[int],
    rows: int,
    keep_columns: Sequence[int],
    keep_rows: int | None,
    shared: bool,
) -> PatchMask:
    """The patches that each clip of a ragged batch keeps, all clips end to end in one row.

    Each clip draws what `draw_patch_mask` draws of it alone. Patches are numbered through the
    batch: patch n of clip b is the patches of the clips before it, and n. Kept patches of a clip
    are neighbours in `ids_keep` (1, K), ascending, dropped ones in `ids_drop` (1, N - K), and
    `ids_restore` (1, N) is the index of each patch in `cat(ids_keep, ids_drop)`.

    1-D masking of single patches has clips of N[b] columns of one row, with `keep_rows` None.

    Args:
        sample_index: (B,) int64 or int32, at least 0, on the device that is to draw.
        seed: its low 32 bits key the draws.
        streams: below 2**31: what keys the draw of columns, and that of rows.
        columns: of each clip, its patches along time.
        rows: patches along frequency.
        keep_columns: of each clip, how many columns stay.
        keep_rows: how many rows stay in each column; None keeps them all.
        shared: one draw of rows for all columns of a clip, or one for each.

    All counts are the host's, so nothing waits for the device.

    Raises ValueError and TypeError on counts and sample indices that do not fit.
    """
    check_shape("sample_index", sample_index, (None,), "(B,)")
    check_integers(sample_index=sample_index)
    for name, counts in (("columns", columns), ("keep_columns", keep_columns)):
        if len(counts) != len(sample_index):
            raise ValueError(
                f"{name} must have a count for each of {len(sample_index)} clips, got {len(counts)}"
            )
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    for b, (C, k) in enumerate(zip(columns, keep_columns, strict=True)):
        if C < 1:
            raise ValueError(f"columns must be at least 1, got {C} for clip {b}")
        if not 1 <= k <= C:
            raise ValueError(f"keep_columns must be in [1, {C}] for clip {b}, got {k}")
    if keep_rows is not None and not 1 <= keep_rows <= rows:
        raise ValueError(f"keep_rows must be None or in [1, {rows}], got {keep_rows}")
    if not all(0 <= stream < 1 << 31 for stream in streams):
        raise ValueError(f"streams must be in [0, 2**31), got {streams}")
    counts = (columns, rows, keep_columns, keep_rows, shared)
    return PatchMask(*_draw_ragged_patch_mask(sample_index, seed, *streams, *counts))


def ragged_sizes(size: Size) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Test sizes: the columns of each clip, the rows, and how many columns of each clip stay.

    `paper` has as many clips as published, of 1 to 64 columns where those have 64 each.
    """
    if size == "edge":
        return (1, 2), 1, (1, 1)
    if size == "odd":  # two clips that drop no column, and lengths that are far apart
        return (1, 13, 187, 2), 5, (1, 10, 100, 2)
    columns = tuple(1 + b * 64 // 288 for b in range(288))
    return columns, 8, tuple(max(1, 4 * C // 5) for C in columns)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    columns, rows, keep_columns = ragged_sizes(size)
    draw = {"generator": generator, "device": generator.device}
    arguments = {
        "sample_index": torch.randint(0, 1 << 40, (len(columns),), **draw),
        "seed": int(torch.randint(0, 1 << 32, (), **draw)),
        "streams": (3, 4),
        "columns": columns,
        "rows": rows,
        "keep_columns": keep_columns,
        "keep_rows": {"edge": 1, "odd": 4, "paper": 6}[size],
        "shared": bool(torch.rand((), **draw) < 0.5),
    }
    return Inputs(arguments, differentiable=())


KERNEL = Kernel(
    name="draw_ragged_patch_mask",
    op=draw_ragged_patch_mask,
    reference=draw_ragged_patch_mask_reference,
    inputs=_inputs,
)
