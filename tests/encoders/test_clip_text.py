"""CLIP's text transformer beside transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flap_fast.config import Config, Joint
from flap_fast.encoders.clip_text.model import Block, ClipText
from flap_fast.model.heads import LinearHead
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import tiny_clip

MAX_TOKENS = 21
END = 383  # the highest of the byte tokenizer's ids


def built(config: Config, *, recompute: bool = False) -> ClipText:
    tower = config.text.build(recompute=recompute)
    assert isinstance(tower, ClipText)
    return tower


def captions(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random ids that end in END, padded with 0 to a multiple of 8, and their mask."""
    mask = (torch.arange(-(-max(lengths) // 8) * 8) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, END, mask.shape) * mask
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return ids, mask


def tower(*overrides: str) -> ClipText:
    torch.manual_seed(0)
    return built(tiny_clip(f"text.max_tokens={MAX_TOKENS}", *overrides))


def transformers_clip(flap: TwoTowers) -> CLIPTextModelWithProjection:
    """The same weights in transformers' model."""
    text, head = flap.text, flap.text_head
    assert isinstance(text, ClipText)
    assert isinstance(head, nn.Linear)
    config = CLIPTextConfig(
        vocab_size=text.token_embedding.num_embeddings,
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=len(text.transformer.resblocks),
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=head.out_features,
        eos_token_id=END,
    )
    weights = {
        "text_projection.weight": head.weight,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
    }
    norms = {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    linear = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        weights[f"text_model.final_layer_norm.{kind}"] = getattr(text.ln_final, kind)
        for n, block in enumerate(text.transformer.resblocks):
            layer = f"text_model.encoder.layers.{n}"
            three = block.get_parameter(f"attn.in_proj_{kind}").chunk(3)
            for name, part in zip("qkv", three, strict=True):
                weights[f"{layer}.self_attn.{name}_proj.{kind}"] = part
            for ours, theirs in {**norms, **linear}.items():
                weights[f"{layer}.{theirs}.{kind}"] = getattr(block.get_submodule(ours), kind)
    theirs = CLIPTextModelWithProjection(config)
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    assert weights.keys() >= dict(theirs.named_parameters()).keys()
    return theirs.eval()


def test_the_tower_equals_transformers_clip():
    torch.manual_seed(0)
    flap = TwoTowers(tiny_clip(f"text.max_tokens={MAX_TOKENS}", "text.depth=3")).eval()
    for p in flap.text.parameters():  # biases and norms too
        p.data += 0.1 * torch.randn_like(p)
    ids, mask = captions(4, MAX_TOKENS, 1, 9)
    theirs = transformers_clip(flap)(input_ids=ids[:, :MAX_TOKENS]).text_embeds
    ours = flap.text_head(flap.text(ids, mask))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_follows_the_end_of_a_caption_changes_nothing():
    text = tower().eval()
    ids, mask = captions(5, 16)
    other = ids.where(mask.bool(), torch.tensor(7))
    torch.testing.assert_close(text(other, mask), text(ids, mask), rtol=0, atol=0)
    torch.testing.assert_close(text(ids[:1, :8], mask[:1, :8]), text(ids, mask)[:1])


def test_every_token_of_a_caption_reaches_its_vector():
    text = tower().eval()
    ids, mask = captions(6)
    whole = text(ids, mask)
    for n in range(6):
        other = ids.clone()
        other[0, n] = 200 if ids[0, n] != 200 else 201
        assert not torch.allclose(text(other, mask), whole), n


def test_captions_that_the_tower_has_no_positions_for_are_refused():
    text = tower()
    ids = torch.ones(2, 24, dtype=torch.long)
    mask = (torch.arange(24) < torch.tensor([[MAX_TOKENS + 1], [3]])).long()
    with pytest.raises(ValueError, match=r"1 to 21 tokens \(text.max_tokens\), got 3 to 22"):
        text(ids, mask)
    with pytest.raises(ValueError, match="got 0 to 3"):
        text(ids, mask * (mask.sum(1, keepdim=True) < 4))


def test_dropout_is_at_the_embeddings_the_attention_and_both_branches(monkeypatch):
    drops: list[float] = []
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def counted(x, p, training):
        drops.append(p if training else 0)
        return dropout(x, p, training)

    def attended(q, k, v, *, dropout_p, is_causal):
        drops.append(dropout_p)
        return attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(functional, "dropout", counted)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attended)
    text = tower("text.dropout=0.25", "text.depth=2")
    text(*captions(5))
    assert drops == [0.25] * (1 + 2 * 3)
    drops.clear()
    text.eval()(*captions(5))
    assert drops == [0.0] * (1 + 2 * 3)


def test_first_weights_are_spread_as_openais():
    text = tower("text.width=64", "text.depth=2")
    block = text.transformer.resblocks[1]
    assert isinstance(block, Block)
    for weight, std in (
        (text.token_embedding.weight, 0.02),
        (text.positional_embedding, 0.01),
        (block.attn.in_proj_weight, 64**-0.5),
        (block.attn.out_proj.weight, 64**-0.5 / 2),
        (block.get_parameter("mlp.c_fc.weight"), 128**-0.5),
        (block.get_parameter("mlp.c_proj.weight"), 64**-0.5 / 2),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    head = LinearHead(256, Joint(width=128))
    assert head.bias is None
    assert head.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert (block.attn.in_proj_bias == 0).all()
    assert (block.attn.out_proj.bias == 0).all()


def test_blocks_computed_again_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        text = built(tiny_clip("text.dropout=0.5"), recompute=recompute)
        runs: list[int] = []
        first = text.get_submodule("transformer.resblocks.0.mlp")
        first.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        text(*captions(5, 8)).pow(2).sum().backward()
        assert len(runs) == 1 + recompute
        gradients.append({name: p.grad for name, p in text.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_frozen_tower_stays_as_it_is_and_drops_nothing():
    text = TwoTowers(tiny_clip("text.freeze=true", "text.dropout=0.5")).train().text
    ids, mask = captions(5)
    assert not text(ids, mask).requires_grad
    torch.testing.assert_close(text(ids, mask), text(ids, mask), rtol=0, atol=0)
