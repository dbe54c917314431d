"""Sentences through the text tower in one pass, twice where a loss wants two views of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.tokenize import tokenizer
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import Outputs, TwoTowers
from tests.tiny import tiny

CAPTIONS = ["a dog barks", "rain", "a tone that rises and falls", "wind in the leaves"]
SIMCSE = ("loss.simcse.weight=0.5", "text.dropout=0.1")


def settings(packing: str, *overrides: str) -> Config:
    return tiny(f"text.packing={packing}", "mask.kind=none", *SIMCSE, *overrides)


def inputs(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The captions of four clips, as often as the config wants them."""
    mel = torch.randn(4, 1, 112, 128, generator=torch.Generator().manual_seed(1))
    ids, attention_mask = tokenizer(config.text)(CAPTIONS * len(config.loss.sentences))
    return mel, ids, attention_mask


def model_of(config: Config) -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(config)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_two_views_of_a_caption_differ_by_dropout_alone(packing: str):
    config = settings(packing)
    model = model_of(config)
    with torch.no_grad():
        outputs = model(*inputs(config))
        still = model.eval()(*inputs(config))
    for found in (outputs, still):
        assert list(found) == ["media", "scale", "recon", "text", "text_again"]
        assert found["text"].shape == found["text_again"].shape == (4, 16)
        torch.testing.assert_close(found["text_again"].norm(dim=1), torch.ones(4))
    assert torch.equal(still["text"], still["text_again"])
    cosines = (outputs["text"] * outputs["text_again"]).sum(1)
    assert ((cosines > 0.5) & (cosines < 0.9999)).all()
    # Of independent draws each view is as far from the other as it is from none, by root two.
    first, second = ((outputs[n] - still["text"]).norm() for n in ("text", "text_again"))
    apart = (outputs["text"] - outputs["text_again"]).norm()
    assert apart > 0.9 * min(first, second)


def test_the_captions_embedding_is_that_of_a_model_without_other_sentences():
    config, plain = settings("packed"), tiny("text.packing=packed", "mask.kind=none")
    with torch.no_grad():
        found = model_of(config).eval()(*inputs(config))
        alone = model_of(plain).eval()(*inputs(plain))
    assert list(alone) == ["media", "scale", "recon", "text"]
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def gradients(config: Config, loss: Callable[[Outputs], Tensor]) -> dict[str, Tensor]:
    model = model_of(config)
    torch.manual_seed(2)
    loss(model(*inputs(config))).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_layers_computed_again_draw_the_dropout_that_they_drew(packing: str):
    config = settings(packing, "text.depth=1")
    kept = gradients(config, lambda outputs: total_loss(outputs, config)["simcse"])
    again = settings(packing, "text.depth=1", "train.checkpoint_activations=text")
    found = gradients(again, lambda outputs: total_loss(outputs, again)["simcse"])
    assert found.keys() == kept.keys()
    assert any(gradient.any() for gradient in kept.values())
    for name, gradient in kept.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_simcse_reaches_the_text_side_alone_and_through_both_views():
    config = settings("packed")
    whole = gradients(config, lambda outputs: total_loss(outputs, config)["simcse"])
    assert whole["text_head.0.weight"].any()
    assert not any(name.startswith(("audio", "logit_scale")) for name in whole)

    def of_one(view: str) -> Callable[[Outputs], Tensor]:
        def loss(outputs: Outputs) -> Tensor:
            held = {name: x.detach() for name, x in outputs.items() if isinstance(x, Tensor)}
            return total_loss({**outputs, view: held[view]}, config)["simcse"]  # type: ignore[misc]

        return loss

    parts = [gradients(config, of_one(view)) for view in ("text", "text_again")]
    for name, gradient in whole.items():
        summed = parts[0][name] + parts[1][name]
        torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-6, msg=name)
