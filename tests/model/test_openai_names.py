"""CLIP's checkpoints there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.configfile import parse_config
from flap_fast.model.flap import Flap
from flap_fast.model.openai_names import from_openai, openai_settings, to_openai
from tests.tiny import tiny, tiny_clip


def random_flap() -> Flap:
    torch.manual_seed(0)
    model = Flap(tiny_clip("text.width=128", "text.heads=2"))
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) * 100)  # counters and BatchNorm's averages too
    return model


def openai_names(layers: tuple[int, ...], depth: int) -> set[str]:
    """What a CLIP with a ResNet has at OpenAI's, spelt out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    both = ("weight", "bias")
    blocks = [f"layer{n}.{k}." for n, count in enumerate(layers, 1) for k in range(count)]
    convolved = {f"{at}conv{n}.weight" for at in ("", *blocks) for n in (1, 2, 3)}
    convolved |= {f"{at}bn{n}.{part}" for at in ("", *blocks) for n in (1, 2, 3) for part in norm}
    convolved |= {f"layer{n}.0.downsample.0.weight" for n in (1, 2, 3, 4)}
    convolved |= {f"layer{n}.0.downsample.1.{part}" for n in (1, 2, 3, 4) for part in norm}
    convolved |= {f"attnpool.{p}_proj.{kind}" for p in "qkvc" for kind in both}
    names = {f"visual.{name}" for name in {*convolved, "attnpool.positional_embedding"}}
    parts = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for n in range(depth):
        at = f"transformer.resblocks.{n}."
        names |= {f"{at}attn.in_proj_{kind}" for kind in both}
        names |= {f"{at}{part}.{kind}" for part in parts for kind in both}
    names |= {"ln_final.weight", "ln_final.bias", "token_embedding.weight"}
    return names | {"positional_embedding", "text_projection", "logit_scale"}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    same = all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a.keys() & b.keys())
    return same and a.keys() == b.keys()


def test_there_and_back_is_bit_exact():
    model = random_flap()
    ours = model.state_dict()
    theirs = to_openai(ours)
    assert theirs.keys() == openai_names((1, 1, 1, 1), 2)
    assert theirs["text_projection"].shape == (128, 16)
    assert torch.equal(theirs["text_projection"], ours["text_head.weight"].T)
    assert theirs["logit_scale"].shape == ()
    found = from_openai(theirs, ours)
    assert (found.missing, found.unexpected) == ((), ())
    assert equal(found.weights, dict(ours))
    assert equal(to_openai(found.weights), theirs)


def test_names_of_cyclip_and_sizes_of_openai_are_read():
    ours = random_flap().state_dict()
    sizes = {"input_resolution": torch.tensor(32), "vocab_size": torch.tensor(384)}
    theirs = {**to_openai(ours), **sizes, "context_length": torch.tensor(77)}
    found = from_openai({f"module.{name}": value for name, value in theirs.items()}, ours)
    assert (found.missing, found.unexpected) == ((), ())
    assert equal(found.weights, dict(ours))


def test_half_floats_stay_half_floats():
    ours = random_flap().state_dict()
    theirs = {name: value.half() for name, value in to_openai(ours).items()}
    assert found_dtypes(from_openai(theirs, ours).weights) == {torch.float16}


def found_dtypes(weights: dict[str, Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in weights.values()}


def test_counts_of_batches_may_be_lacking():
    ours = random_flap().state_dict()
    lacking = {n: v for n, v in to_openai(ours).items() if not n.endswith("num_batches_tracked")}
    found = from_openai(lacking, ours)
    assert found.missing == ()
    assert found.weights["image.bn1.num_batches_tracked"] == 0


def test_what_is_missing_strange_or_of_another_shape_is_named():
    ours = random_flap().state_dict()
    theirs = to_openai(ours)
    del theirs["ln_final.bias"]
    theirs["visual.proj"] = torch.zeros(2, 2)
    theirs["visual.conv1.weight"] = torch.zeros(1)
    found = from_openai(theirs, ours)
    assert found.missing == ("text.ln_final.bias",)
    assert set(found.unexpected) == {"image.proj", "image.conv1.weight"}
    assert not found.weights.keys() & {"image.proj", "image.conv1.weight", "text.ln_final.bias"}


def test_settings_are_read_from_the_shapes():
    model = random_flap()
    found = openai_settings(to_openai(model.state_dict()))
    config = parse_config(found)
    own = tiny_clip("text.width=128", "text.heads=2")
    assert config.image == own.image
    assert (config.text.width, config.text.depth, config.text.heads) == (128, 2, 2)
    assert (config.text.max_tokens, config.joint.width) == (own.text.max_tokens, 16)
    assert from_openai(to_openai(model.state_dict()), Flap(config).state_dict()).missing == ()


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match=r"with a ResNet .*attnpool"):
        openai_settings({"visual.proj": torch.zeros(1)})
    with pytest.raises(ConfigError, match="CLIP's towers"):
        to_openai(Flap(tiny()).state_dict())
