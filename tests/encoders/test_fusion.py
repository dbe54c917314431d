"""Fusion of a longer clip's pieces with the whole of it, in both encoders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flap_fast.config import Config, Fusion
from flap_fast.encoders.audio_settings import AudioEncoder
from flap_fast.encoders.fusion import AFF, DAF, IAFF, fuse_rows, fusion_model
from flap_fast.encoders.htsat.model import HTSAT, SwinBlock
from flap_fast.encoders.vit.model import ViT
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.interchange.htsat_names import htsat_from_hf, htsat_to_hf
from flap_kernels import PatchMask
from tests.encoders.test_htsat import NARROW, SMALL, checked, decibels, theirs
from tests.tiny import tiny, vit_of

TYPES = ("aff_2d", "iaff_2d", "daf_2d", "channel_map", "aff_1d", "iaff_1d", "daf_1d")
VIT = vit_of(tiny())  # 7 x 8 patches of 112 frames
SOME = torch.tensor([True, False, True, False])
NONE = torch.zeros(4, dtype=torch.bool)
AUDIO = {"vit": VIT, "htsat": SMALL}


def encoder(name: str, type: str) -> ViT | HTSAT:
    torch.manual_seed(0)
    config = Config(audio=AUDIO[name], fusion=Fusion.model_validate({"type": type}))
    model: ViT | HTSAT = config.encoder.build(config)  # type: ignore[assignment]
    for norm in norms(model):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return model


def vit(type: str) -> ViT:
    model = encoder("vit", type)
    assert isinstance(model, ViT)
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # type: ignore[misc]


def longer_mels(audio: AudioEncoder, clips: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(clips, 4, audio.frames, audio.mel_bins)


@pytest.mark.parametrize("audio", [NARROW, SMALL], ids=["narrow", "small"])
@pytest.mark.parametrize("longer", [[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], ids=str)
def test_htsat_with_aff_2d_is_transformers_clap(audio, longer):
    hf = theirs(audio, enable_fusion=True, fusion_type="aff_2d").eval()
    ours = HTSAT(audio, Fusion(type="aff_2d")).eval()
    ours.load_state_dict(htsat_from_hf(hf.state_dict()))
    mel, flags = decibels(audio, 3, channels=4), torch.tensor(longer, dtype=torch.bool)
    with torch.no_grad():
        wanted = hf(mel, is_longer=flags.long()).pooler_output
        found = ours(mel, longer=flags).pooled
    assert (found - wanted).abs().max() <= 1e-5
    assert found.std() > 0.1


def test_a_channel_map_is_a_convolution_of_four_channels():
    """transformers' builds one and then asks its batch for one channel: compared without it."""
    for audio in (SMALL, VIT):
        name = "htsat" if audio is SMALL else "vit"
        model, mel = encoder(name, "channel_map").eval(), longer_mels(audio)
        conv = model.patch_embed.proj if name == "htsat" else model.patch_embed
        assert conv.weight.shape == (audio.width, 4, audio.patch, audio.patch)  # type: ignore[union-attr]
        with torch.no_grad():
            whole = model(mel, longer=SOME).pooled
            for channel in range(4):
                other = mel.clone()
                other[:, channel] = 0
                assert (model(other, longer=SOME).pooled - whole).abs().max() > 1e-4
            # Whether a clip is longer is for the other forms to know.
            assert torch.equal(model(mel, longer=NONE).pooled, whole)


def test_training_with_aff_2d_is_transformers_too():
    """Gradients, and the norms' statistics, with two longer clips of four."""
    hf = theirs(SMALL, enable_fusion=True, fusion_type="aff_2d").train()
    ours = HTSAT(SMALL, Fusion(type="aff_2d")).train()
    ours.load_state_dict(htsat_from_hf(hf.state_dict()))
    for block in ours.modules():
        if isinstance(block, SwinBlock):
            block.drop_path = 0.0
    mel, weight = decibels(SMALL, 4, channels=4), torch.randn(4, ours.width)
    (hf(mel, is_longer=SOME.long()).pooler_output * weight).sum().backward()
    (ours(mel, longer=SOME).pooled * weight).sum().backward()
    wanted = htsat_from_hf({name: checked(value.grad) for name, value in hf.named_parameters()})
    found = dict(ours.named_parameters())
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        most = 2e-5 * max(1.0, value.abs().max().item())
        assert (checked(found[name].grad) - value).abs().max() <= most, name
    back = htsat_to_hf(ours.state_dict())
    for name, value in hf.state_dict().items():
        if "running" in name:
            assert torch.allclose(back[name], value, rtol=1e-5, atol=1e-6), name


