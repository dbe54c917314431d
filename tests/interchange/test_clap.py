"""Folders of transformers' ClapModel and LAION-CLAP's files: in, out, and the same numbers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.preprocess.clap_mel import mel_matrix
from flap_fast.interchange.clap_hf import CLAP
from flap_fast.interchange.convert import export_checkpoint, import_checkpoint
from flap_fast.interchange.layout import Export
from flap_fast.interchange.tensors import read_tensors
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import (
    load_model,
    load_weights,
    model_folder,
    save_model,
)
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import load
from flap_fast.training.loop import train
from tests.encoders.test_htsat import decibels
from tests.tiny import HTSAT, as_if_trained, htsat_of, tiny

# What a .pt does not tell of a front end that is not LAION-CLAP's own.
FRONT_END = (
    *("audio.sample_rate_hz=16000", "audio.high_hz=8000", "audio.duration_s=1.0"),
    "audio.frames=101",
)
FUSIONS = {"unfused": (), "fused": ("fusion.type=aff_2d",)}
LONGER = torch.tensor([True, False, True])


@pytest.fixture(scope="module", params=FUSIONS)
def trained(request, roberta_folder: Path, tmp_path_factory) -> tuple[Path, Config, TwoTowers]:
    """A model folder whose weights and statistics are none of those a model begins with."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(*HTSAT, f"text.folder={roberta_folder}", *FUSIONS[request.param])
    torch.manual_seed(0)
    model = TwoTowers(config).eval()
    as_if_trained(model)
    save_model(folder, config, model, model.state_dict())
    return folder, config, model


def embeddings(model: TwoTowers, config: Config, folder: Path) -> tuple[Tensor, Tensor]:
    mel, ids, mask = inputs(config, folder)
    with torch.no_grad():
        audio = model.embed_media(mel, longer=LONGER if config.fusion.on else None)
        return audio, model.embed_text(ids, mask)


def inputs(config: Config, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    words = AutoTokenizer.from_pretrained(folder)(
        ["a dog barks", "rain", "a tone that rises"], return_tensors="pt", padding=True
    )
    mel = decibels(htsat_of(config), 3, channels=4 if config.fusion.on else 1)
    return mel, words["input_ids"], words["attention_mask"]


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_weights(a), load_weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_clap_model_answers_as_the_model_that_was_exported(trained, tmp_path):
    folder, config, model = trained
    assert export_checkpoint(folder, tmp_path / "hf") == "a folder for transformers.ClapModel"
    opened: Any = ClapModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    theirs, info = opened
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mel, ids, mask = inputs(config, tmp_path / "hf")
    with torch.no_grad():
        out = theirs.eval()(ids, mel, is_longer=LONGER.long()[:, None], attention_mask=mask)
    audio, text = embeddings(model, config, folder / "text")
    assert (out.audio_embeds - audio).abs().max() <= 1e-5
    assert (out.text_embeds - text).abs().max() <= 1e-5
    logits = torch.tensor(3.0).exp() * audio @ text.T
    assert (out.logits_per_audio - logits).abs().max() <= 1e-3
    assert (audio - audio.mean(0)).abs().max() > 0.01
    assert (text - text.mean(0)).abs().max() > 1e-3
    front = ClapFeatureExtractor.from_pretrained(tmp_path / "hf")
    assert (front.frequency_min, front.frequency_max) == (50, 8000)
    assert front.truncation == ("fusion" if config.fusion.on else "rand_trunc")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["text_config"]["layer_norm_eps"] == 1e-5
    assert written["text_config"]["max_position_embeddings"] == 130
    assert written["audio_config"]["drop_path_rate"] == 0.1


def test_out_to_transformers_and_in_again_is_the_same_to_the_bit(trained, tmp_path):
    folder, config, _ = trained
    export_checkpoint(folder, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "back", ["specaug.time_frames=16"])
    assert same_weights(folder, tmp_path / "back")
    _, back = load_model(tmp_path / "back")
    assert back.audio == config.audio.model_copy(update={"size": htsat_of(back).size})
    assert back.fusion == config.fusion
    assert back.joint.width == config.joint.width
    # And transformers' own folder, saved by it: short files, which leave out class defaults.
    ClapModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "theirs")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert same_weights(folder, tmp_path / "again")
    opened = load(tmp_path / "again", "cpu")
    assert opened.embed_audio([torch.linspace(-1, 1, 16_000)]).shape == (1, 16)
    assert torch.allclose(
        opened.embed_text(["a dog barks"]), load(folder, "cpu").embed_text(["a dog barks"])
    )


