"""draw_plan: which patches of each clip stay, drawn on the device from the clip's visit alone.

    word[n]  = Philox4x32-10(key = (seed, stream), counter = (visit_lo, visit_hi, n // 4, 0))[n % 4]
    lowest_k = the k patches of least word >> 8; ties go to the smaller index
    stay     = lowest_k of the columns  and, within each column,  lowest_k of the rows
    restore  = the place of each patch in cat(keep, drop)

    B clips   N = C * R patches of a clip, C columns (time) of R rows (frequency)   K kept

Patches ascend within `keep` and within `drop`. A column's rank is counted, not sorted: so many
others are lower. Nothing but the visits is read, and no two programs write one index.

Least traffic: B visits read, 2 * B * N indices written, of 8 bytes each.
Source: FLAP, arXiv 2311.01615, section 3; Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flap_kernels.checks import check_integers, check_shape
from flap_kernels.launch import jit, runs_triton, tl, triton
from flap_kernels.spec import Arch, Inputs, Kernel, Program, Size

_LOW = 0xFFFFFFFF


class MaskPlan(NamedTuple):
    """For each clip the patches kept and dropped, ascending, and the way back; all int64.

    A tuple: ZeRO-3's hooks find tensors in one that a module is given, but not in a dataclass.
    """

    keep: Tensor
    """(B, K)."""
    drop: Tensor
    """(B, N - K)."""
    restore: Tensor
    """(B, N): where each patch stands in `cat(keep, drop)`."""


def draw_plan_reference(
    visits: Tensor,
    seed: int,
    streams: tuple[int, int],
    grid: tuple[int, int],
    columns: int,
    rows: int | None,
    shared: bool,
) -> MaskPlan:
    """Say what `draw_plan` means in plain PyTorch, with sorts."""
    C, R = grid
    stay = _lowest(_words(seed, streams[0], visits, C), columns)[:, :, None].expand(-1, -1, R)
    if rows is not None:
        words = _words(seed, streams[1], visits, R if shared else C * R)
        stay = stay & _lowest(words.unflatten(1, (-1, R)), rows)
    order = (~stay).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    K = columns * (R if rows is None else rows)
    return MaskPlan(order[:, :K].clone(), order[:, K:].clone(), order.argsort(dim=1))


def _lowest(words: Tensor, k: int) -> Tensor:
    """True at the k lowest of the last axis; ties go to the smaller index."""
    order = words.argsort(dim=-1, stable=True)
    return torch.zeros_like(words, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def _words(seed: int, stream: int, visits: Tensor, count: int) -> Tensor:
    """(B, count) int64 in [0, 2**24): what uniforms are made of, without the division."""
    visits = visits.long()
    block = torch.arange(-(-count // 4), device=visits.device).expand(len(visits), -1)
    c0, c1 = (visits & _LOW)[:, None], (visits >> 32)[:, None]
    c2, c3 = block, torch.zeros_like(block)
    key0, key1 = seed & _LOW, stream & _LOW
    for _ in range(10):
        # The product wraps at 2**64, which leaves all 64 bits right; only the shift is masked.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _LOW) ^ c1 ^ key0, p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ c3 ^ key1, p0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return (torch.stack([c0, c1, c2, c3], -1) >> 8).flatten(1)[:, :count]


@jit
def _draw(key, visit, n):
    """The word of each index in `n`, as int32 in [0, 2**24)."""
    # Four neighbours share a block and each computes all of it: 10 rounds cost less than a shuffle.
    block = n // 4
    low = (visit & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(block).to(tl.uint32)
    high = (visit >> 32).to(tl.uint32) + tl.zeros_like(block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, block, tl.zeros_like(block))
    lane = n % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return (word >> 8).to(tl.int32)


@jit(do_not_specialize=["outer_key", "inner_key"])
def draw_plan_kernel(
    visits_ptr,
    keep_ptr,
    drop_ptr,
    restore_ptr,
    outer_key,
    inner_key,
    stride_v,
    C,
    R,
    columns,
    rows,
    K,
    ALL_ROWS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    visit = tl.load(visits_ptr + pid_b * stride_v).to(tl.int64)

    c = tl.arange(0, BLOCK_C)
    mine = _draw(outer_key, visit, c)
    rank = tl.zeros([BLOCK_C], dtype=tl.int32)
    for start in range(0, C, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = _draw(outer_key, visit, j)
        lower = (other[None, :] < mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (j[None, :] < c[:, None])
        )
        rank += tl.sum((lower & (j < C)[None, :]).to(tl.int32), axis=1)
    stays = (rank < columns) & (c < C)

    r = tl.arange(0, BLOCK_R)
    exists = (c < C)[:, None] & (r < R)[None, :]
    stay = stays[:, None] & exists
    if not ALL_ROWS:
        first = tl.zeros([BLOCK_C], dtype=tl.int32) if SHARED else c * R
        mine = _draw(inner_key, visit, first[:, None] + r[None, :])
        rank = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.int32)
        for j in range(R):
            other = tl.sum(tl.where((r == j)[None, :], mine, 0), axis=1)[:, None]
            rank += ((other < mine) | ((other == mine) & (j < r)[None, :])).to(tl.int32)
        stay = stay & (rank < rows)

    # How many stay before each patch: those of earlier columns, then those of earlier rows.
    one = stay.to(tl.int32)
    column = tl.sum(one, axis=1)
    before = (tl.cumsum(column, 0) - column)[:, None] + tl.cumsum(one, 1) - one
    n = c[:, None] * R + r[None, :]
    after = n - before
    N = C * R
    at = keep_ptr + pid_b * K + before
    tl.store(at, n.to(tl.int64), mask=stay & (before < K))
    at = drop_ptr + pid_b * (N - K) + after
    tl.store(at, n.to(tl.int64), mask=exists & (stay == 0) & (after < N - K))
    place = tl.where(stay, before, K + after)
    tl.store(restore_ptr + pid_b * N + n, place.to(tl.int64), mask=exists)


@torch.library.custom_op("flap_kernels::draw_plan", mutates_args=())
def _draw_plan(
    visits: Tensor,
    seed: int,
    outer: int,
    inner: int,
    C: int,
    R: int,
    columns: int,
    rows: int | None,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(visits):
        return draw_plan_reference(visits, seed, (outer, inner), (C, R), columns, rows, shared)
    plan = _empty_plan(visits, seed, outer, inner, C, R, columns, rows, shared)
    if len(visits) == 0:
        return plan
    draw_plan_kernel[(len(visits),)](
        visits,
        plan[0],
        plan[1],
        plan[2],
        outer << 32 | seed & _LOW,
        inner << 32 | seed & _LOW,
        visits.stride(0),
        C,
        R,
        columns,
        rows or R,
        plan[0].shape[1],
        ALL_ROWS=rows is None,
        SHARED=shared,
        **_blocks(C, R),
    )
    return plan


@_draw_plan.register_fake
def _empty_plan(visits, seed, outer, inner, C, R, columns, rows, shared):
    B, N, K = len(visits), C * R, columns * (R if rows is None else rows)
    keep, drop, restore = (visits.new_empty((B, n), dtype=torch.int64) for n in (K, N - K, N))
    return keep, drop, restore


def _blocks(C: int, R: int) -> dict[str, int]:
    c = triton.next_power_of_2(C)
    # A comparison tile of 8,192 ranks 512 columns in 32 steps.
    return {
        "BLOCK_C": c,
        "BLOCK_R": triton.next_power_of_2(R),
        "BLOCK_J": min(c, max(1, 8192 // c)),
    }


def draw_plan(
    visits: Tensor,
    seed: int,
    streams: tuple[int, int],
    grid: tuple[int, int],
    columns: int,
    rows: int | None,
    shared: bool,
) -> MaskPlan:
    """The patches that each clip keeps, a function of the seed and of the clip's visit.

    1-D masking of single patches is a grid of (N, 1) with `rows` None; of whole frames, the grid
    of patches with `rows` None; 2-D masking gives both counts.

    Args:
        visits: (B,) int64 or int32, at least 0, on the device that is to draw.
        seed: its low 32 bits key the draws.
        streams: below 2**31: what keys the draw of columns, and that of rows.
        grid: patches along time (columns) and along frequency (rows).
        columns: how many columns stay.
        rows: how many rows stay in each column; None keeps them all.
        shared: one draw of rows for all columns of a clip, or one for each.

    Raises ValueError and TypeError on counts and visits that do not fit.
    """
    C, R = grid
    check_shape("visits", visits, (None,), "(B,)")
    check_integers(visits=visits)
    if min(grid) < 1:
        raise ValueError(f"grid must be of at least one patch each way, got {grid}")
    if not 1 <= columns <= C:
        raise ValueError(f"columns must be in [1, {C}], got {columns}")
    if rows is not None and not 1 <= rows <= R:
        raise ValueError(f"rows must be None or in [1, {R}], got {rows}")
    if not all(0 <= stream < 1 << 31 for stream in streams):
        raise ValueError(f"streams must be in [0, 2**31), got {streams}")
    return MaskPlan(*_draw_plan(visits, seed, *streams, C, R, columns, rows, shared))


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    B, grid, columns, rows = {
        "edge": (1, (1, 1), 1, 1),
        "odd": (3, (13, 5), 10, 4),
        "paper": (288, (64, 8), 51, 6),
    }[size]
    draw = {"generator": generator, "device": generator.device}
    arguments = {
        "visits": torch.randint(0, 1 << 40, (B,), **draw),
        "seed": int(torch.randint(0, 1 << 32, (), **draw)),
        "streams": (3, 4),
        "grid": grid,
        "columns": columns,
        "rows": rows,
        "shared": bool(torch.rand((), **draw) < 0.5),
    }
    return Inputs(arguments, differentiable=())


def _programs(arch: Arch) -> tuple[Program, ...]:
    fixed: dict[str, str | int] = {
        **dict.fromkeys(("visits_ptr", "keep_ptr", "drop_ptr", "restore_ptr"), "*i64"),
        **dict.fromkeys(("outer_key", "inner_key"), "i64"),
        "stride_v": 1,
    }
    return tuple(
        Program(
            name=name,
            kernel=draw_plan_kernel,
            signature={
                **fixed,
                "C": C,
                "R": R,
                "columns": columns,
                "rows": rows or R,
                "K": columns * (rows or R),
            },
            constants={"ALL_ROWS": rows is None, "SHARED": shared, **_blocks(C, R)},
            bytes_moved=288 * 8 * (1 + 2 * C * R),
        )
        for name, C, R, columns, rows, shared in (
            ("draw_plan_1d", 512, 1, 308, None, True),
            ("draw_plan_2d", 64, 8, 51, 6, True),
            ("draw_plan_2d_unshared", 64, 8, 51, 6, False),
        )
    )


KERNEL = Kernel(
    name="draw_plan",
    op=draw_plan,
    reference=draw_plan_reference,
    inputs=_inputs,
    programs=_programs,
    bytes_moved=288 * 8 * (1 + 2 * 512),
)