def test_aff_and_iaff_are_their_formulas():
    """iAFF takes its first global branch twice, as LAION's does; the second has no gradient."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8, 4, 5)
    aff, iaff = AFF(8, 2), IAFF(8, 2)
    for model in (aff, iaff):
        g = torch.sigmoid(model.local_att(a + b) + model.global_att(a + b))
        if model is aff:
            wanted = 2 * a * g + 2 * b * (1 - g)
        else:
            mixed = a * g + b * (1 - g)
            h = torch.sigmoid(iaff.local_att2(mixed) + iaff.global_att(mixed))
            wanted = a * h + b * (1 - h)
        assert torch.allclose(model(a, b), wanted, atol=1e-6)
    iaff(a, b).sum().backward()
    assert all(p.grad is None for p in iaff.global_att2.parameters())
    assert torch.equal(DAF()(a, b), a + b)


def test_names_are_laions():
    """Inside `audio_branch.`: what its published checkpoints hold beside the unfused encoder."""
    plain = HTSAT(SMALL).state_dict().keys()
    layers = {
        *(f"local_att.{n}" for n in (0, 1, 3, 4)),
        *(f"global_att.{n}" for n in (1, 2, 4, 5)),
    }
    for type, place, embed in (
        ("aff_2d", "patch_embed.", {"patch_embed.mel_conv2d"}),
        ("aff_1d", "", {"mel_conv1d.0", "mel_conv1d.1"}),
    ):
        more = HTSAT(SMALL, Fusion(type=type)).state_dict().keys() - plain  # type: ignore[arg-type]
        wanted = {f"{place}fusion_model.{layer}" for layer in layers} | embed
        assert {name.rpartition(".")[0] for name in more} == wanted
    second = (
        fusion_model("iaff_1d", 8).state_dict().keys()
        - fusion_model("aff_1d", 8).state_dict().keys()
    )
    assert {name.split(".")[0] for name in second} == {"local_att2", "global_att2"}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", AUDIO)
def test_every_form_trains_every_weight_of_its_own(name, type):
    model, mel = encoder(name, type).train(), longer_mels(AUDIO[name])
    # All four: with two, a norm's output is the same two numbers, and what is before it idle.
    model(mel, longer=~NONE).pooled.square().sum().backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert [n for n in idle if "global_att2" not in n] == []
    assert any("global_att2" in n for n in idle) == type.startswith("iaff")


@pytest.mark.parametrize("type", [type for type in TYPES if type != "channel_map"])
@pytest.mark.parametrize("name", AUDIO)
def test_a_short_clip_is_its_first_channel_and_a_longer_one_is_not(name, type):
    model, mel = encoder(name, type).eval(), longer_mels(AUDIO[name])
    other = mel.clone()
    other[:, 1:] = 0
    with torch.no_grad():
        fused, without = (model(x, longer=SOME).pooled for x in (mel, other))
        skipped, alone = model(mel, longer=NONE).pooled, model(mel).pooled
    apart = (fused - without).abs().amax(1)
    assert (apart[~SOME] == 0).all()
    assert (apart[SOME] > 1e-4).all()
    assert torch.equal(skipped, alone)
    assert torch.allclose(skipped[~SOME], fused[~SOME], atol=1e-6)
    assert ((skipped - fused).abs().amax(1)[SOME] > 1e-4).all()


@pytest.mark.parametrize("name", AUDIO)
def test_a_batch_without_longer_clips_leaves_the_norms_alone(name):
    """In evaluation the fusion is run and dropped; in training, with force_one off, not run."""
    model, mel = encoder(name, "aff_2d"), longer_mels(AUDIO[name])
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    fusion = (model.patch_embed if isinstance(model, HTSAT) else model).fusion_model
    fusion.register_forward_hook(lambda *given: calls.append(len(given[2])))
    model.eval()(mel, longer=NONE)
    assert calls == [1]
    model.train()(mel, longer=NONE)
    assert calls == [1]
    after = model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert all(n.startswith("bn0.") for n in changed)


def test_a_single_longer_clip_is_taken_twice_in_training():
    """A norm of one pooled number a channel has no variance; LAION's duplicate makes it 0."""
    model = AFF(8, 2).train()
    whole, local = torch.randn(3, 8, 2, 2), torch.randn(3, 8, 2, 2)
    one = torch.tensor([False, True, False])
    found = fuse_rows(model, whole, lambda rows: local[rows], one)
    other = AFF(8, 2).train()
    other.load_state_dict(model.state_dict())
    twice = AFF(8, 2).train()
    twice.load_state_dict(model.state_dict())
    pair = torch.tensor([1, 1])
    assert torch.equal(found[1], twice(whole[pair], local[pair])[0])
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        other(whole[:1], local[:1])


