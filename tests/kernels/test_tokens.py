"""gather_tokens and unshuffle_tokens, on numbers that fit in the head."""

from __future__ import annotations

import pytest
import torch

from flap_kernels import gather_tokens, unshuffle_tokens

X = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]]
KEEP = [[0, 2], [1, 2]]
RESTORE = [[0, 2, 1], [2, 0, 1]]


def leaf(values, device, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, device=device, dtype=dtype, requires_grad=True)


def test_kept_tokens_are_packed_in_order(device):
    kept = gather_tokens(leaf(X, device), torch.tensor(KEEP, device=device))
    assert kept.tolist() == [[[1, 2], [5, 6]], [[9, 10], [11, 12]]]


def test_dropped_tokens_get_no_gradient(device):
    x = leaf(X, device)
    kept = gather_tokens(x, torch.tensor(KEEP, device=device))
    (gradient,) = torch.autograd.grad(kept, x, 10 * kept.detach())
    assert gradient.tolist() == [
        [[10, 20], [0, 0], [50, 60]],
        [[0, 0], [90, 100], [110, 120]],
    ]


def test_indices_may_be_narrow(device):
    ids_keep = torch.tensor(KEEP, device=device, dtype=torch.int32)
    ids_restore = torch.tensor(RESTORE, device=device, dtype=torch.int32)
    x, token = leaf(X, device), leaf([0.5, -0.5], device)
    found = unshuffle_tokens(gather_tokens(x, ids_keep), ids_restore, token)
    assert found.tolist() == [
        [[1, 2], [0.5, -0.5], [5, 6]],
        [[0.5, -0.5], [9, 10], [11, 12]],
    ]


def test_dropped_places_get_the_mask_token_and_all_their_position(device):
    y = leaf([[[1.0], [2.0]], [[3.0], [4.0]]], device)
    token, position = leaf([10.0], device), leaf([[100.0], [200.0], [300.0]], device)
    found = unshuffle_tokens(y, torch.tensor(RESTORE, device=device), token, position)
    assert found[..., 0].tolist() == [[101, 210, 302], [110, 203, 304]]
    upstream = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]], device=device)
    by_y, by_token, by_position = torch.autograd.grad(found, (y, token, position), upstream)
    assert by_y[..., 0].tolist() == [[1, 3], [5, 6]]
    assert by_token.tolist() == [2 + 4]
    assert by_position[..., 0].tolist() == [1 + 4, 2 + 5, 3 + 6]


def test_positions_may_be_named_and_repeat(device):
    y, token = leaf([[[1.0], [2.0]], [[3.0], [4.0]]], device), leaf([10.0], device)
    position = leaf([[100.0], [200.0], [300.0], [400.0]], device)
    index = torch.tensor([[0, 0, 3], [3, 1, 0]], device=device, dtype=torch.int32)
    found = unshuffle_tokens(y, torch.tensor(RESTORE, device=device), token, position, index)
    assert found[..., 0].tolist() == [[101, 110, 402], [410, 203, 104]]
    upstream = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]], device=device)
    (by_position,) = torch.autograd.grad(found, position, upstream)
    assert by_position[:, 0].tolist() == [1 + 2 + 6, 5, 0, 3 + 4]


@pytest.mark.parametrize("outside", [3, -1])
def test_a_position_out_of_range_is_not_passed_over_in_silence(device, outside):
    y, token = leaf([[[1.0], [2.0]], [[3.0], [4.0]]], device), leaf([10.0], device)
    position = leaf([[100.0], [200.0], [300.0]], device)
    index = torch.tensor([[0, 1, 2], [0, outside, 2]], device=device)
    try:
        found = unshuffle_tokens(y, torch.tensor(RESTORE, device=device), token, position, index)
    except IndexError:
        return
    assert found[1, 1].isnan().all()
    assert found.isnan().sum() == 1


def test_restoring_what_was_kept_is_the_identity_where_nothing_is_dropped(device):
    x = leaf(X, device)
    order = torch.tensor([[2, 0, 1], [1, 0, 2]], device=device)
    found = unshuffle_tokens(gather_tokens(x, order), order.argsort(1), x.new_zeros(2))
    assert torch.equal(found, x)


def test_a_cls_token_rides_along_as_one_more_patch(device):
    cls, y = leaf([[[7.0]], [[8.0]]], device), leaf([[[1.0], [2.0]], [[3.0], [4.0]]], device)
    position = torch.tensor([[0.0], [100.0], [200.0], [300.0]], device=device)
    ids_restore = torch.tensor(RESTORE, device=device)
    behind = torch.cat([ids_restore.new_zeros(2, 1), ids_restore + 1], 1)
    found = unshuffle_tokens(torch.cat([cls, y], 1), behind, leaf([10.0], device), position)
    assert found[..., 0].tolist() == [[7, 101, 210, 302], [8, 110, 203, 304]]


