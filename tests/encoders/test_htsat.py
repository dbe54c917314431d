"""HTSAT against transformers' CLAP on the same weights, and what a trainer relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ClapAudioConfig
from transformers.models.clap.modeling_clap import ClapAudioEncoder

from flap_fast.encoders.htsat.model import HTSAT, SwinBlock, fold
from flap_fast.encoders.htsat.settings import HTSATSettings
from flap_fast.interchange.htsat_names import htsat_from_hf, htsat_to_hf
from flap_kernels import PatchMask
from tests.tiny import HTSAT as SMALLEST
from tests.tiny import htsat_of, tiny

# All of the real one's geometry (1001 x 64, four stages of 64 to 8 patches a side), narrow.
NARROW = HTSATSettings(width=16, heads=2, depths=(2, 2, 2, 2))
SMALL = htsat_of(tiny(*SMALLEST))


def theirs(audio: HTSATSettings, **settings: object) -> ClapAudioEncoder:
    """Transformers' encoder of the same sizes, every weight and statistic of it random."""
    torch.manual_seed(0)
    config = ClapAudioConfig(
        patch_embeds_hidden_size=audio.stages[0][0],
        depths=[depth for _, depth, _ in audio.stages],
        num_attention_heads=[heads for _, _, heads in audio.stages],
        num_mel_bins=audio.mel_bins,
        spec_size=audio.image_side,
        hidden_dropout_prob=0.0,
        **settings,  # type: ignore[arg-type]
    )
    encoder = ClapAudioEncoder(config)
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1 * torch.randn_like(value))
        for name, value in encoder.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(-30, 10)
            elif name.endswith("running_var"):
                value.uniform_(100, 400)
    return encoder