def test_a_vits_pieces_are_patches_three_times_as_long_and_zeros_fill_the_rest():
    """112 frames: 7 x 8 patches; pieces give 2 x 8 each, 6 x 8 together, and a row of zeros."""
    model = vit("daf_2d").eval()
    assert model.mel_conv2d.weight.shape == (32, 1, 48, 16)
    seen: list[Tensor] = []
    model.fusion_model.register_forward_hook(lambda *given: seen.extend(given[1]))
    mel = torch.zeros(1, 4, 112, 128)
    mel[0, 2, 48:] = 1.0  # the middle piece, from its second patch on
    with torch.no_grad():
        model(mel, longer=torch.tensor([True]))
        _, local = seen
        bias = checked(model.mel_conv2d.bias)
        assert local.shape == (1, 32, 7, 8)
        assert torch.allclose(
            local[0, :, [0, 1, 2, 4, 5]], bias[:, None, None].expand(-1, 5, 8), atol=1e-6
        )
        ones = model.mel_conv2d.weight.sum((1, 2, 3)) + bias
        assert torch.allclose(local[0, :, 3], ones[:, None].expand(-1, 8), atol=1e-5)
        assert (local[0, :, 6] == 0).all()


def test_the_papers_vit_has_63_rows_of_pieces_in_64():
    conv = ViT(ViTSettings(width=8, depth=1, heads=1), Fusion(type="aff_2d")).mel_conv2d
    assert conv(torch.zeros(1, 1, 1024, 128)).shape == (1, 8, 21, 8)


def test_masking_comes_after_the_fusion():
    """The kept tokens are those of the whole fused grid."""
    model, mel = vit("aff_2d").eval(), longer_mels(VIT)
    keep = torch.stack([torch.arange(0, 56, 3)] * 4)
    seen: list[Tensor] = []
    model.blocks.register_forward_hook(lambda *given: seen.append(given[1][0]))
    with torch.no_grad():
        model(mel, longer=SOME)
        tokens = model(mel, PatchMask(keep, keep, keep), longer=SOME).tokens
    whole, some = seen
    assert torch.equal(some[:, 1:], whole[:, 1:][:, keep[0]])
    assert tokens.shape == (4, 1 + keep.shape[1], 32)


def test_short_clips_cost_a_fused_vit_nothing_but_its_norms_of_none():
    """Its embedding of whole clips is the plain one's."""
    fused, plain, mel = encoder("vit", "aff_2d").eval(), ViT(VIT).eval(), longer_mels(VIT)
    plain.load_state_dict({n: v for n, v in fused.state_dict().items() if n in plain.state_dict()})
    with torch.no_grad():
        wanted, found = plain(mel[:, :1]).pooled, fused(mel, longer=NONE).pooled
    assert torch.allclose(found, wanted, atol=1e-6)


def test_norms_are_float32_under_autocast():
    model, mel = encoder("vit", "aff_2d").train(), longer_mels(VIT)
    types: set[torch.dtype] = set()
    for norm in norms(model):
        norm.register_forward_hook(lambda *given: types.update((given[1][0].dtype, given[2].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(mel, longer=SOME)
    assert types == {torch.float32}


@pytest.mark.parametrize("name", AUDIO)
def test_the_number_of_channels_is_checked(name):
    audio = AUDIO[name]
    size = f"{audio.frames}, {audio.mel_bins}"
    with pytest.raises(ValueError, match=rf"media must be \(B, 4, {size}\), got \(4, 1, {size}\)"):
        encoder(name, "aff_2d")(longer_mels(audio)[:, :1])
    with pytest.raises(ValueError, match=rf"media must be \(B, 1, {size}\), got \(4, 4, {size}\)"):
        encoder(name, "none")(longer_mels(audio))
