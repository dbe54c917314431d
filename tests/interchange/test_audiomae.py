"""AudioMAE's checkpoints, and others in its names: an audio tower to begin a training with."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config
from flap_fast.encoders.vit.model import ViT
from flap_fast.encoders.vit.patches import sine_positions
from flap_fast.interchange.convert import import_checkpoint
from flap_fast.interchange.tensors import read_tensors
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import TOWER, load_weights, model_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.tiny import tiny, vit_of

# Settings that no shape tells: clips of 1 s make 7 x 8 patches.
GIVEN = ["audio.heads=2", "audio.duration_s=1.0", "audio.frames=112"]
WIDTH, DEPTH, HEADS, GRID = 32, 2, 2, (7, 8)


def linear(state: dict[str, Tensor], name: str, outputs: int, inputs: int) -> None:
    state[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
    state[f"{name}.bias"] = 0.1 * torch.randn(outputs)


def norm(state: dict[str, Tensor], name: str, width: int) -> None:
    state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
    state[f"{name}.bias"] = 0.1 * torch.randn(width)


def vit(state: dict[str, Tensor], begin: str, width: int) -> None:
    for n in range(DEPTH):
        block = f"{begin}.{n}."
        norm(state, f"{block}norm1", width)
        linear(state, f"{block}attn.qkv", 3 * width, width)
        linear(state, f"{block}attn.proj", width, width)
        norm(state, f"{block}norm2", width)
        linear(state, f"{block}mlp.fc1", 4 * width, width)
        linear(state, f"{block}mlp.fc2", width, 4 * width)


def audiomae(final: str = "norm") -> dict[str, Tensor]:
    """A small one, with the table for the transposed grid and a decoder."""
    torch.manual_seed(0)
    table = functional.pad(sine_positions(WIDTH, GRID, GRID[0]), (0, 0, 1, 0))
    state = {"cls_token": torch.randn(1, 1, WIDTH), "pos_embed": table[None].clone()}
    state["pos_embed"][0, 5, 3] += 1e-5  # what is loaded is the file's, not one like it
    state["patch_embed.proj.weight"] = torch.randn(WIDTH, 1, 16, 16) / 16
    state["patch_embed.proj.bias"] = torch.randn(WIDTH)
    vit(state, "blocks", WIDTH)
    norm(state, final, WIDTH)
    linear(state, "decoder_embed", 16 * 4, WIDTH)
    state["mask_token"] = torch.randn(1, 1, 64)
    state["decoder_pos_embed"] = torch.randn(1, 57, 64)
    vit(state, "decoder_blocks", 64)
    norm(state, "decoder_norm", 64)
    linear(state, "decoder_pred", 256, 64)
    return state


def answer(state: dict[str, Tensor], mel: Tensor) -> Tensor:
    """The encoder written out: (B, 1, T, F) -> the mean over patches."""

    def layer(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(
            x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
        )

    x = functional.conv2d(
        mel, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    for n in range(DEPTH):
        qkv = layer(normed(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + layer((weights @ v).transpose(1, 2).flatten(2), f"blocks.{n}.attn.proj")
        y = functional.gelu(layer(normed(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + layer(y, f"blocks.{n}.mlp.fc2")
    if "norm.weight" in state:
        return normed(x, "norm")[:, 1:].mean(1)
    return normed(x[:, 1:].mean(1), "fc_norm")


def saved(file: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """As AudioMAE saves: beside the optimizer and its arguments."""
    named = {prefix + name: value for name, value in state.items()}
    torch.save({"model": named, "epoch": 32, "args": Namespace(mask_ratio=0.8)}, file)
    return file


@pytest.mark.parametrize("final", ["norm", "fc_norm"])
def test_an_imported_tower_answers_as_audiomae(tmp_path, final):
    state = audiomae(final)
    if final == "fc_norm":
        linear(state, "head", 9, WIDTH)
        state["pos_embed"][:, 0] = torch.randn(WIDTH)  # a position of [CLS] is its own
    import_checkpoint(saved(tmp_path / "a.pth", state), tmp_path / "tower", GIVEN)
    config = load_config(tmp_path / "tower/config.yaml")
    assert vit_of(config).norm_position == ("tokens" if final == "norm" else "pooled")
    assert vit_of(config).pos_grid == "audiomae_legacy"
    assert config.train.init_audio_from == tmp_path / "tower"
    weights = read_tensors(tmp_path / "tower" / TOWER)
    assert all(name.startswith("audio.") for name in weights)
    assert torch.equal(weights["audio.pos_embed"], state["pos_embed"][0, 1:])
    assert not torch.equal(weights["audio.pos_embed"], sine_positions(WIDTH, GRID, GRID[0]))
    tower = ViT(vit_of(config)).eval()
    tower.load_state_dict({name.removeprefix("audio."): v for name, v in weights.items()})
    mel = torch.randn(3, 1, 112, 128)
    with torch.no_grad():
        found, wanted = tower(mel).pooled, answer(state, mel)
    assert (found - wanted).abs().max() < 1e-5
    assert (wanted - wanted.mean(0)).abs().max() > 0.05


def test_rotary_positions_are_not_audiomaes(tmp_path):
    file, given = saved(tmp_path / "a.pth", audiomae("norm")), [*GIVEN, "audio.heads=4"]
    with pytest.raises(ConfigError, match=r"audio\.time_positions must be 'sines' for AudioMAE's"):
        import_checkpoint(file, tmp_path / "tower", [*given, "audio.time_positions=rotary"])


def test_the_decoder_comes_along_when_asked_for(tmp_path):
    state, given = audiomae(), [*GIVEN, "decoder.heads=4"]
    file = saved(tmp_path / "a.pth", state)
    import_checkpoint(file, tmp_path / "tower", given, decoder=True)
    weights = read_tensors(tmp_path / "tower" / TOWER)
    for theirs, ours in {
        "mask_token": "mask_token",
        "decoder_embed.weight": "embed.weight",
        "decoder_blocks.1.attn.qkv.bias": "blocks.1.attn.qkv.bias",
        "decoder_pred.weight": "pred.weight",
    }.items():
        assert torch.equal(weights[f"decoder.{ours}"], state[theirs])
    assert torch.equal(weights["decoder.pos_embed"], state["decoder_pos_embed"][0])
    config = load_config(tmp_path / "tower/config.yaml")
    model = TwoTowers(config.model_copy(update={"text": tiny().text}))
    put_first_weights(model, config)
    assert model.decoder is not None
    assert torch.equal(model.decoder.mask_token, state["mask_token"])
    # A Swin decoder has other parts, which are named.
    state["decoder_blocks.0.attn.relative_position_bias_table"] = torch.zeros(49, 4)
    with pytest.raises(ConfigError, match=r"unexpected  decoder\.blocks\.0\.attn\.relative_pos"):
        import_checkpoint(saved(file, state), tmp_path / "x", given, decoder=True)


def test_other_prefixes_are_stripped_and_every_fault_is_named(tmp_path):
    """MAViL's way: unknown names, then AudioMAE's."""
    state = audiomae()
    file = saved(tmp_path / "m.pth", state, "module.encoder.audio.")
    with pytest.raises(ConfigError, match=r"got 'encoder\.audio\.cls_token, .*--strip PREFIX"):
        import_checkpoint(file, tmp_path / "x", GIVEN)
    import_checkpoint(file, tmp_path / "tower", GIVEN, strip=["encoder.", "audio."])
    plain = saved(tmp_path / "a.pth", state)
    import_checkpoint(plain, tmp_path / "same", GIVEN)
    a, b = (read_tensors(tmp_path / name / TOWER) for name in ("tower", "same"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)

    del state["norm.bias"]
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    state["fusion.weight"] = torch.zeros(2, 2)
    with pytest.raises(ConfigError) as error:
        import_checkpoint(saved(file, state), tmp_path / "x", GIVEN)
    for line in (
        "missing     audio.norm.bias (32,)",
        "mis-shaped  audio.blocks.0.mlp.fc1.bias (7,), wanted (128,)",
        "unexpected  audio.fusion.weight (2, 2)",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "x").exists()
    import_checkpoint(file, tmp_path / "x", GIVEN, partial=True)
    found = read_tensors(tmp_path / "x" / TOWER)
    assert {name for name in a if not torch.equal(found[name], a[name])} == {
        "audio.norm.bias",
        "audio.blocks.0.mlp.fc1.bias",
    }
    with pytest.raises(ConfigError, match=r"audio\.heads must be given: 32 x 2 .*add audio\.heads"):
        import_checkpoint(plain, tmp_path / "y", GIVEN[1:])


def test_what_is_taken_in_part_says_what_begins_at_random(tmp_path, capsys):
    state = audiomae()
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    del state["norm.bias"]
    import_checkpoint(saved(tmp_path / "a.pth", state), tmp_path / "x", GIVEN, partial=True)
    said = capsys.readouterr().err
    assert "took 28 of 30 tensors" in said
    assert "missing     audio.norm.bias (32,)" in said
    assert "mis-shaped  audio.blocks.0.mlp.fc1.bias (7,), wanted (128,)" in said
    shapes = ("patch_embed.proj.weight", "pos_embed", "norm.weight")
    none = {name if name in shapes else f"enc.{name}": value for name, value in state.items()}
    none |= {name: value[..., :1] for name, value in none.items() if name in shapes}
    with pytest.raises(ConfigError, match=r"must hold a tensor of this model, got 'none'; --strip"):
        import_checkpoint(
            saved(tmp_path / "b.pth", none), tmp_path / "y", [*GIVEN, "audio.depth=2"], partial=True
        )


def run(tower: Path, prepared: Path, runs: Path, *overrides: str):
    return tiny(
        *(f"run.folder={runs}", f"data.train={prepared}/train", "log.tensorboard=false"),
        *(f"train.init_audio_from={tower}", "train.steps=1", "optim.lr=1e-9", *overrides),
    )


def test_a_training_begins_with_an_imported_tower(prepared, tmp_path):
    """At a learning rate of nothing, its weights are what the run saves."""
    state = audiomae()
    import_checkpoint(saved(tmp_path / "a.pth", state), tmp_path / "tower", GIVEN)
    decoder = ("loss.recon.weight=1", "decoder.depth=1", "decoder.width=32")
    train(run(tmp_path / "tower", prepared, tmp_path, *decoder))
    weights = load_weights(model_folder(tmp_path / "flap"))
    for name in ("blocks.1.mlp.fc2.weight", "cls_token", "norm.bias"):
        assert torch.allclose(weights[f"audio.{name}"], state[name], atol=1e-7), name
    # The table, which a config of pos_grid=correct would compute otherwise, to the bit.
    assert torch.equal(weights["audio.pos_embed"], state["pos_embed"][0, 1:])
    # With fusion too, whose own parts are new.
    fused = run(tmp_path / "tower", prepared, tmp_path, "fusion.type=aff_2d", "run.name=fused")
    train(fused)
    weights = load_weights(model_folder(tmp_path / "fused"))
    assert torch.allclose(weights["audio.norm.bias"], state["norm.bias"], atol=1e-7)
    # And a run's tower serves as well as a tower's folder.
    train(run(tmp_path / "flap", prepared, tmp_path, "run.name=again"))
    again = load_weights(model_folder(tmp_path / "again"))
    assert torch.allclose(again["audio.norm.bias"], state["norm.bias"], atol=1e-7)


def test_a_tower_that_does_not_suit_a_run_is_refused(prepared, tmp_path):
    import_checkpoint(saved(tmp_path / "a.pth", audiomae("fc_norm")), tmp_path / "tower", GIVEN)
    with pytest.raises(ConfigError, match=r"audio\.norm_position must be pooled, as in .*, got"):
        train(run(tmp_path / "tower", prepared, tmp_path))
    with pytest.raises(ConfigError, match=r"must hold the weights of this config's model"):
        train(
            run(
                *(tmp_path / "tower", prepared, tmp_path / "b"),
                *("audio.norm_position=pooled", "audio.width=48"),
            )
        )
    with pytest.raises(ConfigError, match=r"an audio tower; train from it with train\.init_audio"):
        load(tmp_path / "tower", "cpu")
    with pytest.raises(ConfigError, match=r"train\.init_audio_from must be an existing folder"):
        train(run(tmp_path / "nothing", prepared, tmp_path / "c"))
