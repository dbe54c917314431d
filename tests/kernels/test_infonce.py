"""InfoNCE in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flap_kernels import infonce
from flap_kernels.infonce import infonce_reference
from flap_kernels.launch import interpreted
from tests.closeness import assert_as_exact

DIRECTIONS = ["symmetric", "a2t", "t2a"]


def pairs(B: int, D: int, seed: int = 0, dtype=torch.float64):
    """Matched unit rows that are alike but not the same."""
    draw = torch.Generator().manual_seed(seed)
    audio = F.normalize(torch.randn(B, D, generator=draw, dtype=dtype), dim=1)
    text = F.normalize(audio + 0.1 * torch.randn(B, D, generator=draw, dtype=dtype), dim=1)
    return audio, text


def loss_and_gradients(loss, audio, text, scale, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (audio, text, scale)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_pairs_by_hand(direction):
    # Logits [[1, 0], [0, 1]]: each positive has p = e / (e + 1), in either direction.
    loss = infonce(torch.eye(2), torch.eye(2), 1.0, direction=direction)
    torch.testing.assert_close(loss.item(), 0.31326168751822286)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", [1, 2, 33, 700])
def test_float64_agrees_with_autograd(direction, B):
    audio, text = pairs(B, 12)
    scale = torch.tensor(20.0, dtype=torch.float64)
    found = loss_and_gradients(infonce, audio, text, scale, direction=direction)
    exact = loss_and_gradients(infonce_reference, audio, text, scale, direction=direction)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


DUPLICATES = ["mask", "positive"]

IDS = {
    "one id": torch.tensor([3, 1, 3, 0, 1, 3, 7]),
    # 0 and 1 share a caption, 1 and 2 a sound: 0 and 2 nothing. 5 and 6 share both.
    "two ids": torch.tensor([[0, 9], [1, 9], [1, 8], [4, 7], [2, 1], [6, 5], [6, 5]]),
    "all one": torch.zeros(7, 2, dtype=torch.int32),
    "all apart": torch.arange(7),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_clips_that_share_an_id(ids, duplicates, direction):
    audio, text = pairs(7, 4)
    scale = torch.tensor(20.0, dtype=torch.float64)
    options = {"ids": ids, "duplicates": duplicates, "direction": direction}
    found = loss_and_gradients(infonce, audio, text, scale, **options)
    exact = loss_and_gradients(infonce_reference, audio, text, scale, **options)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_several_positives_by_hand():
    # Logits [[1, 0], [0, 1]], both pairs positives of both: -(log p_1 + log p_2) / 2 a row.
    ids = torch.zeros(2, dtype=torch.long)
    loss = infonce(torch.eye(2), torch.eye(2), 1.0, ids=ids, duplicates="positive")
    torch.testing.assert_close(loss.item(), 0.31326168751822286 + 0.5)
    assert infonce(torch.eye(2), torch.eye(2), 1.0, ids=ids).item() == 0.0


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_ids_that_all_differ_change_no_bit(duplicates):
    audio, text = (x.float() for x in pairs(40, 8))
    scale = torch.tensor(100.0)
    ids = torch.arange(80).view(40, 2)
    plain = loss_and_gradients(infonce, audio, text, scale)
    found = loss_and_gradients(infonce, audio, text, scale, ids=ids, duplicates=duplicates)
    assert all(torch.equal(one, two) for one, two in zip(plain, found, strict=True))


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_many_tiles_with_shared_ids_are_as_exact_as_the_reference(duplicates, scale, device):
    B = 150 if device == "cuda" or interpreted() else 1300
    audio, text = (x.to(device) for x in pairs(B, 24, dtype=torch.float32))
    row = torch.arange(B, device=device)
    ids = torch.stack([row // 2, row * 7 % (B // 5)], dim=1)
    scale = torch.tensor(scale, device=device)
    options = {"ids": ids, "duplicates": duplicates}
    found = loss_and_gradients(infonce, audio, text, scale, **options)
    plain = loss_and_gradients(infonce_reference, audio, text, scale, **options)
    doubles = audio.double(), text.double(), scale.double()
    exact = loss_and_gradients(infonce_reference, *doubles, **options)
    # InfoNCE's own rounding stays where several positives take most of its gradient back.
    slack = {"mask": 3, "positive": 6}[duplicates]
    for name, *values in zip(("loss", "audio", "text"), found, plain, exact, strict=False):
        assert_as_exact(name, *(x.flatten() for x in values), slack=slack)
    torch.testing.assert_close(found[3].double(), exact[3], rtol=1e-6, atol=2e-7)


def test_backward_twice_gives_the_same_gradients():
    audio, text = (x.requires_grad_() for x in pairs(9, 5))
    loss = infonce(audio, text, 20.0)
    first = torch.autograd.grad(loss, [audio, text], retain_graph=True)
    second = torch.autograd.grad(loss, [audio, text])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("direction", ["symmetric", "a2t"])
@pytest.mark.parametrize("masked", [False, True])
def test_extra_captions_are_negatives_only(direction, masked):
    audio, text = pairs(5, 4)
    text = torch.cat([text, pairs(7, 4, seed=1)[1]])
    scale = torch.tensor(20.0, dtype=torch.float64)
    # Extra captions 6 and 8 say what clips 1 and 2 have as their own.
    ids = torch.tensor([0, 1, 2, 1, 4, 5, 1, 7, 2, 9, 10, 11])
    options = {"direction": direction, "ids": ids if masked else None}
    found = loss_and_gradients(infonce, audio, text, scale, **options)
    exact = loss_and_gradients(infonce_reference, audio, text, scale, **options)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ids": torch.zeros(4, 0, dtype=torch.long)}, r"ids must be \(N,\) or \(N, K\)"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"ids must be .* = \(4\), got \(3,\)"),
        ({"ids": torch.zeros(3, 2, dtype=torch.long)}, r"ids must be .*, got \(3, 2\)"),
        ({"duplicates": "drop"}, "duplicates must be one of mask, positive, got 'drop'"),
        ({"direction": "t2a"}, "direction must be symmetric or a2t where text has more rows"),
        (
            {"ids": torch.zeros(4, dtype=torch.long), "duplicates": "positive"},
            "duplicates must be mask where text has more rows",
        ),
    ],
)
def test_what_does_not_fit_is_named(options, says):
    audio, text = pairs(4, 3)
    with pytest.raises(ValueError, match=says):
        infonce(audio[:3], text, 1.0, **options)
