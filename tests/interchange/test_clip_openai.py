"""CLIPs in OpenAI's names: names and settings, files in and out, and trainings that begin so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config
from flap_fast.interchange.clip_openai import from_openai, openai_settings, to_openai
from flap_fast.interchange.convert import export_checkpoint, import_checkpoint
from flap_fast.model.model_folder import load_model, load_weights, model_folder, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.pictures import draw, write_pictures
from tests.test_cli import flap
from tests.tiny import tiny, tiny_clip

# Heads of 64, which is what a text tower of OpenAI's has.
SIZES = ("text.width=128", "text.heads=2", "text.max_tokens=24")
SCALARS = {"input_resolution": 32, "context_length": 24, "vocab_size": 384}


def random_flap() -> TwoTowers:
    torch.manual_seed(0)
    model = TwoTowers(tiny_clip(*SIZES)).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape))  # biases and BatchNorm's averages too
        elif name.endswith("num_batches_tracked"):
            value.fill_(7)
    return model


@pytest.fixture(scope="module")
def model() -> TwoTowers:
    return random_flap()


@pytest.fixture(scope="module")
def theirs(model: TwoTowers) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in to_openai(model.state_dict()).items()}


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


def test_import_after_export_is_bit_exact(model, theirs):
    ours = model.state_dict()
    assert theirs.keys() == openai_names((1, 1, 1, 1), 2)
    assert theirs["text_projection"].shape == (128, 16)
    assert torch.equal(theirs["text_projection"], ours["text_head.weight"].T)
    assert theirs["logit_scale"].shape == ()
    found, unused = from_openai(theirs)
    assert equal(found, dict(ours))
    assert unused == {}
    assert equal(to_openai(found), theirs)


def test_counts_of_batches_may_be_missing(model, theirs):
    lacking = {n: v for n, v in theirs.items() if not n.endswith("num_batches_tracked")}
    found, _ = from_openai(lacking)
    assert found.keys() == model.state_dict().keys()
    assert found["image.bn1.num_batches_tracked"] == 0


def test_settings_are_read_from_the_shapes(theirs):
    config, own = load_config(None, openai_settings(theirs)), tiny_clip(*SIZES)
    assert config.image == own.image
    assert config.text == own.text
    assert config.joint.width == 16
    vocabulary = {"token_embedding.weight": torch.empty(49_408, 128, device="meta")}
    assert "text.tokenizer=package:open_clip" in openai_settings(theirs | vocabulary)


def test_other_models_are_refused(theirs):
    with pytest.raises(ConfigError, match=r"a CLIP's with a ResNet .*attnpool.* got None"):
        openai_settings({"visual.proj": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"text_projection of 2 axes, got '\(8,\)'"):
        openai_settings(theirs | {"text_projection": torch.zeros(8)})
    with pytest.raises(ConfigError, match="CLIP's towers"):
        to_openai(TwoTowers(tiny()).state_dict())


def laid_out(theirs: dict[str, Tensor], form: str) -> dict[str, Any]:
    """As OpenAI's archives give it, with half floats; as CyCLIP saves, on many GPUs or one."""
    if form == "openai":
        halves = {n: v.half() if v.ndim > 1 else v for n, v in theirs.items()}
        return {**halves, **{name: torch.tensor(value) for name, value in SCALARS.items()}}
    prefix = "module." if form == "cyclip" else ""
    state = {prefix + name: value for name, value in theirs.items()}
    return {"epoch": 64, "name": "cyclip", "state_dict": state, "optimizer": {"state": {}}}


def stated(file: dict[str, Any]) -> dict[str, Tensor]:
    return file.get("state_dict", file)


