"""Reconstruction: against AudioMAE's decoder in plain PyTorch, and who gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.encoders.vit.patches import patchify, sine_positions
from flap_fast.losses import total_loss
from flap_fast.model.decoder import Decoder
from flap_fast.model.masking import patch_mask
from flap_fast.model.two_towers import TwoTowers
from flap_kernels import PatchMask
from tests.tiny import tiny

B, N, WIDTH = 3, 56, 32


def settings(*overrides: str) -> Config:
    small = ("decoder.width=24", "decoder.depth=2", "decoder.heads=2", "loss.recon.weight=0.5")
    return tiny(*small, *overrides)


def made(config: Config) -> tuple[Decoder, Tensor, PatchMask, Tensor]:
    """A decoder, tokens of the patches kept, the plan, and the log-mel to rebuild."""
    torch.manual_seed(0)
    assert isinstance(config.encoder, PatchEncoder)
    decoder = Decoder(config, config.encoder, WIDTH)
    plan = patch_mask(config.mask, config.audio.grid, 0, torch.arange(B))
    assert plan is not None
    tokens = torch.randn(B, config.audio.use_cls + plan.ids_keep.shape[1], WIDTH)
    return decoder, tokens, plan, torch.randn(B, 1, 112, 128) * 3 + 1


def audiomae(
    decoder: Decoder, config: Config, tokens: Tensor, plan: PatchMask, mel: Tensor
) -> Tensor:
    """As published: every patch predicted, all targets made, the mask picks."""
    cls = config.audio.use_cls
    y = decoder.embed(tokens)
    gaps = decoder.mask_token.expand(B, N - plan.ids_keep.shape[1], -1)
    restore = torch.cat([plan.ids_keep, plan.ids_drop], 1).argsort(1)
    x = torch.cat([y[:, cls:], gaps], 1)
    x = x.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    x = x + sine_positions(config.decoder.width, config.audio.grid)
    x = torch.cat([y[:, :1], x], 1) if cls else x
    x = decoder.norm(decoder.blocks(x))[:, cls:]
    predicted = functional.linear(x, decoder.pred.weight, decoder.pred.bias)
    target = patchify(mel, 16)
    if config.loss.recon.norm_pix:
        var, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    error = (predicted - target).square().mean(-1)
    masked = torch.ones(B, N).scatter_(1, plan.ids_keep, 0)
    return (error * masked).sum() / masked.sum()


@pytest.mark.parametrize(
    "override",
    ["mask.kind=2d", "mask.kind=1d", "audio.use_cls=false", "loss.recon.norm_pix=false"],
)
def test_the_error_and_its_gradients_are_those_of_audiomae(override: str):
    config = settings(override)
    decoder, tokens, plan, mel = made(config)
    wanted = (tokens.requires_grad_(), *decoder.parameters())
    errors = decoder(tokens, plan, mel), audiomae(decoder, config, tokens, plan, mel)
    ours, theirs = (torch.autograd.grad(error, wanted) for error in errors)
    torch.testing.assert_close(*errors, rtol=1e-6, atol=1e-6)
    for mine, published in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, published, rtol=1e-5, atol=1e-6)
        assert published.any()


def test_only_dropped_patches_are_compared():
    config = settings("loss.recon.norm_pix=false")
    decoder, tokens, plan, mel = made(config)
    before = decoder(tokens, plan, mel)
    for n, moves in ((int(plan.ids_keep[1, 4]), False), (int(plan.ids_drop[1, 4]), True)):
        other = mel.clone()
        other[1, 0, 16 * (n // 8), 16 * (n % 8)] += 1
        assert (decoder(tokens, plan, other) != before) == moves


def test_of_several_channels_the_first_is_rebuilt():
    decoder, tokens, plan, mel = made(settings())
    four = torch.cat([mel, torch.randn(B, 3, 112, 128)], 1)
    assert torch.equal(decoder(tokens, plan, four), decoder(tokens, plan, mel))


EVERYTHING = torch.arange(N).expand(B, -1)


@pytest.mark.parametrize("plan", [None, PatchMask(EVERYTHING, EVERYTHING[:, :0], EVERYTHING)])
def test_where_nothing_is_dropped_the_error_is_0_and_so_are_all_gradients(plan: PatchMask | None):
    decoder, tokens, _, mel = made(settings())
    error = decoder(tokens.requires_grad_(), plan, mel)
    error.backward()
    assert error.item() == 0
    assert tokens.grad is None
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def forward(config: Config, *, target: bool):
    torch.manual_seed(0)
    model = TwoTowers(config)
    torch.manual_seed(1)
    plan = patch_mask(config.mask, config.audio.grid, 0, torch.arange(B))
    mel = torch.randn(B, 1, 112, 128)
    ids = torch.randint(3, 200, (B, 8))
    return model, model(mel, ids, torch.ones_like(ids), plan, mel if target else None)


def test_the_towers_start_and_embed_alike_with_a_decoder_and_without():
    (bare, without), (model, outputs) = (
        forward(config, target=True) for config in (settings("loss.recon.weight=0"), settings())
    )
    names = set(model.state_dict()) - set(bare.state_dict())
    assert names == {name for name in model.state_dict() if name.startswith("decoder.")}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bare.state_dict().items())
    assert torch.equal(outputs["media"], without["media"])
    assert without["recon"] == 0


def test_reconstruction_enters_the_total_by_its_weight_and_reaches_the_encoder():
    config = settings("loss.contrastive.weight=0")
    model, outputs = forward(config, target=True)
    terms = total_loss(outputs, config)
    assert set(terms) == {"recon", "total"}
    assert terms["total"] == 0.5 * outputs["recon"] > 0
    terms["total"].backward()
    assert model.get_parameter("audio.patch_embed.weight").grad is not None
    assert model.get_parameter("text_head.0.weight").grad is None


def test_without_a_target_the_decoder_rests():
    _, outputs = forward(settings(), target=False)
    assert (outputs["recon"], outputs["recon"].requires_grad) == (0, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("mask.kind=none",),
            "loss.recon.weight must be 0 where nothing is masked, got 0.5",
        ),
        (("decoder.heads=5",), r"decoder.width must be a multiple of decoder.heads = 5, got 24"),
        (("decoder.width=18",), r"decoder.width must be a multiple of 4 \(2-D sines\), got 18"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(overrides: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        settings(*overrides)
