"""Learning rates: of each step by the schedule, of each weight by its tower and depth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from flap_fast.checks import ConfigError
from flap_fast.config.train import Sched
from flap_fast.model.model_folder import load_weights
from flap_fast.model.two_towers import TwoTowers
from flap_fast.training.loop import train
from flap_fast.training.optimizers import learning_rate, optimizer, parameter_groups
from tests.tiny import HTSAT, tiny, tiny_clip

STEPS = 50


def rates(**given) -> list[float]:
    sched = Sched(warmup_steps=10, **given)
    return [learning_rate(step, sched, base=2.0, steps=STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "theirs", "more"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 15, "decay_type": "linear"}),
    ],
)
def test_schedules_are_those_of_transformers(name: str, theirs: str, more: dict):
    given = {"decay_steps": 15} if name == "wsd" else {}
    weight = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([weight], lr=2.0)
    other = get_scheduler(theirs, adam, 10, STEPS, scheduler_specific_kwargs=more)
    expected = []
    for _ in range(STEPS + 1):
        expected.append(other.get_last_lr()[0])
        adam.step()
        other.step()
    ours = rates(name=name, **given)
    # Theirs takes a first step at 0; ours, as LAION-CLAP, is one ahead in the warm-up.
    assert ours[:10] == pytest.approx(expected[1:11])
    assert ours[10:] == pytest.approx(expected[10:STEPS])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_it_falls_to_the_final_factor(name: str):
    given = {"decay_steps": 20} if name == "wsd" else {}
    more: dict = {"name": name, "final_factor": 0.25} | given
    sched = Sched(warmup_steps=0, **more)
    found = [learning_rate(step, sched, base=2.0, steps=STEPS) for step in (0, STEPS - 1, STEPS)]
    assert found[0] == 2.0
    assert 0.5 < found[1] < 0.6
    assert found[2] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("sched.name=wsd", r"sched.decay_steps must be set with sched.name = wsd, got 'nothing'"),
        (
            "sched.decay_steps=3",
            r"sched.decay_steps must be left out .* cosine, got 3; set sched.n",
        ),
        (["sched.name=constant", "sched.final_factor=0.1"], "sched.final_factor must be 0 with"),
        ("optim.layer_decay=0", "optim.layer_decay must be"),
        ("optim.media_lr_factor=0", "optim.media_lr_factor must be"),
        ("audio.freeze_blocks=-1", "audio.freeze_blocks must be"),
    ],
)
def test_settings_that_exclude_each_other_are_named(setting, rule: str):
    with pytest.raises(ConfigError, match=rule):
        tiny(*([setting] if isinstance(setting, str) else setting))


def factors_of(config) -> dict[str, float]:
    model = TwoTowers(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer(config, model, torch.device("cpu")).param_groups
    return {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}


def test_each_tower_has_a_factor_and_heads_have_none():
    found = factors_of(tiny("optim.media_lr_factor=0.1", "optim.text_lr_factor=0.2"))
    assert {n.partition(".")[0]: f for n, f in found.items()} == {
        "audio": 0.1,
        "text": 0.2,
        "audio_head": 1,
        "text_head": 1,
        "logit_scale": 1,
    }


@pytest.mark.parametrize(
    ("config", "depths"),
    [
        (
            tiny("optim.layer_decay=0.5"),
            {
                "audio.cls_token": 3,
                "audio.patch_embed.weight": 3,
                "audio.blocks.0.attn.qkv.weight": 2,
                "audio.blocks.1.mlp.fc2.bias": 1,
                "audio.norm.weight": 0,
                "text.inner.embeddings.word_embeddings.weight": 3,
                "text.inner.encoder.layer.1.output.LayerNorm.bias": 1,
                "text.inner.pooler.dense.weight": 0,
                "text_head.0.weight": 0,
            },
        ),
        (
            tiny("optim.layer_decay=0.5", "text.pool=mean"),
            {"text.inner.encoder.layer.1.output.LayerNorm.bias": 1},
        ),
        (
            tiny(*HTSAT, "optim.layer_decay=0.5", "optim.media_lr_factor=2"),
            {
                "audio.bn0.weight": 4,
                "audio.layers.0.blocks.0.attn.relative_position_bias_table": 3,
                "audio.layers.0.downsample.reduction.weight": 2,
                "audio.layers.1.blocks.1.mlp.fc1.weight": 0,
                "audio.norm.bias": -1,
            },
        ),
        (
            tiny_clip("optim.layer_decay=0.5"),
            {
                "image.conv1.weight": 5,
                "image.layer1.0.conv1.weight": 4,
                "image.layer4.0.bn3.weight": 1,
                "image.attnpool.q_proj.weight": 0,
                "text.positional_embedding": 3,
                "text.transformer.resblocks.0.ln_1.weight": 2,
                "text.ln_final.weight": 0,
            },
        ),
    ],
    ids=["vit", "mean", "htsat", "clip"],
)
def test_layer_decay_falls_from_the_output_to_the_input(config, depths: dict[str, int]):
    found = factors_of(config)
    assert {name: -math.log2(found[name]) for name in depths} == depths


def test_by_default_there_are_two_groups_in_the_order_of_before():
    model = TwoTowers(tiny())
    groups = parameter_groups(model)
    assert [(group.decayed, group.lr_factor) for group in groups] == [(True, 1.0), (False, 1.0)]


def small(data: Path, runs: Path, *overrides: str):
    return tiny(
        *(f"run.folder={runs}", f"data.train={data}/train", "frontend.backend=torch"),
        *("train.steps=3", "sched.warmup_steps=0", "optim.lr=1e-3", "log.tensorboard=false"),
        *overrides,
    )


def moved(config) -> set[str]:
    """The weights that a run changed."""
    train(config)
    torch.manual_seed(config.run.seed)
    first = TwoTowers(config).state_dict()
    last = load_weights(config.run_folder / "checkpoints/step-000003")
    return {name for name, value in last.items() if not torch.equal(value, first[name])}


@pytest.mark.parametrize("kind", [(), HTSAT], ids=["vit", "htsat"])
def test_what_is_frozen_stays_and_the_rest_is_trained(kind, prepared: Path, tmp_path: Path):
    first = ("audio.freeze_blocks=1", "text.freeze_blocks=1")
    trained = moved(small(prepared, tmp_path, *kind, *first))
    # A key's bias has no gradient but of rounding.
    block = "layers.0.blocks.0." if kind else "blocks.0."
    input_layers = ("patch_embed", block, "bn0", "cls_token", "embeddings", "layer.0.")
    assert not [name for name in trained if any(part in name for part in input_layers)]
    assert {n.partition(".")[0] for n in trained} > {"audio", "text", "audio_head", "text_head"}
    assert any("layer.1." in name for name in trained)
    assert any("blocks.1." in name for name in trained)

    whole = moved(small(prepared, tmp_path / "whole", *kind, "audio.freeze=true"))
    assert not [name for name in whole if name.startswith("audio.")]
    assert {"audio_head.0.weight", "text_head.0.weight"} <= whole


def test_what_is_frozen_runs_as_in_evaluation():
    settings = (*HTSAT, "audio.drop_path=0.5", "audio.freeze_blocks=2", "text.freeze_blocks=1")
    model = TwoTowers(tiny(*settings)).train()
    training = {name for name, module in model.named_modules() if module.training}
    assert "audio.layers.1.blocks.0" in training
    assert "text.inner.encoder.layer.1.output.dropout" in training
    assert not training & {
        *("audio.bn0", "audio.layers.0.blocks.0.drop_path", "audio.layers.0.blocks.1"),
        *("text.inner.embeddings.dropout", "text.inner.encoder.layer.0.output.dropout"),
    }
    model.eval()
    assert not any(module.training for module in model.modules())


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ConfigError, match=r"audio.freeze_blocks must be at most 2, the blocks of"):
        TwoTowers(tiny("audio.freeze_blocks=3"))
    with pytest.raises(ConfigError, match=r"text.freeze_blocks must be at most 2, the blocks of"):
        TwoTowers(tiny("text.freeze_blocks=9"))
