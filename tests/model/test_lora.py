"""LoRA: adapters train alone, begin without effect, and are merged in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flap_fast
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.encoders.lora import merged
from flap_fast.evaluation.embed import evaluating
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import load_model, load_weights, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.training.loop import train
from tests.tiny import HTSAT, tiny, tiny_clip

LORA = ("audio.lora_rank=2", "text.lora_rank=3", "text.lora_alpha=6")
CONFIGS = {
    "vit and roberta": tiny(*LORA),
    "htsat": tiny(*HTSAT, "audio.lora_rank=2"),
    "clip text": tiny("text.encoder=clip", "text.lora_rank=2"),
    "one length for each": tiny("audio.length=variable", "audio.lora_rank=2"),
}


def with_adapters(config: Config) -> TwoTowers:
    """A model whose adapters have an effect."""
    torch.manual_seed(0)
    model = TwoTowers(config)
    for name, p in model.named_parameters():
        if "lora.b" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def embeddings(model: TwoTowers, config: Config) -> list[torch.Tensor]:
    torch.manual_seed(1)
    media = torch.randn(3, *config.encoder.input_shape(config.fusion))
    ids = torch.randint(5, 200, (3, 16))
    with evaluating(model):
        media_rows = torch.zeros(0) if config.audio.variable else model.embed_media(media)
        return [media_rows, model.embed_text(ids, torch.ones_like(ids))]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_has_the_adapters_merged(config: Config, tmp_path: Path):
    model, without = with_adapters(config), tiny_without(config)
    save_model(tmp_path, config, model, merged(model, model.state_dict()))
    weights = load_weights(tmp_path)
    assert not [name for name in weights if "lora" in name]
    opened, of_folder = load_model(tmp_path)
    assert of_folder.audio.lora_rank == of_folder.text.lora_rank == 0
    for found, wanted in zip(embeddings(opened, config), embeddings(model, config), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    adapted = [n for n, w in weights.items() if not torch.equal(w, without.state_dict()[n])]
    assert all(n.endswith("weight") for n in adapted)
    for tower, given in (("audio.", config.audio), ("text.", config.text)):
        assert any(n.startswith(tower) for n in adapted) == (given.lora_rank > 0)


def tiny_without(config: Config) -> TwoTowers:
    """The same weights without adapters."""
    update = {"lora_rank": 0}
    audio, text = (s.model_copy(update=update) for s in (config.audio, config.text))
    torch.manual_seed(0)
    return TwoTowers(config.model_copy(update={"audio": audio, "text": text})).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_begin_without_effect_and_train_alone(config: Config):
    torch.manual_seed(0)
    model, without = TwoTowers(config).eval(), tiny_without(config)
    for ours, theirs in zip(embeddings(model, config), embeddings(without, config), strict=True):
        assert torch.equal(ours, theirs)
    for tower, given in (("audio.", config.audio), ("text.", config.text)):
        trained = [
            n for n, p in model.named_parameters() if n.startswith(tower) and p.requires_grad
        ]
        assert all(".lora." in n or "_lora." in n for n in trained) == (given.lora_rank > 0)
        assert trained
    assert all(p.requires_grad for p in model.text_head.parameters())


def test_each_linear_layer_of_the_blocks_has_one():
    model = TwoTowers(CONFIGS["vit and roberta"])
    found = {n.removesuffix(".lora.a") for n in model.state_dict() if n.endswith("lora.a")}
    assert {n for n in found if n.startswith("audio.blocks.1")} == {
        f"audio.blocks.1.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert sum(n.startswith("text.inner.encoder.layer.0") for n in found) == 6
    clip = TwoTowers(CONFIGS["clip text"])
    ours = {n for n in clip.state_dict() if "resblocks.0" in n and n.endswith("lora.b")}
    assert len(ours) == 4
    assert any("in_proj_lora" in n for n in ours)


def test_a_run_leaves_a_merged_model_and_what_it_resumes_from(prepared: Path, tmp_path: Path):
    given = (f"run.folder={tmp_path}", f"data.train={prepared}/train", "frontend.backend=torch")
    config = tiny(*LORA, *given, "optim.lr=0.01", "sched.warmup_steps=0", "log.tensorboard=false")
    train(config)
    folder = tmp_path / "flap/checkpoints/step-000004"
    trained, whole = load_file(folder / "trained.safetensors"), load_weights(folder)
    base = "audio.blocks.0.mlp.fc1"
    delta = trained[f"{base}.lora.b"] @ trained[f"{base}.lora.a"] * 16 / 2
    assert delta.abs().max() > 0
    torch.testing.assert_close(whole[f"{base}.weight"], trained[f"{base}.weight"] + delta)
    assert torch.equal(whole[f"{base}.bias"], trained[f"{base}.bias"])
    assert flap_fast.load(tmp_path / "flap").embed_text(["a dog"]).shape == (1, 16)
    # Another run begins with the merged weights, with adapters of its own or without.
    for more in (LORA, ()):
        begun = tiny(*more, f"train.init_from={tmp_path}/flap")
        model = TwoTowers(begun)
        put_first_weights(model, begun)
        assert torch.equal(model.state_dict()[f"{base}.weight"], whole[f"{base}.weight"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("audio.lora_rank=4", "audio.freeze=true"), "audio.lora_rank must be 0 with audio.freeze"),
        (("text.lora_rank=4", "text.freeze_blocks=1"), "text.lora_rank must be 0 with text.freeze"),
        (("text.lora_rank=-1",), "text.lora_rank must be"),
    ],
)
def test_settings_that_exclude_it_are_named(given: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(*given)


def test_a_rank_above_the_narrowest_layer_is_named():
    with pytest.raises(ConfigError, match=r"text.lora_rank must be at most 32, the width of .* 33"):
        TwoTowers(tiny("text.lora_rank=33"))


def test_an_encoder_without_linear_layers_in_its_blocks_is_named():
    with pytest.raises(ConfigError, match=r"image.lora_rank must be 0 with this encoder, whose bl"):
        TwoTowers(tiny_clip("image.lora_rank=4"))