def test_a_clap_models_folder_opens_as_it_is(trained, tmp_path):
    folder, _, _ = trained
    export_checkpoint(folder, tmp_path / "hf")
    sound, caption = torch.linspace(-1, 1, 16_000), ["a dog barks"]
    theirs, ours = load(tmp_path / "hf", "cpu"), load(folder, "cpu")
    assert torch.equal(theirs.embed_audio([sound]), ours.embed_audio([sound]))
    assert torch.equal(theirs.embed_text(caption), ours.embed_text(caption))
    with pytest.raises(ConfigError, match=r"must be this project's model, .*; flap import .* OUT"):
        model_folder(tmp_path / "hf")


def laion_file(folder: Path, config: Config, file: Path, prefix: str = "module.") -> dict:
    """A state dict in LAION's names, with the tensors that its files hold besides."""
    state = {}
    for name, value in load_weights(folder).items():
        name = name.replace("audio.", "audio_branch.", 1) if name[:6] == "audio." else name
        name = name.replace("text.inner.", "text_branch.").replace("_head.", "_projection.")
        state[name] = value.clone()
    state["logit_scale_a"] = state.pop("logit_scale")[0].clone()
    state["logit_scale_t"] = torch.tensor(2.5)
    state["text_branch.embeddings.position_ids"] = torch.arange(130)[None]
    branch = "audio_branch."
    for name, shape in {
        "spectrogram_extractor.stft.conv_real.weight": (5, 1, 8),
        "tscam_conv.weight": (7, 32, 2, 3),
        "head.bias": (7,),
        "layers.0.blocks.1.attn_mask": (4, 64, 64),
        "layers.0.blocks.0.attn.relative_position_index": (64, 64),
    }.items():
        state[branch + name] = torch.randn(shape)
    state[branch + "logmel_extractor.melW"] = torch.from_numpy(mel_matrix(config.audio)).float().T
    for side in ("audio", "text"):
        state[f"{side}_transform.sequential.0.weight"] = torch.randn(16, 16)
    state = {prefix + name: value.contiguous() for name, value in state.items()}
    torch.save({"epoch": 45, "name": "x", "optimizer": {"state": {}}, "state_dict": state}, file)
    return state


def test_a_training_begins_with_an_imported_clap_and_its_config(trained, prepared, tmp_path):
    """At a learning rate of nothing, its weights are what the run saves."""
    folder, _, _ = trained
    export_checkpoint(folder, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    overrides = [
        *(f"run.folder={tmp_path}", f"data.train={prepared}/train", "log.tensorboard=false"),
        *("train.global_batch=8", "train.steps=1", "optim.lr=1e-9"),
    ]
    train(load_config(tmp_path / "ours/config.yaml", overrides))
    found, wanted = load_weights(model_folder(tmp_path / "flap")), load_weights(folder)
    assert found["audio.bn0.num_batches_tracked"] == 1
    differ = {name for name in wanted if not torch.allclose(found[name], wanted[name], atol=1e-6)}
    assert all(".running_" in name or name.endswith("batches_tracked") for name in differ)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_laions_file_comes_in_and_goes_out_unchanged(trained, roberta_folder, tmp_path, prefix):
    folder, config, _ = trained
    state = laion_file(folder, config, tmp_path / "a.pt", prefix)
    given = [f"text.folder={roberta_folder}", *FRONT_END]
    import_checkpoint(tmp_path / "a.pt", tmp_path / "ours", given)
    assert same_weights(folder, tmp_path / "ours")
    _, found = load_model(tmp_path / "ours")
    assert found.fusion.type == config.fusion.type
    assert htsat_of(found).stages == htsat_of(config).stages
    assert found.audio.mel_variant == config.audio.mel_variant
    export_checkpoint(tmp_path / "ours", tmp_path / "b.pt")
    out = torch.load(tmp_path / "b.pt", weights_only=True)["state_dict"]
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], state[name]) for name in state)
    # Its second scale goes on to transformers.
    export_checkpoint(tmp_path / "ours", tmp_path / "hf")
    assert read_tensors(tmp_path / "hf/model.safetensors")["logit_scale_t"] == 2.5


