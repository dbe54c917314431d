"""InfoNCE over ranks: the number of the whole, and gradients whose average is the whole's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_kernels import distributed_infonce
from flap_kernels.infonce import infonce_reference
from flap_kernels.launch import HAS_TRITON
from tests.closeness import assert_as_exact
from tests.kernels.test_infonce import DIRECTIONS, loss_and_gradients, pairs
from tests.ranks import on_ranks

SCHEMES = ["replicated", "sharded", "auto"]


def compared(audio, text, ids, cuts, runs):
    """On one rank: by run, the rank's loss and gradients, and the whole's in two types."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(cuts[rank], cuts[rank + 1])
    scale = torch.tensor(20.0, dtype=audio.dtype)
    rows = []
    for options in runs:
        kept = {name: options[name] for name in ("direction", "duplicates") if name in options}
        own = dict(options)
        if own.pop("ids", False):
            own["ids"], kept["ids"] = ids[mine], ids
        found = loss_and_gradients(distributed_infonce, audio[mine], text[mine], scale, **own)
        # The average over ranks is the gradient of the whole: what DDP and DeepSpeed take.
        average = found[3].clone()
        dist.all_reduce(average)
        parts = [found[0], found[1] / world, found[2] / world, average / world]
        wholes = []
        for dtype in (audio.dtype, torch.float64):
            operands = [x.to(dtype) for x in (audio, text, scale)]
            whole = loss_and_gradients(infonce_reference, *operands, **kept)
            wholes.append([whole[0], whole[1][mine], whole[2][mine], whole[3]])
        rows.append([parts, *wholes])
    return rows


def runs_of_all_kinds():
    return [
        {"direction": direction, "scheme": scheme, **shared}
        for direction in DIRECTIONS
        for scheme in SCHEMES
        for shared in ({}, {"ids": True}, {"ids": True, "duplicates": "positive"})
    ]


def ids_of(B):
    """Two ids of each pair, with some shared on a rank and some over ranks."""
    return torch.stack([torch.arange(B) % 5, torch.arange(B) // 3], dim=1)


# Ranks with unequal sizes, one of them 0, and equal ones.
CUTS = [(0, 5, 13), (0, 4, 4, 13), (0, 3, 6, 9, 12)]


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_match_the_whole(cuts):
    inputs = *pairs(cuts[-1], 8), ids_of(cuts[-1])
    by_rank = on_ranks(len(cuts) - 1, compared, *inputs, cuts, runs_of_all_kinds())
    for rows in by_rank:
        for (parts, wholes, _), (first, *_) in zip(rows, by_rank[0], strict=True):
            assert torch.equal(parts[0], first[0]), "ranks hold different losses"
            for part, whole in zip(parts, wholes, strict=True):
                torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_are_as_exact_as_the_whole_in_float32(cuts):
    inputs = *pairs(cuts[-1], 8, dtype=torch.float32), ids_of(cuts[-1])
    by_rank = on_ranks(len(cuts) - 1, compared, *inputs, cuts, runs_of_all_kinds())
    for i, name in enumerate(["loss", "gradient of audio", "gradient of text", "of scale"]):
        columns = [
            torch.cat([row[kind][i].flatten() for rows in by_rank for row in rows])
            for kind in range(3)
        ]
        assert_as_exact(name, *columns, slack=2)


def compared_in_kernels(*arguments):
    """As `compared`, on a rank whose kernels run in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    return compared(*arguments)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_ranks_match_the_whole_in_the_kernels_too():
    """What a rank gets from others is not laid out as what it computes itself."""
    cuts = (0, 40, 80)
    runs: list[dict[str, Any]] = [{"scheme": scheme} for scheme in SCHEMES[:2]]
    runs.append({"scheme": "replicated", "direction": "a2t", "ids": True})
    inputs = *pairs(80, 8, dtype=torch.float32), ids_of(80)
    for rows in on_ranks(2, compared_in_kernels, *inputs, cuts, runs):
        for parts, _, exact in rows:
            for part, whole in zip(parts, exact, strict=True):
                largest = whole.abs().max().item()
                torch.testing.assert_close(part.double(), whole, rtol=0, atol=1e-5 * largest)


def extra_captions_match_whole(audio, text, ids, audio_cuts, text_cuts, order):
    """On one rank: extra captions of all ranks are negatives of every clip."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(audio_cuts[rank], audio_cuts[rank + 1])
    part = slice(text_cuts[rank], text_cuts[rank + 1])
    scale = torch.tensor(20.0, dtype=torch.float64)
    for direction in ("symmetric", "a2t"):
        for masked in (False, True):
            options: dict[str, Any] = {"direction": direction}
            options["ids"] = ids[order] if masked else None
            exact = loss_and_gradients(infonce_reference, audio, text[order], scale, **options)
            text_grad = torch.empty_like(text)
            text_grad[order] = exact[2]
            for scheme in SCHEMES:
                options |= {"scheme": scheme, "ids": ids[part] if masked else None}
                found = loss_and_gradients(
                    distributed_infonce, audio[mine], text[part], scale, **options
                )
                average = found[3].clone()
                dist.all_reduce(average)
                wholes = exact[0], exact[1][mine], text_grad[part], exact[3]
                parts = found[0], found[1] / world, found[2] / world, average / world
                for one, whole in zip(parts, wholes, strict=True):
                    torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-14)


def test_extra_captions_of_all_ranks_are_negatives():
    audio, text = pairs(9, 4)
    # Rank 0 holds 3 pairs and 1 caption more, rank 1 holds 2 pairs and 3 captions more.
    order = torch.tensor([0, 1, 2, 4, 5, 3, 6, 7, 8])
    ids = torch.tensor([0, 1, 2, 4, 1, 5, 2, 6, 4])
    on_ranks(2, extra_captions_match_whole, audio[:5], text, ids, (0, 3, 5), (0, 4, 9), order)


def promise_matches_question(audio, text):
    """On one rank: sizes that are promised to be equal give the same bits as sizes asked for."""
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    asked = distributed_infonce(audio[mine], text[mine], 20.0)
    promised = distributed_infonce(audio[mine], text[mine], 20.0, equal_sizes=True)
    assert torch.equal(asked, promised)
    audio, text = audio[mine].float(), text[mine].float()
    bf16 = distributed_infonce(audio, text, 20.0, equal_sizes=True, precision="bf16")
    narrow = distributed_infonce(audio.bfloat16(), text.bfloat16(), 20.0, equal_sizes=True)
    assert torch.equal(bf16, narrow)
    assert not torch.equal(bf16, distributed_infonce(audio, text, 20.0, equal_sizes=True))


def test_equal_sizes_need_no_question_and_bf16_is_rounded_before_it_is_sent():
    on_ranks(2, promise_matches_question, *pairs(6, 4))


def test_alone_it_is_the_loss_of_one_process():
    audio, text = pairs(6, 4)
    exact = infonce_reference(audio, text, torch.tensor(20.0))
    torch.testing.assert_close(distributed_infonce(audio, text, 20.0), exact, rtol=1e-12, atol=0)
