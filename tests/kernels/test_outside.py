"""Indices out of range where they are not checked: NaN forward, and no gradient of theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flap_kernels import checks, gather_tokens, masked_mse, patch_embed, unshuffle_tokens
from flap_kernels.patches import add_rows

OUTSIDE = [2**40, 7, 4, -1, -5]
# float64 runs in plain PyTorch on every device.
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU runs on a CPU too: there, PyTorch raises where a GPU ends the process."""
    monkeypatch.setattr(checks, "CHECKED_DEVICES", ())


def leaf(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    x = torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=dtype, device=device)
    return x.view(shape).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_token_out_of_range_is_nan_and_its_gradient_goes_nowhere(outside, dtype, device):
    x = leaf(2, 4, 3, dtype=dtype, device=device)
    ids_keep = torch.tensor([[0, outside], [3, 1]], device=device)
    kept = gather_tokens(x, ids_keep)
    assert kept[0, 1].isnan().all()
    assert torch.equal(kept[[0, 1, 1], [0, 0, 1]], x[[0, 1, 1], [0, 3, 1]])
    (x_grad,) = torch.autograd.grad(kept, x, torch.ones_like(kept))
    assert x_grad[..., 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]


def test_an_int32_out_of_range_is_one_too(device):
    x = leaf(1, 4, 3, dtype=torch.float32, device=device)
    ids_keep = torch.tensor([[2, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)
    kept = gather_tokens(x, ids_keep)
    assert kept[0, :, 0].isnan().tolist() == [False, True, True]
    (x_grad,) = torch.autograd.grad(kept, x, torch.ones_like(kept))
    assert x_grad[0, :, 0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_slot_out_of_range_is_a_mask_token(outside, dtype, device):
    y = leaf(1, 2, 3, dtype=dtype, device=device)
    token = torch.full((3,), -9.0, dtype=dtype, device=device, requires_grad=True)
    ids_restore = torch.tensor([[1, outside, 0, 3]], device=device)
    found = unshuffle_tokens(y, ids_restore, token)
    assert found[0, :, 0].tolist() == [4, -9, 1, -9]
    upstream = torch.tensor([1.0, 2, 4, 8], dtype=dtype, device=device)[None, :, None]
    y_grad, token_grad = torch.autograd.grad(found, (y, token), upstream.expand_as(found))
    assert y_grad[0, :, 0].tolist() == [4, 1]
    assert token_grad.tolist() == [10] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_position_out_of_range_is_nan_and_its_gradient_goes_nowhere(outside, dtype, device):
    y = leaf(1, 2, 3, dtype=dtype, device=device)
    token = torch.zeros(3, dtype=dtype, device=device)
    position = leaf(4, 3, dtype=dtype, device=device)
    index = torch.tensor([[0, 3, outside, 3]], device=device)
    found = unshuffle_tokens(y, torch.arange(4, device=device)[None], token, position, index)
    assert found[0, :, 0].isnan().tolist() == [False, False, True, False]
    by_y, by_position = torch.autograd.grad(found, (y, position), torch.ones_like(found))
    assert by_y.eq(1).all()
    assert by_position[:, 0].tolist() == [1, 0, 0, 2]


# 33 x 33 pixels are more than a kernel takes.
@pytest.mark.parametrize(
    ("patch", "dtype"), [(2, torch.float32), (2, torch.float64), (33, torch.float32)], ids=str
)
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("named", [False, True], ids=["own position", "position_index"])
def test_a_patch_out_of_range_is_nan_and_its_gradients(named, outside, patch, dtype, device):
    mel = leaf(1, 2 * patch, 2 * patch, dtype=dtype, device=device)
    weight = leaf(2, patch * patch, dtype=dtype, device=device)
    bias, position = leaf(2, dtype=dtype, device=device), leaf(4, 2, dtype=dtype, device=device)
    ids_keep = torch.tensor([[0, outside, 3]], device=device)
    index = torch.tensor([[1, 1, outside]], device=device) if named else None
    found = patch_embed(mel, ids_keep, weight, bias, position, index)
    assert found[0, :, 0].isnan().tolist() == [False, True, named]
    leaves = (mel, weight, bias, position)
    of_mel, of_weight, of_bias, of_position = torch.autograd.grad(
        found, leaves, torch.ones_like(found)
    )
    # What was read of the missing patch enters the weight's gradient, and no other.
    assert of_weight.isnan().all()
    assert of_bias.tolist() == [3, 3]
    assert of_position[:, 0].tolist() == ([0, 2, 0, 0] if named else [1, 0, 0, 1])
    cells = of_mel[0, ::patch, ::patch].ne(0)
    assert cells.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("patch", "dtype"), [(2, torch.float32), (2, torch.float64), (33, torch.float32)], ids=str
)
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_error_against_a_patch_out_of_range_is_nan(norm_pix, outside, patch, dtype, device):
    mel = leaf(1, 2 * patch, 2 * patch, dtype=dtype, device=device)
    hidden, weight = (
        leaf(1, 2, 3, dtype=dtype, device=device),
        leaf(patch**2, 3, dtype=dtype, device=device),
    )
    bias = leaf(patch**2, dtype=dtype, device=device)
    ids_drop = torch.tensor([[1, outside]], device=device)
    loss = masked_mse(hidden, weight, bias, mel.detach(), ids_drop, norm_pix=norm_pix)
    assert loss.isnan()
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
    assert of_hidden[0, :, 0].isnan().tolist() == [False, True]
    assert of_weight.isnan().all()


def test_rows_out_of_range_are_not_added():
    rows = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    assert add_rows(rows, torch.tensor([[1, 2, -1, 1]]), 2).tolist() == [[0], [9]]