def test_htsats_own_weights_come_in_as_a_tower_to_begin_with(trained, prepared, tmp_path):
    """The audio side of LAION's names, without the rest."""
    folder, config, model = trained
    begin = "audio_branch."
    state = laion_file(folder, config, tmp_path / "laion.pt", "")
    state = {n.replace(begin, "sed_model."): v for n, v in state.items() if n.startswith(begin)}
    torch.save({"state_dict": state, "epoch": 9}, tmp_path / "htsat.ckpt")
    with pytest.raises(ConfigError, match=r"got 'sed_model\..*; --strip PREFIX shortens names"):
        import_checkpoint(tmp_path / "htsat.ckpt", tmp_path / "tower")
    said = import_checkpoint(
        tmp_path / "htsat.ckpt", tmp_path / "tower", FRONT_END, strip=["sed_model."]
    )
    assert "train.init_audio_from" in said
    other = tiny(
        *HTSAT, f"fusion.type={config.fusion.type}", f"train.init_audio_from={tmp_path / 'tower'}"
    )
    begun = TwoTowers(other)
    put_first_weights(begun, other)
    audio, wanted = begun.get_submodule("audio"), model.get_submodule("audio").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in audio.state_dict().items())
    if config.fusion.on:
        return
    with pytest.raises(ConfigError, match=r"audio\.mel_variant must give the mel matrix"):
        import_checkpoint(
            *(tmp_path / "htsat.ckpt", tmp_path / "x", [*FRONT_END, "audio.low_hz=0"]),
            strip=["sed_model."],
        )


