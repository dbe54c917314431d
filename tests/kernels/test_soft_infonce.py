"""InfoNCE against a teacher's probabilities: alone and over ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flap_kernels import infonce, soft_infonce
from flap_kernels.launch import HAS_TRITON
from flap_kernels.soft_infonce import soft_infonce_reference
from flap_kernels.spec import Inputs, Kernel
from tests.kernels.test_distributed_infonce import CUTS, SCHEMES
from tests.kernels.test_every_kernel import check_as_exact, strided
from tests.kernels.test_infonce import DIRECTIONS, pairs
from tests.ranks import on_ranks

NAMES = ("loss", "audio", "text", "scale")


def of_teacher(B, E=6, dtype=torch.float64):
    return *pairs(B, E, seed=3, dtype=dtype), torch.tensor(9.0, dtype=dtype)


def loss_and_gradients(loss, audio, text, teacher, scale=20.0, **options):
    scale = torch.tensor(scale, dtype=audio.dtype)
    leaves = [x.detach().clone().requires_grad_() for x in (audio, text, scale)]
    value = loss(*leaves, *teacher, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(found, exact):
    for name, mine, theirs in zip(NAMES, found, exact, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


def inputs(size, generator):
    B, D, E = {"edge": (2, 2, 3), "odd": (77, 37, 21)}[size]
    draw = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    rows: dict[str, Any] = {}
    for side, width in (("", D), ("teacher_", E)):
        rows[f"{side}audio"] = F.normalize(torch.randn(B, width, **draw), dim=1)
        noise = torch.randn(B, width, **draw) / width**0.5
        rows[f"{side}text"] = F.normalize(rows[f"{side}audio"] + noise, dim=1)
    for side, scale in (("", 14.3), ("teacher_", 9.0)):
        rows[f"{side}scale"] = torch.full((), scale, device=generator.device, dtype=torch.float64)
    return Inputs(rows, ("audio", "text", "scale"), ("scale", "teacher_scale"))


# Probabilities are rounded to the embeddings' type before their products; two losses are added.
AS_KERNEL = Kernel("soft_infonce", soft_infonce, soft_infonce_reference, inputs, slack=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["edge", "odd"])
def test_it_is_as_exact_as_its_reference(size, dtype, device):
    for prepare in (dict, strided):
        check_as_exact(AS_KERNEL, size, dtype, device, draws=4, prepare=prepare)


def test_two_pairs_by_hand():
    # A teacher that knows nothing, scale 0: half of -log p for the pair and half for the other.
    eye = torch.eye(2)
    loss = soft_infonce(eye, eye, 1.0, eye, eye, 0.0)
    assert loss.item() == pytest.approx(0.31326168751822286 + 0.5, rel=1e-6)


def test_a_teacher_that_is_sure_of_its_pairs_gives_infonce():
    audio, text = pairs(30, 8)
    loss = soft_infonce(audio, text, 20.0, torch.eye(30).double(), torch.eye(30).double(), 1e4)
    torch.testing.assert_close(loss, infonce(audio, text, 20.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", [1, 2, 33, 700])
def test_float64_agrees_with_autograd(B, direction):
    given = *pairs(B, 12), of_teacher(B)
    exact = loss_and_gradients(soft_infonce_reference, *given, direction=direction)
    assert_same(loss_and_gradients(soft_infonce, *given, direction=direction), exact)


def test_the_student_alone_gets_gradients():
    audio, text = pairs(5, 4)
    teacher = [x.requires_grad_() for x in of_teacher(5)]
    loss = soft_infonce(audio.requires_grad_(), text, 20.0, *teacher)
    found = torch.autograd.grad(loss, [audio, *teacher], allow_unused=True)
    assert found[0] is not None
    assert found[1:] == (None,) * 3


def compared(audio, text, clips, captions, cuts):
    """On one rank: this rank's loss and gradients against the whole's, by scheme and direction."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(cuts[rank], cuts[rank + 1])
    tolerance = 1e-12 if audio.dtype == torch.float64 else 1e-5
    teacher_scale = torch.tensor(9.0, dtype=audio.dtype)
    for direction in DIRECTIONS:
        teacher = clips.double(), captions.double(), teacher_scale.double()
        exact = loss_and_gradients(
            soft_infonce_reference, audio.double(), text.double(), teacher, direction=direction
        )
        for scheme in SCHEMES:
            teacher = clips[mine], captions[mine], teacher_scale
            options: dict[str, Any] = {"direction": direction, "scheme": scheme}
            found = loss_and_gradients(soft_infonce, audio[mine], text[mine], teacher, **options)
            average = found[3].clone()
            dist.all_reduce(average)
            parts = [found[0], found[1] / world, found[2] / world, average / world]
            wholes = [exact[0], exact[1][mine], exact[2][mine], exact[3]]
            for part, whole in zip(parts, wholes, strict=True):
                largest = exact[1].abs().max().item() if part.ndim else whole.abs().item()
                torch.testing.assert_close(part.double(), whole, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("cuts", CUTS)
def test_ranks_match_the_whole(cuts):
    B = cuts[-1]
    on_ranks(len(cuts) - 1, compared, *pairs(B, 8), *of_teacher(B)[:2], cuts)


def compared_in_kernels(*arguments):
    """As `compared`, on a rank whose kernels run in the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    compared(*arguments)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_ranks_match_the_whole_in_the_kernels_too():
    rows = *pairs(60, 8, dtype=torch.float32), *of_teacher(60, dtype=torch.float32)[:2]
    on_ranks(2, compared_in_kernels, *rows, (0, 30, 60))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"teacher_text": torch.rand(4, 6)}, ValueError, r"^teacher_text must be \(B, E\)"),
        ({"teacher_text": torch.rand(7, 6)}, ValueError, r"^teacher_text must be \(B, E\)"),
        ({"teacher_audio": torch.rand(5)}, ValueError, r"^teacher_audio must be \(B, E\)"),
        ({"teacher_audio": torch.rand(5, 6).double()}, TypeError, "^teacher_audio must be of"),
        ({"teacher_text": torch.ones(5, 6).long()}, TypeError, "^teacher_text must be of"),
        ({"teacher_scale": torch.ones(1)}, ValueError, r"^teacher_scale must be \(\)"),
        ({"teacher_scale": torch.tensor(2)}, TypeError, "^teacher_scale must be float32"),
        ({"text": torch.rand(6, 3)}, ValueError, r"text must be \(B, D\) like audio"),
    ],
)
def test_what_does_not_fit_is_named(change, error, says):
    given: Any = {"audio": torch.rand(5, 3), "text": torch.rand(5, 3), "scale": 1.0}
    given |= {"teacher_audio": torch.rand(5, 6), "teacher_text": torch.rand(5, 6)}
    for direction in DIRECTIONS:
        with pytest.raises(error, match=says):
            soft_infonce(**(given | {"teacher_scale": 2.0, "direction": direction} | change))
