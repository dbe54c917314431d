"""Attention in bf16 on a CPU is computed in fp32, also under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flap_fast.encoders.attention import attention, packed_attention
from flap_fast.encoders.packing import segments


def heads(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*shape, generator=generator).bfloat16() for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_in_bf16_are_those_of_fp32_rounded(autocast: bool):
    given = heads(2, 24, 2, 16)
    wanted = attention(*(x.float() for x in given)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(attention(*given), wanted)


@pytest.mark.parametrize("window", [None, 4])
def test_packs_in_bf16_are_those_of_fp32_rounded(window: int | None):
    given = heads(24, 2, 16)
    packed = segments([3, 9, 12], [0, 1, 2], torch.device("cpu"), window=window)
    q, k, v = (x.float() for x in given)
    wanted = packed_attention(q, k, v, packed).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed_attention(*given, packed), wanted)