def test_each_missing_or_unexpected_tensor_of_a_laion_file_is_named(
    trained, roberta_folder, tmp_path
):
    folder, config, _ = trained
    state = laion_file(folder, config, tmp_path / "whole.pt", "")
    del state["audio_branch.norm.bias"]
    state["audio_branch.layers.0.blocks.0.attn.extra"] = torch.zeros(3)
    state["text_projection.2.bias"] = torch.zeros(8)
    file, given = tmp_path / "bad.pt", [f"text.folder={roberta_folder}", *FRONT_END]
    torch.save({"state_dict": state}, file)
    with pytest.raises(ConfigError) as error:
        import_checkpoint(file, tmp_path / "ours", given)
    for line in (
        "missing     audio.norm.bias (32,)",
        "unexpected  audio.layers.0.blocks.0.attn.extra (3,)",
        "mis-shaped  text_head.2.bias (8,), wanted (16,)",
        "--partial takes what fits",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt", "whole.pt"]
    import_checkpoint(file, tmp_path / "ours", given, partial=True)
    weights, whole = load_weights(tmp_path / "ours"), load_weights(folder)
    differ = {name for name in whole if not torch.equal(weights[name], whole[name])}
    assert differ == {"audio.norm.bias", "text_head.2.bias"}


def test_errors_about_clap_name_the_remedy(trained, roberta_folder, tmp_path):
    folder, config, _ = trained
    file = tmp_path / "a.pt"
    laion_file(folder, config, file)
    with pytest.raises(ConfigError, match=r"text\.folder must name a RoBERTa.*hf download"):
        import_checkpoint(file, tmp_path / "x", FRONT_END)
    given = [f"text.folder={roberta_folder}", *FRONT_END]
    if not config.fusion.on:
        with pytest.raises(ConfigError, match=r"audio\.mel_variant must give the mel matrix"):
            import_checkpoint(file, tmp_path / "x", [*given, "audio.low_hz=0"])
    with pytest.raises(ConfigError, match=r"OUT must be a folder where .* was not imported"):
        export_checkpoint(folder, tmp_path / "b.pt")
    with pytest.raises(ConfigError, match=r"opens as it is, or with train\.init_from"):
        import_checkpoint(folder, tmp_path / "x")
    with pytest.raises(ConfigError, match="OUT must be new"):
        export_checkpoint(folder, folder)
    export_checkpoint(folder, tmp_path / "hf")
    settings = tmp_path / "hf/preprocessor_config.json"
    features = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in features.items() if k != "frequency_min"}))
    with pytest.raises(ConfigError, match=r"got 'no \['frequency_min'\]'"):
        import_checkpoint(tmp_path / "hf", tmp_path / "x")
    settings.write_text(json.dumps(features))
    theirs = json.loads((tmp_path / "hf/config.json").read_text())
    theirs["audio_config"]["spec_size"] *= 2
    (tmp_path / "hf/config.json").write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match=r"audio_config\.spec_size must be 64, .* got 128"):
        import_checkpoint(tmp_path / "hf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_settings_are_read_from_a_processor_without_a_feature_extractor(trained, tmp_path):
    """As ClapProcessor saves them."""
    folder, config, _ = trained
    export_checkpoint(folder, tmp_path / "hf")
    own = tmp_path / "hf/preprocessor_config.json"
    processor = {"feature_extractor": json.loads(own.read_text()), "processor_class": "x"}
    (tmp_path / "hf/processor_config.json").write_text(json.dumps(processor))
    own.unlink()
    import_checkpoint(tmp_path / "hf", tmp_path / "back")
    _, back = load_model(tmp_path / "back")
    assert back.audio == config.audio.model_copy(update={"size": htsat_of(back).size})
    (tmp_path / "hf/processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"hf must hold preprocessor_config.json"):
        import_checkpoint(tmp_path / "hf", tmp_path / "x")


def test_statistics_that_transformers_lacks_make_it_no_clap_model(trained):
    folder, config, model = trained
    export = Export(folder, config, model, model.state_dict(), {}, "")
    assert CLAP.refusal(export) == ""
    for other in ({"mean": -20.0}, {"std": 10.0}):
        changed = config.model_copy(update={"audio": config.audio.model_copy(update=other)})
        assert "audio.mean" in CLAP.refusal(replace(export, config=changed))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"a": Trap()}}, tmp_path / "trap.pt")
    with pytest.raises(ConfigError, match="must hold only tensors and plain values"):
        import_checkpoint(tmp_path / "trap.pt", tmp_path / "x")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match="must hold only tensors and plain values"):
        import_checkpoint(tmp_path / "text.pt", tmp_path / "x")
    branch = {"audio_branch.bn0.weight": torch.ones(4), "audio_branch.conv.weight": torch.ones(4)}
    torch.save({"state_dict": branch}, tmp_path / "pann.pt")
    with pytest.raises(ConfigError, match=r"hold audio_branch\.patch_embed.* of a LAION"):
        import_checkpoint(tmp_path / "pann.pt", tmp_path / "x")
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"have LAION-CLAP's .* names, got 'conv.weight'"):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "x")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_named(zipped: bool, tmp_path):
    state = {f"audio_branch.{n}": torch.randn(9) for n in range(30)}
    torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole, draws = (tmp_path / "a.pt").read_bytes(), random.Random(0)
    for n in range(60):
        data = bytearray(whole[: draws.randrange(len(whole)) if n % 3 == 0 else len(whole)])
        for _ in range(9):
            data[draws.randrange(min(2000, len(data)))] = draws.randrange(256)
        (tmp_path / "b.pt").write_bytes(data)
        with pytest.raises(ConfigError):
            import_checkpoint(tmp_path / "b.pt", tmp_path / "x")
