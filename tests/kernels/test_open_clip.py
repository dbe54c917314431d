"""Losses with open_clip's signatures: its values, and the gradients that DDP averages to its.

Where open_clip is installed, it is compared with. Its own tests of losses and tasks can be run on
these modules: in its checkout, with a plugin `dropin.py` on the path that replaces them,

    import open_clip
    import flap_kernels.open_clip as ours

    for module in (open_clip, open_clip.loss, open_clip.factory):
        for name in ("ClipLoss", "SigLipLoss"):
            if hasattr(module, name):
                setattr(module, name, getattr(ours, name))

    python -m pytest -p dropin tests/test_loss.py tests/test_task_*.py tests/test_*_task.py
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flap_kernels.infonce import infonce_reference
from flap_kernels.open_clip import ClipLoss, SigLipLoss
from flap_kernels.sigmoid_loss import sigmoid_loss_reference
from tests.kernels.test_infonce import pairs
from tests.ranks import on_ranks

SHAPES = [(), (1,)]
IMPLEMENTATIONS = ["bidir", "shift", "reduce", "gather"]


def arguments(shape=(), B=12):
    """Matched rows, a scale and a bias of one shape, all with gradients."""
    rows = [x.requires_grad_() for x in pairs(B, 8)]
    return *rows, *(torch.full(shape, x, dtype=torch.float64).requires_grad_() for x in (9.0, -7.0))


def gradients(loss, leaves):
    """Gradients, zeros where the loss depends on none."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_loss_is_infonce_and_its_bias_gets_a_gradient_of_nil(shape):
    audio, text, scale, bias = leaves = arguments(shape)
    exact = infonce_reference(audio, text, scale.reshape(()))
    loss = ClipLoss()(audio, text, scale, bias)
    assert loss.shape == ()
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    # A parameter that a loss leaves out stops DDP: the bias takes part, with 0.
    found = torch.autograd.grad(loss, leaves)
    for mine, true in zip(found, gradients(exact, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_loss_is_the_sigmoid_loss(shape):
    audio, text, scale, bias = leaves = arguments(shape)
    exact = sigmoid_loss_reference(audio, text, scale.reshape(()), bias.reshape(()))
    loss = SigLipLoss(chunk_size=3)(
        image_features=audio, text_features=text, logit_scale=scale, logit_bias=bias
    )
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    for mine, true in zip(gradients(loss, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    without = SigLipLoss()(audio, text, scale, None)
    none = sigmoid_loss_reference(audio, text, scale.reshape(()), torch.zeros(()))
    torch.testing.assert_close(without, none, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_a_dictionary_holds_the_loss_under_open_clips_key(loss):
    audio, text, scale, bias = arguments()
    found = loss()(audio, text, logit_scale=scale, logit_bias=bias, output_dict=True)
    assert list(found) == ["contrastive_loss"]
    assert torch.equal(found["contrastive_loss"], loss()(audio, text, scale, bias))


def test_towers_of_two_types_meet_in_the_wider_one():
    audio, text = (x.float() for x in pairs(6, 8))
    mixed = ClipLoss()(audio, text.bfloat16(), torch.tensor(5.0))
    assert torch.equal(mixed, ClipLoss()(audio, text.bfloat16().float(), torch.tensor(5.0)))
    narrow = ClipLoss(precision="bf16")(audio, text, torch.tensor(5.0))
    assert torch.equal(narrow, ClipLoss()(audio.bfloat16(), text.bfloat16(), torch.tensor(5.0)))


def test_what_it_cannot_do_is_refused_by_name():
    audio, text, scale, bias = arguments()
    with pytest.raises(ValueError, match="use_horovod must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl must be one of bidir, .*'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match=r"logit_scale must hold one number, got shape \(12, 8\)"):
        ClipLoss()(audio, text, audio)
    for loss in (ClipLoss(), SigLipLoss()):
        for more in (torch.cat([text, text]), text[:5], text[0]):
            with pytest.raises(ValueError, match=r"^text_features must be \(b, D\) like image_fe"):
                loss(audio, more, scale, bias)
    for loss in (ClipLoss(gather_with_grad=True, world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(ValueError, match="world_size must be the number of ranks, 1, got 2"):
            loss(audio, text, scale, bias)


def test_gathering_without_gradients_is_not_done_and_said():
    with pytest.warns(UserWarning, match="gather_with_grad=False"):
        ClipLoss(world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipLoss()
        ClipLoss(True, True, False, 1, 2)


class Towers(nn.Module):
    """Two linear towers, a scale and a bias."""

    def __init__(self, shape):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.audio, self.text = (
            nn.Parameter(torch.randn(8, 8, generator=draw).double()) for _ in "ab"
        )
        self.scale, self.bias = (
            nn.Parameter(torch.full(shape, x, dtype=torch.float64)) for x in (9.0, -7.0)
        )

    def forward(self, audio, text):
        sides = F.normalize(audio @ self.audio, dim=1), F.normalize(text @ self.text, dim=1)
        return *sides, self.scale * 1.0, self.bias * 1.0


def trained(loss, audio, text, shape=(1,)):
    """On one rank: the loss, and the parameters' gradients as DDP leaves them."""
    towers = Towers(shape)
    model = DistributedDataParallel(towers)
    value = loss(*model(audio, text))
    value.backward()
    return [value.detach(), *(x.grad for x in towers.parameters())]


def losses_of_own_rows(audio, text):
    """On one rank: a world_size of 1 leaves other ranks out."""
    half = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    audio, text = audio[half], text[half]
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (9.0, -7.0))
    found = [ClipLoss()(audio, text, scale), SigLipLoss()(audio, text, scale, bias)]
    exact = infonce_reference(audio, text, scale), sigmoid_loss_reference(audio, text, scale, bias)
    assert_equal(found, exact)


def test_a_world_of_1_leaves_other_ranks_out():
    on_ranks(2, losses_of_own_rows, *pairs(12, 8))


def ranks_losses(audio, text, module, runs):
    """On one rank: by run, what `trained` finds with ours, and with the module named if any."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(audio) // world, (rank + 1) * len(audio) // world)
    rows = audio[mine], text[mine]
    theirs = importlib.import_module(module) if module else None
    found = []
    for name, options in runs:
        options = options | {"rank": rank, "world_size": world}
        ours: Any = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
        made = [ours(**options), *([getattr(theirs, name)(**options)] if theirs else [])]
        found.append([trained(loss, *rows) for loss in made])
    return found


CLIP_RUNS = [
    ("ClipLoss", {"local_loss": local, "gather_with_grad": True}) for local in (False, True)
]
SIGLIP_RUNS = [("SigLipLoss", {"dist_impl": name}) for name in IMPLEMENTATIONS]


def exact_of_whole(name, audio, text):
    """The loss of all rows in one process, and the gradients of `Towers`."""
    towers = Towers((1,))
    rows, scale = towers(audio, text)[:2], towers.scale.reshape(())
    if name == "ClipLoss":
        loss = infonce_reference(rows[0], rows[1], scale) + 0.0 * towers.bias.sum()
    else:
        loss = sigmoid_loss_reference(rows[0], rows[1], scale, towers.bias.reshape(()))
    loss.backward()
    return [loss.detach(), *(x.grad for x in towers.parameters())]


def assert_equal(found, exact, rtol=1e-11):
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=rtol, atol=1e-13)


@pytest.mark.filterwarnings("ignore:gather_with_grad")
def test_under_ddp_the_gradients_are_those_of_the_whole_batch():
    audio, text = pairs(12, 8)
    runs = [*CLIP_RUNS, ("ClipLoss", {}), ("SigLipLoss", {})]
    for found in on_ranks(2, ranks_losses, audio, text, None, runs):
        for (name, _), (ours,) in zip(runs, found, strict=True):
            assert_equal(ours, exact_of_whole(name, audio, text))


@pytest.mark.parametrize("world", [2, 3])
def test_open_clip_over_ranks_has_these_gradients_and_the_mean_of_its_values(world):
    pytest.importorskip("open_clip")
    audio, text = pairs(12, 8)
    runs = CLIP_RUNS + SIGLIP_RUNS
    by_rank = on_ranks(world, ranks_losses, audio, text, "open_clip.loss", runs)
    for i, (name, options) in enumerate(runs):
        values = torch.stack([found[i][1][0] for found in by_rank])
        for found in by_rank:
            ours, theirs = found[i]
            assert_equal(ours[1:], theirs[1:])
            torch.testing.assert_close(ours[0], values.mean(), rtol=1e-12, atol=0)
            if options.get("local_loss") is False:
                torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
        local = name == "SigLipLoss" or options["local_loss"]
        assert (values.std() > 1e-3) == local, "a local mean differs from rank to rank"


@pytest.mark.filterwarnings("ignore:gather_with_grad")
@pytest.mark.parametrize("world", [2, 3])
def test_open_clip_without_gradients_of_the_gather_has_1_of_w_or_others(world):
    pytest.importorskip("open_clip")
    audio, text = pairs(12, 8)
    runs = [("ClipLoss", {"local_loss": local}) for local in (False, True)]
    exact = exact_of_whole("ClipLoss", audio, text)
    for whole, local in on_ranks(world, ranks_losses, audio, text, "open_clip.loss", runs):
        towers, scale = slice(1, 3), slice(3, 4)
        names = [name for name, _ in Towers(()).named_parameters()]
        assert names == ["audio", "text", "scale", "bias"]
        for ours, theirs in (whole, local):
            assert_equal(ours, exact)
            assert_equal(theirs[scale], exact[scale])
        assert_equal(whole[1][towers], [x / world for x in exact[towers]])
        for mine, true in zip(local[1][towers], exact[towers], strict=True):
            assert not torch.allclose(mine, true, rtol=0.1)
            assert not torch.allclose(mine, true / world, rtol=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_open_clip_on_one_process_has_these_values_and_gradients(name, shape):
    pytest.importorskip("open_clip")
    theirs = getattr(importlib.import_module("open_clip.loss"), name)(cache_labels=True)
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name](cache_labels=True)
    leaves = arguments(shape)
    found, exact = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    assert_equal(gradients(found, leaves), gradients(exact, leaves))
