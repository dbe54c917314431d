"""A step's products, and PyTorch's own count of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flap_fast.model.masking import kept_patches
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.flop import TextShape, contrastive_flop, decoder_flop, step_flop
from flap_fast.tools.profile.synthetic import SyntheticLoader
from flap_fast.train.engine import PlainEngine
from flap_fast.train.step import Gradients
from flap_kernels.infonce.backend import Targets, losses_and_sums
from flap_kernels.infonce.torch_tiled import TorchTiled
from flap_kernels.masked_mse import _masked_mse, _masked_mse_backward
from tests.tiny import tiny

# Ops of ours, which PyTorch's counter cannot look into, and products that it leaves out.
OURS: dict[Any, Any] = {}


def counted_as(*operators: Any):
    def add(function: Any) -> Any:
        return [OURS.update({operator: function}) for operator in operators] and function

    return add


@counted_as(torch.ops.flap_kernels.patch_embed)
def embedding_flops(mel, keep, weight, *_, out_shape, **__) -> int:
    return 2 * keep[0] * keep[1] * weight[0] * weight[1]


@counted_as(torch.ops.flap_kernels.patch_embed_backward)
def embedding_backward_flops(grad, *_, out_shape, **__) -> int:
    weight, _ = out_shape
    return 2 * grad[0] * grad[1] * weight[0] * weight[1]


@counted_as(torch.ops.flap_kernels.masked_mse)
def error_flops(hidden, weight, *_, **__) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0] * weight[1]


@counted_as(torch.ops.flap_kernels.masked_mse_backward)
def error_backward_flops(grad, hidden, weight, *_, **__) -> int:
    return 3 * error_flops(hidden, weight)


@counted_as(torch.ops.flap_kernels.infonce)
def infonce_flops(audio, text, *_, **__) -> int:
    return 2 * audio[0] * text[0] * audio[1]


@counted_as(torch.ops.flap_kernels.infonce_backward)
def infonce_backward_flops(audio, text, *_, **__) -> int:
    return 3 * infonce_flops(audio, text)


@counted_as(torch.ops.aten.addmm_)
def added_product_flops(_, left, right, **__) -> int:
    return 2 * left[0] * left[1] * right[1]


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=OURS)


def test_inside_of_the_masked_error_there_are_as_many_products_as_it_is_counted_for():
    """Of 2 x 3 dropped patches of 4 x 4 pixels, 8 wide."""
    hidden, weight, bias = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    mel, drop = torch.randn(2, 16, 8), torch.arange(3).expand(2, 3)
    rest = (hidden, weight, bias, mel, drop, 4, True, torch.float32)
    with counter() as forward:
        _masked_mse._init_fn(*rest)
    with counter() as backward:
        _masked_mse_backward._init_fn(torch.ones(()), *rest)
    assert forward.get_total_flops() == error_flops((2, 3, 8), (16, 8)) == 2 * 6 * 8 * 16
    assert backward.get_total_flops() == error_backward_flops((), (2, 3, 8), (16, 8))


RECON = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=3", "decoder.heads=2")
CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")
MICRO = "train.micro_batch=2"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mask.kind=none", "text.pool=mean", "audio.use_cls=false"),
        ("text.freeze=true",),
        ("train.checkpoint_activations=true",),
        ("train.checkpoint_activations=audio",),
        ("train.checkpoint_activations=text",),
        RECON,
        (*RECON, "audio.use_cls=false", "train.checkpoint_activations=decoder"),
        (*CYCLIC, "loss.cyclic.form=tiled"),
        ("loss.cyclic.cross_weight=1", "loss.cyclic.form=tiled"),
        (*CYCLIC, "loss.cyclic.form=gram"),
        ("loss.cyclic.in_weight=1", "joint.width=2", "loss.contrastive.weight=0"),
        (MICRO,),
        (MICRO, "train.checkpoint_activations=true", *RECON, *CYCLIC),
        (MICRO, "text.freeze=true", *RECON, "train.replay=keep"),
        (MICRO, "train.accumulation=local", *RECON, *CYCLIC),
    ],
)
def test_a_steps_products_are_as_many_as_pytorch_counts_in_the_trainers_step(overrides: tuple):
    """Of the trainer's own passes, on captions of several lengths."""
    config = tiny("train.global_batch=6", *overrides)
    engine = PlainEngine(config, TwoTowers(config).train(), Ranks())
    encoder = engine.module.text.inner.config
    gradients = Gradients(config, Ranks(), engine, 1000, 1000)
    loader = SyntheticLoader(config, encoder, Ranks())
    batches = list(loader.batches(0, 1, times=gradients.reads))
    # Attention as plain products: the counter does not know the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        gradients(1, iter(batches))
    first = batches[: config.train.micro_batches(1)]
    lengths = [n for batch in first for n in batch.attention_mask.sum(1).tolist()]
    assert len(set(lengths)) > 1
    kept = kept_patches(config.mask, config.audio.grid)
    parts = step_flop(config, TextShape.of(encoder), lengths, kept=kept)
    assert counted.get_total_flops() == sum(part.total for part in parts.values())


def test_what_a_second_pass_adds_is_a_forward_of_the_towers():
    whole, halves = (
        step_flop(tiny("train.global_batch=4", *more), TextShape(32, 2, 2, 128), [9] * 4, kept=30)
        for more in (RECON, (*RECON, "train.micro_batch=2"))
    )
    for name, part in whole.items():
        added = part.forward if "tower" in name else 0
        assert halves[name].total == part.total + added, name


@pytest.mark.parametrize(("world", "scheme"), [(1, "auto"), (4, "sharded"), (4, "replicated")])
def test_the_losss_products_are_as_many_as_pytorch_counts(world: int, scheme: str):
    """Of a rank with 6 of its ranks' clips: sums, then gradients, as each scheme asks for them."""
    config = tiny(f"loss.contrastive.scheme={scheme}")
    d = config.joint.width
    mine, others = torch.randn(6, d), torch.randn(6 * world, d)
    scale = torch.tensor(5.0)
    backend, targets = TorchTiled(), Targets()
    with counter() as counted:
        # Replicated: its audio against all text, and its text against all audio.
        for _ in range(2 if scheme == "replicated" else 1):
            found = backend.sums(mine, others, scale, targets)
            assert found.row_lse_negatives is not None
            assert found.column_lse_negatives is not None
            row, column = (
                losses_and_sums(lse, torch.zeros(()))[1]
                for lse in (found.row_lse_negatives, found.column_lse_negatives)
            )
            one, both = torch.ones(()), scheme != "replicated"
            backend.gradients(mine, others, scale, row, column, one, targets, y_wanted=both)
    assert counted.get_total_flops() == contrastive_flop(config, 6, world).total
    least = 8 * 6 * 6 * world * d
    assert counted.get_total_flops() == (1.5 * least if scheme == "replicated" else least)


def test_flaps_decoder_adds_what_the_specification_says():
    """SPEC 14: 61.9 G multiply-adds for 8 clips (4 x 512, 513 tokens), all patches predicted.

    We predict but the 206 of 512 that are dropped.
    """
    config = tiny("audio.size=base", "audio.width=768", "audio.duration_s=10", "audio.frames=1024")
    norms, rest = 8 * 9 * 5 * 513 * 512, 8 * 306 * 512 * 256
    flop = decoder_flop(config, 8, 306).forward
    assert (flop / 2 + norms + rest) / 1e9 == pytest.approx(61.9, abs=0.05)
