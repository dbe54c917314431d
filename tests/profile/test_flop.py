"""A step's products, and PyTorch's own count of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flap_fast.model.flap import Flap
from flap_fast.model.masking import kept_patches, mask_plan
from flap_fast.profile.flop import TextShape, contrastive_flop, decoder_flop, step_flop
from flap_kernels import infonce_chunks
from tests.tiny import HTSAT as TINY_HTSAT
from tests.tiny import tiny


def embedding_flops(mel, keep, weight, *_, out_shape, **__) -> int:
    """Of an op of ours, which PyTorch's counter cannot look into."""
    return 2 * keep[0] * keep[1] * weight[0] * weight[1]


def embedding_backward_flops(grad, *_, out_shape, **__) -> int:
    weight, _ = out_shape
    return 2 * grad[0] * grad[1] * weight[0] * weight[1]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mask.kind=none", "text.pool=mean", "audio.use_cls=false"),
        ("text.freeze=true",),
        ("train.checkpoint_activations=true",),
        ("train.checkpoint_activations=audio",),
        ("train.checkpoint_activations=text",),
        TINY_HTSAT,
        (*TINY_HTSAT, "train.checkpoint_activations=audio"),
        (*TINY_HTSAT, "train.checkpoint_activations=audio", "audio.drop_path=0"),
    ],
)
def test_a_steps_products_are_as_many_as_pytorch_counts_forward_and_backward(overrides: tuple):
    config = tiny(*overrides)
    model = Flap(config).train()
    plan = mask_plan(config.mask, config.audio.grid, 0, torch.arange(3))
    ids = torch.randint(3, 90, (3, 16))
    ours = {
        torch.ops.flap_kernels.patch_embed: embedding_flops,
        torch.ops.flap_kernels.patch_embed_backward: embedding_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=ours)
    with sdpa_kernel(SDPBackend.MATH), counter:
        mel = torch.randn(3, 1, config.audio.frames, config.audio.mel_bins)
        outputs = model(mel, ids, torch.ones_like(ids), plan)
        (outputs["audio"] * outputs["text"]).sum().backward()
    kept = kept_patches(config.mask, config.audio.grid)
    text = TextShape.of(model.text.inner.config)
    parts = step_flop(config, text, [16] * 3, kept=kept)
    assert counter.get_total_flops() == parts["audio tower"].total + parts["text tower"].total


def added_product_flops(_, left, right, **__) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(("world", "scheme"), [(1, "auto"), (4, "sharded"), (4, "replicated")])
def test_the_losss_products_are_as_many_as_pytorch_counts(world: int, scheme: str):
    """Of a rank with 6 of its ranks' clips: sums, then gradients, as each scheme asks for them."""
    config = tiny(f"loss.contrastive.scheme={scheme}")
    d = config.joint.width
    mine, others = torch.randn(6, d), torch.randn(6 * world, d)
    in_place = {torch.ops.aten.addmm_: added_product_flops}  # PyTorch's counter leaves it out
    scale, counter = torch.tensor(5.0), FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        # Replicated: its audio against all text, and its text against all audio.
        for _ in range(2 if scheme == "replicated" else 1):
            found = infonce_chunks.negatives(mine, others, scale, offset=0)
            assert found.rows is not None
            assert found.columns is not None
            row, column = (
                infonce_chunks.losses_and_side(side, torch.zeros(()))[1]
                for side in (found.rows, found.columns)
            )
            one, both = torch.ones(()), scheme != "replicated"
            infonce_chunks.gradients(mine, others, scale, row, column, one, offset=0, columns=both)
    assert counter.get_total_flops() == contrastive_flop(config, 6, world).total
    least = 8 * 6 * 6 * world * d
    assert counter.get_total_flops() == (1.5 * least if scheme == "replicated" else least)


def test_flaps_decoder_adds_what_the_specification_says():
    """SPEC 14: 61.9 G multiply-adds for 8 clips (4 x 512, 513 tokens, 306 of 512 patches kept)."""
    norms = 8 * 9 * 5 * 513 * 512
    flop = decoder_flop(8, 306, 512, (768, 512, 4, 256)).forward
    assert (flop / 2 + norms) / 1e9 == pytest.approx(61.9, abs=0.05)