@pytest.mark.parametrize("form", ["openai", "cyclip", "cyclip on one"])
def test_an_imported_file_is_exported_unchanged(model, theirs, tmp_path, form, monkeypatch):
    file, ours, out = tmp_path / "a.pt", tmp_path / "ours", tmp_path / "b.pt"
    saved = laid_out(theirs, form)
    torch.save(saved, file)
    assert flap("import", file, ours, monkeypatch=monkeypatch) == 0
    wanted = dict(model.state_dict())
    if form == "openai":
        wanted = {n: v.half().float() if v.ndim > 1 else v for n, v in wanted.items()}
    assert equal(load_weights(ours), wanted)
    assert flap("export", ours, out, monkeypatch=monkeypatch) == 0
    back = torch.load(out, weights_only=True)
    assert equal(stated(back), stated(saved))
    if form != "openai":
        assert (back["epoch"], back["name"], "optimizer" in back) == (64, "cyclip", False)

    opened, picture = load(ours, "cpu"), draw("red", "square", 0)
    assert opened.config.text.dropout == 0
    own = TwoTowers(tiny_clip(*SIZES)).eval()
    own.load_state_dict(wanted)
    save_model(tmp_path / "own", tiny_clip(*SIZES), own, wanted)
    expected = load(tmp_path / "own", "cpu")
    captions = ["a red square", "a blue disc"]
    assert torch.equal(opened.embed_image([picture]), expected.embed_image([picture]))
    text = opened.embed_text(captions)
    assert torch.equal(text, expected.embed_text(captions))
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_each_missing_or_unexpected_tensor_is_named(model, theirs, tmp_path):
    state = dict(theirs)
    del state["ln_final.bias"]
    state["visual.proj"] = torch.zeros(2, 2)
    state["visual.conv1.weight"] = torch.zeros(3, dtype=torch.float16)
    state["logit_scale"] = torch.zeros(2)
    file, ours = tmp_path / "bad.pt", tmp_path / "ours"
    torch.save(state, file)
    with pytest.raises(ConfigError) as error:
        import_checkpoint(file, ours)
    for line in (
        "missing     text.ln_final.bias (128,)",
        "unexpected  image.proj (2, 2)",
        "mis-shaped  image.conv1.weight (3,), wanted (4, 3, 3, 3)",
        "mis-shaped  logit_scale (2,), wanted (1,)",
        "--partial takes what fits",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]
    import_checkpoint(file, ours, partial=True)
    found, whole = load_weights(ours), model.state_dict()
    differ = {name for name in whole if not torch.equal(found[name], whole[name])}
    assert differ == {"text.ln_final.bias", "image.conv1.weight", "logit_scale"}
    # What began at random is no half float, whatever stood there.
    export_checkpoint(ours, tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(back["visual.conv1.weight"], found["image.conv1.weight"])


def test_errors_about_clip_name_the_remedy(theirs, tmp_path):
    file = tmp_path / "rn.pt"
    with warnings.catch_warnings(action="ignore"):  # PyTorch would rather have others
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), file)
    with pytest.raises(ConfigError, match=r"got 'a TorchScript archive, .*; save that first, in"):
        import_checkpoint(file, tmp_path / "x")
    state = theirs | {"token_embedding.weight": torch.zeros(500, 128)}
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"have the 500 tokens .*'384 of bytes'; give text\.tok"):
        import_checkpoint(file, tmp_path / "x")
    torch.save(theirs, file)
    import_checkpoint(file, tmp_path / "ours")
    with pytest.raises(ConfigError, match="OUT must be new"):
        export_checkpoint(tmp_path / "ours", file)
    config = tiny_clip("text.encoder=roberta")
    mixed = TwoTowers(config)
    save_model(tmp_path / "mixed", config, mixed, mixed.state_dict())
    with pytest.raises(ConfigError, match=r"have CLIP's towers .* got 'text_head\.0"):
        export_checkpoint(tmp_path / "mixed", tmp_path / "b.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixed", "ours", "rn.pt"]


def test_a_training_begins_with_an_imported_clip_and_goes_out_plain(theirs, tmp_path):
    """At a learning rate of nothing, its weights are what the run saves."""
    prepare(write_pictures(tmp_path / "files", 8), tmp_path / "shards", show=False)
    torch.save(laid_out(theirs, "cyclip"), tmp_path / "a.pt")
    import_checkpoint(tmp_path / "a.pt", tmp_path / "ours")
    overrides = [
        *(f"run.folder={tmp_path}", f"data.train={tmp_path}/shards/train", "log.tensorboard=false"),
        *("train.global_batch=8", "train.steps=1", "optim.lr=1e-9", "frontend.backend=torch"),
    ]
    config = load_config(tmp_path / "ours/config.yaml", overrides)
    assert config.text.tokenizer == str(tmp_path / "ours/text")
    train(config)
    export_checkpoint(tmp_path / "flap", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert found.keys() == theirs.keys()
    assert found["visual.bn1.num_batches_tracked"] == 8
    differ = {name for name in theirs if not torch.allclose(found[name], theirs[name], atol=1e-6)}
    assert all(".running_" in name or name.endswith("batches_tracked") for name in differ)


def test_a_clip_goes_out_to_a_folder_and_in_again(model, tmp_path):
    save_model(tmp_path / "ours", tiny_clip(*SIZES), model, model.state_dict())
    said = export_checkpoint(tmp_path / "ours", tmp_path / "hf")
    assert said.startswith("a FLAP's folder (its encoder embeds images); no clap_text/: ")
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert equal(load_weights(tmp_path / "back"), dict(model.state_dict()))
    _, config = load_model(tmp_path / "back")
    assert config.text.tokenizer == str(model_folder(tmp_path / "back") / "text")
