"""The audio tower and the loss beside `transformers.ClapModel`, on the same random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ClapConfig, ClapModel
from transformers.models.clap.modeling_clap import ClapOutput

from flap_fast.config import Config
from flap_fast.interchange.htsat_names import htsat_from_hf
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import Outputs, TwoTowers
from tests.encoders.test_htsat import decibels
from tests.tiny import HTSAT as SMALLEST
from tests.tiny import tiny

CLIPS = 6
LONGER = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
FUSED = ("fusion.type=aff_2d",)


def there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def clap(config: Config) -> ClapModel:
    """Of the same sizes, every weight and statistic of its audio side random."""
    torch.manual_seed(0)
    audio = config.audio
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = ClapModel(
        ClapConfig(
            text_config={**small, "vocab_size": 50, "intermediate_size": 32, "projection_dim": 16},
            audio_config={
                "patch_embeds_hidden_size": audio.stages[0][0],
                "hidden_size": audio.stages[-1][0],
                "depths": [depth for _, depth, _ in audio.stages],
                "num_attention_heads": [heads for _, _, heads in audio.stages],
                "num_mel_bins": audio.mel_bins,
                "spec_size": audio.image_side,
                "hidden_dropout_prob": 0.0,
                "enable_fusion": config.fusion.on,
                "fusion_type": config.fusion.type if config.fusion.on else None,
                "projection_dim": 16,
            },
            projection_dim=16,
        )
    )
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.startswith("audio"):
                value.add_(0.1 * torch.randn_like(value))
        norm = theirs.audio_model.audio_encoder.batch_norm
        there(norm.running_mean).normal_(-30, 10)
        there(norm.running_var).uniform_(100, 400)
    return theirs.eval()


def ours(config: Config, theirs: ClapModel) -> TwoTowers:
    model = TwoTowers(config).eval()
    encoder = theirs.audio_model.audio_encoder.state_dict()
    model.get_submodule("audio").load_state_dict(htsat_from_hf(encoder))
    head = theirs.audio_projection.state_dict()
    names = {"linear1": "0", "linear2": "2"}
    for name, value in head.items():
        layer, _, kind = name.partition(".")
        model.get_parameter(f"audio_head.{names[layer]}.{kind}").data.copy_(value)
    return model


def both(*overrides: str) -> tuple[Config, ClapOutput, Tensor]:
    """Settings, what transformers gives with its loss, and our audio embeddings."""
    config = tiny(*SMALLEST, *overrides)
    theirs = clap(config)
    model = ours(config, theirs)
    mel = decibels(config.audio, CLIPS, channels=4 if config.fusion.on else 1)
    ids = torch.randint(3, 50, (CLIPS, 7))
    with torch.no_grad():
        wanted = theirs(ids, mel, is_longer=LONGER.long(), return_loss=True)
        found = model.embed_media(mel, longer=LONGER if config.fusion.on else None)
    return config, wanted, found


@pytest.mark.parametrize("overrides", [(), FUSED], ids=["unfused", "fused"])
def test_audio_embeddings_are_those_of_clap(overrides):
    _, theirs, found = both(*overrides)
    assert found.shape == (CLIPS, 16)
    assert (found - there(theirs.audio_embeds)).abs().max() <= 1e-5
    # Not of one clip for all: 1e-5 means something.
    assert (found - found.mean(0)).abs().max() > 0.02


def test_claps_loss_is_one_direction_twice_and_ours_both():
    """`return_loss` takes the captions' cross-entropy, and then the clips' logits transposed back:
    the captions' again. LAION's, the papers' and ours take each clip's own as well.
    """
    config, theirs, audio = both()
    text, scale = there(theirs.text_embeds), torch.tensor(1 / 0.07)
    outputs: Outputs = {"media": audio, "text": text, "scale": scale, "recon": torch.zeros(())}

    def loss(direction: str) -> float:
        settings = config.loss.contrastive.model_copy(update={"direction": direction})
        losses = config.loss.model_copy(update={"contrastive": settings})
        return total_loss(outputs, config.model_copy(update={"loss": losses}))["total"].item()

    to_audio, to_text, symmetric = loss("t2a"), loss("a2t"), loss("symmetric")
    assert there(theirs.loss).item() == pytest.approx(to_audio, abs=1e-4)
    assert symmetric == pytest.approx((to_audio + to_text) / 2, abs=1e-5)
    assert abs(symmetric - there(theirs.loss).item()) > 1e-2
    # What their code would give with the logits as they are.
    mine = torch.arange(CLIPS)
    right = (
        cross_entropy(there(theirs.logits_per_text), mine)
        + cross_entropy(there(theirs.logits_per_audio), mine)
    ) / 2
    assert symmetric == pytest.approx(right.item(), abs=1e-4)