def decibels(audio: HTSATSettings, clips: int, channels: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(clips, channels, audio.frames, audio.mel_bins) * 15 - 30


def checked(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("audio", [NARROW, SMALL], ids=["narrow", "small"])
def test_it_is_transformers_clap(audio):
    hf, ours, mel = theirs(audio).eval(), HTSAT(audio).eval(), decibels(audio, 2)
    ours.load_state_dict(htsat_from_hf(hf.state_dict()))
    with torch.no_grad():
        wanted, found = hf(mel), ours(mel)
    assert found.pooled.shape == (2, audio.stages[-1][0])
    assert wanted.pooler_output.std() > 0.1
    assert (found.pooled - wanted.pooler_output).abs().max() <= 1e-5
    # Theirs are regrouped by frequency; the mean does not mind the order.
    assert found.tokens.shape == (2, wanted.last_hidden_state[0, 0].numel(), ours.width)


def test_gradients_are_transformers_too():
    hf, ours, mel = theirs(SMALL).train(), HTSAT(SMALL), decibels(SMALL, 3)
    ours.load_state_dict(htsat_from_hf(hf.state_dict()))
    for block in ours.modules():
        if isinstance(block, SwinBlock):
            block.drop_path = 0.0
    weight = torch.randn(3, ours.width)
    (hf(mel).pooler_output * weight).sum().backward()
    (ours(mel).pooled * weight).sum().backward()
    given = {name: value.grad for name, value in hf.named_parameters()}
    wanted = htsat_from_hf({name: value for name, value in given.items() if value is not None})
    found = dict(ours.named_parameters())
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        grad = checked(found[name].grad)
        assert (grad - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), name


def test_weights_go_to_transformers_and_back_bit_for_bit():
    ours = HTSAT(SMALL).state_dict()
    there = htsat_to_hf(ours)
    back = htsat_from_hf(there)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    missing = theirs(SMALL).load_state_dict(there, strict=False)
    assert missing.unexpected_keys == []
    assert all(name.endswith("relative_position_index") for name in missing.missing_keys)


def test_htsat_tiny_has_the_27_5_million_parameters_that_transformers_counts():
    assert sum(value.numel() for value in HTSAT(HTSATSettings()).parameters()) == 27_534_488


def test_first_weights_are_normal_of_a_50th():
    torch.manual_seed(0)
    for name, layer in HTSAT(SMALL).named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert layer.bias is None or not layer.bias.any(), name


def test_drop_path_grows_linearly_to_a_tenth_over_twelve_blocks():
    audio = HTSATSettings(width=8, heads=1)
    rates = [block.drop_path for block in HTSAT(audio).modules() if isinstance(block, SwinBlock)]
    assert rates == pytest.approx([0.1 * n / 11 for n in range(12)])


def test_drop_path_leaves_out_either_branch_of_a_clip():
    """Both, as LAION's; transformers' leaves out the attention alone."""
    torch.manual_seed(0)
    block, x = SwinBlock(8, 1, 4, 4, 0, 0.5), torch.randn(64, 16, 8)
    with torch.no_grad():
        y = block.train()(x)
        whole = x + 2 * block.attn(block.norm1(x))
        kinds = [
            torch.stack([first, first + 2 * block.mlp(block.norm2(first))]) for first in (x, whole)
        ]
    near = [(y - one).abs().amax((1, 2)) < 1e-6 for kind in kinds for one in kind]
    assert torch.stack(near).sum(0).tolist() == [1] * 64
    assert all(8 <= kind.sum() <= 24 for kind in near)
    block.drop_path = 0.0
    undropped = block(x)
    block.drop_path = 0.5
    assert torch.equal(block.eval()(x), undropped)


def test_a_log_mel_is_folded_by_pieces_of_time_stacked():
    """16 frames of 4 bins: two pieces of 8 frames, the second one's bins below the first one's."""
    mel = torch.arange(16.0)[:, None] * 10 + torch.arange(4.0)
    image = fold(mel[None, None], 8)[0, 0]
    assert image[:4].tolist() == [[10 * t + f for t in range(8)] for f in range(4)]
    assert image[4:].tolist() == [[10 * t + f for t in range(8, 16)] for f in range(4)]


def first_norm(model: HTSAT, mel: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """What the first norm gives, and what the patch embedding is given."""
    seen: list[Tensor] = []

    def given_to(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hooks = [
        model.bn0.register_forward_hook(lambda *given: seen.append(given[2])),
        model.patch_embed.register_forward_pre_hook(given_to),
    ]
    model(mel, **given)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def statistics(model: HTSAT) -> tuple[Tensor, Tensor]:
    mean, var = model.bn0.running_mean, model.bn0.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def test_the_first_batch_is_normalised_by_its_own_statistics_bin_by_bin():
    model, mel = HTSAT(SMALL).train(), decibels(SMALL, 3) * torch.arange(1, 17)
    out, _ = first_norm(model, mel)
    assert out.mean((0, 2, 3)).abs().max() < 1e-4
    assert (out.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4
    bins = mel.transpose(1, 3).transpose(0, 1).flatten(1)
    mean, var = statistics(model)
    assert torch.allclose(mean, 0.1 * bins.mean(1), rtol=1e-4)
    assert torch.allclose(var, 0.9 + 0.1 * bins.var(1), rtol=1e-4)


def test_the_first_norm_is_float32_under_autocast():
    model, mel = HTSAT(SMALL).eval(), decibels(SMALL, 2)
    statistics(model)[0].fill_(-30)
    wanted, _ = first_norm(model, mel)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = first_norm(model, mel)
        tokens = model(mel).tokens
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert (tokens - model(mel).tokens).abs().max() > 1e-4  # the rest is not


def test_specaug_erases_behind_the_first_norm_and_leaves_its_statistics_alone():
    """Frames and bins become 0, the mean; a zero in decibels would be loud."""
    mel, erase = decibels(SMALL, 2), torch.zeros(2, 101, 16, dtype=torch.bool)
    erase[0] = True
    model, other = HTSAT(SMALL).train(), HTSAT(SMALL).train()
    _, image = first_norm(model, mel, erase=erase)
    first_norm(other, mel)
    assert (image[0] == 0).all()
    assert (image[1] != 0).all()
    assert torch.equal(statistics(model)[1], statistics(other)[1])


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = HTSAT(SMALL, recompute=recompute).train()
        torch.manual_seed(1)  # the same paths dropped
        model(decibels(SMALL, 2)).pooled.square().sum().backward()
        grads.append(checked(model.patch_embed.proj.weight.grad))
    assert torch.equal(grads[0], grads[1])


def test_a_shape_or_a_mask_that_does_not_fit_is_refused():
    model, mel = HTSAT(SMALL), decibels(SMALL, 2)
    with pytest.raises(ValueError, match=r"media must be \(B, 1, 101, 16\), got \(2, 1, 100, 16\)"):
        model(mel[:, :, :100])
    with pytest.raises(ValueError, match=r"mask must be None: .* every patch"):
        model(mel, PatchMask(*[torch.zeros(2, 4, dtype=torch.long)] * 3))