def test_the_sum_with_positions_is_rounded_once(device):
    # bfloat16 holds 256 and 258, but not 257: rounded before the sum, 257 + 1 would be 256.
    y, token = torch.tensor([[[257.0]]], device=device), torch.tensor([257.0], device=device)
    ids_restore = torch.tensor([[0, 1]], device=device)
    position = torch.tensor([[1.0], [1.0]], device=device)
    found = unshuffle_tokens(y, ids_restore, token, position, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == [258, 258]


@pytest.mark.parametrize("K", [0, 3])
def test_none_and_all_may_be_kept(K, device):
    x = leaf(X, device)
    ids_keep = torch.arange(K, device=device).expand(2, K)
    kept = gather_tokens(x, ids_keep)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, float(K == 3)))
    token = leaf([0.5, -0.5], device)
    back = unshuffle_tokens(kept.detach(), torch.arange(3, device=device).expand(2, 3), token)
    assert torch.equal(back, x if K else token.expand(2, 3, 2))


def test_an_empty_batch_gives_empty_tokens_and_zero_gradients(device):
    token = leaf([1.0, 2.0], device)
    x = torch.empty(0, 3, 2, device=device, requires_grad=True)
    ids_keep = torch.empty(0, 2, dtype=torch.int64, device=device)
    ids_restore = torch.empty(0, 3, dtype=torch.int64, device=device)
    found = unshuffle_tokens(gather_tokens(x, ids_keep), ids_restore, token)
    assert found.shape == (0, 3, 2)
    assert torch.autograd.grad(found.sum(), token)[0].tolist() == [0, 0]


def test_an_index_out_of_range_is_not_passed_over_in_silence(device):
    x, ids_keep = torch.ones(1, 2, 1, device=device), torch.tensor([[0, 2]], device=device)
    try:
        found = gather_tokens(x, ids_keep)
    except IndexError:
        return
    assert found[0, 0].item() == 1
    assert found[0, 1].isnan().item()


def test_an_index_below_zero_is_refused_on_a_cpu():
    x, ids_keep = torch.ones(1, 2, 1), torch.tensor([[0, -1]])
    with pytest.raises(IndexError, match=r"ids_keep must be in \[0, 2\), got -1 to 0"):
        gather_tokens(x, ids_keep)


def test_a_slot_out_of_range_is_refused_on_a_cpu():
    y, ids_restore = torch.ones(1, 1, 1), torch.tensor([[0, 2]])
    with pytest.raises(IndexError, match=r"ids_restore must be in \[0, 2\), got 0 to 2"):
        unshuffle_tokens(y, ids_restore, torch.zeros(1))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_whole_with_its_gradients(backend, device):
    def there_and_back(x, ids_keep, ids_restore, token, position):
        return unshuffle_tokens(gather_tokens(x, ids_keep) * 2, ids_restore, token, position)

    arguments = [
        leaf(X, device),
        torch.tensor(KEEP, device=device),
        torch.tensor(RESTORE, device=device),
        leaf([0.5, -0.5], device),
        leaf([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device),
    ]
    leaves = [arguments[i] for i in (0, 3, 4)]
    compiled = torch.compile(there_and_back, backend=backend, fullgraph=True)
    found, expected = compiled(*arguments), there_and_back(*arguments)
    assert torch.equal(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, expected.detach()),
        torch.autograd.grad(expected, leaves, expected.detach()),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 4, 2)}, "ids_restore must be .* at least K = 4, got 3"),
        ({"ids_restore": torch.zeros(3, 3, dtype=torch.int64)}, r"ids_restore must be \(B, N\)"),
        ({"ids_restore": torch.zeros(2, 3)}, "ids_restore must be int32 or int64"),
        ({"mask_token": torch.zeros(3)}, r"mask_token must be \(D,\)"),
        ({"position": torch.zeros(2, 2)}, r"position must be \(N, D\)"),
        ({"position": torch.zeros(3, 2, dtype=torch.int64)}, "position must be float"),
        ({"position_index": torch.zeros(2, 3)}, "position_index must be int32 or int64"),
        (
            {"position_index": torch.zeros(2, 2, dtype=torch.int64)},
            r"position_index must be the shape of ids_restore = \(2, 3\)",
        ),
        (
            {"position": None, "position_index": torch.zeros(2, 3, dtype=torch.int64)},
            "position_index must be None without position",
        ),
    ],
)
def test_what_cannot_be_restored_is_refused(change, message):
    arguments = {
        "y": torch.zeros(2, 2, 2),
        "ids_restore": torch.tensor(RESTORE),
        "mask_token": torch.zeros(2),
        "position": torch.zeros(3, 2),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        unshuffle_tokens(**{**arguments, **change})


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"x must be \(B, N, D\)"):
        gather_tokens(torch.zeros(3, 2), torch.tensor(KEEP))
    with pytest.raises(ValueError, match=r"ids_keep must be \(B, K\)"):
        gather_tokens(torch.zeros(3, 3, 2), torch.tensor(KEEP))
    with pytest.raises(TypeError, match="ids_keep must be int32 or int64"):
        gather_tokens(torch.zeros(2, 3, 2), torch.zeros(2, 2))
