"""Batches of more than 2**31 elements: no offset may be computed in 32 bits.

The tensors are views of memory that is reserved but, all but a few pages, never touched.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flap_kernels import gather_tokens, masked_mse, patch_embed, unshuffle_tokens

STEP, B = 2**29, 5  # the last clip starts at 2**31


def far_apart(x: Tensor) -> Tensor:
    """The same values, each clip of the batch 2**29 elements behind the one before it."""
    room = torch.empty((B - 1) * STEP + x[0].numel(), dtype=x.dtype, device=x.device)
    inner = torch.empty(x.shape[1:], device="meta").stride()
    return room.as_strided(x.shape, (STEP, *inner)).copy_(x)


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    return normal


def test_tokens_far_apart(draw, device):
    x, ids_keep = draw(B, 3, 4), torch.tensor([[0, 2]], device=device).expand(B, -1)
    assert torch.equal(gather_tokens(far_apart(x), ids_keep), gather_tokens(x, ids_keep))
    ids_restore = torch.tensor([[0, 3, 1, 2]], device=device).expand(B, -1)
    token = draw(4)
    found = unshuffle_tokens(far_apart(x), ids_restore, token)
    assert torch.equal(found, unshuffle_tokens(x, ids_restore, token))


def test_log_mels_far_apart(draw, device):
    mel, index = draw(B, 4, 4), torch.tensor([[0, 3]], device=device).expand(B, -1)
    weight, bias, position = draw(8, 4), draw(8), draw(4, 8)
    found = patch_embed(far_apart(mel), index, weight, bias, position)
    assert torch.equal(found, patch_embed(mel, index, weight, bias, position))
    hidden, back = draw(B, 2, 8), draw(4)
    found = masked_mse(hidden, weight.T, back, far_apart(mel), index, norm_pix=True)
    assert torch.equal(found, masked_mse(hidden, weight.T, back, mel, index, norm_pix=True))


def test_a_ragged_batch_of_frames_and_tokens_far_apart(draw, device):
    """One clip, as clips end to end are, whose last frame, token and position begin at 2**31."""
    mel, x, position = draw(B, 4), draw(B, 4), draw(B, 8)
    ids_keep = torch.tensor([[0, 7, 4 * B - 1]], device=device)
    index = torch.tensor([[0, 2, B - 1]], device=device)
    weight, bias, token = draw(8, 1), draw(8), draw(4)
    found = patch_embed(far_apart(mel)[None], ids_keep, weight, bias, far_apart(position), index)
    assert torch.equal(found, patch_embed(mel[None], ids_keep, weight, bias, position, index))
    ids_restore = torch.tensor([[4, 0, 5, 2, 1, 3]], device=device)
    added, index = draw(B, 4), torch.tensor([[4, 4, 0, 3, 1, 2]], device=device)
    found = unshuffle_tokens(far_apart(x)[None], ids_restore, token, far_apart(added), index)
    assert torch.equal(found, unshuffle_tokens(x[None], ids_restore, token, added, index))
    hidden, back = draw(1, 3, 8), draw(1)
    rest = {"row_weight": torch.tensor([[1.0, 2, 3]], device=device), "norm_pix": False}
    found = masked_mse(hidden, weight.T, back, far_apart(mel)[None], ids_keep, **rest)
    assert torch.equal(found, masked_mse(hidden, weight.T, back, mel[None], ids_keep, **rest))
