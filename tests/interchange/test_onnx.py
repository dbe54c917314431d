"""A model as a folder for onnxruntime: the same embeddings, without PyTorch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from PIL import Image

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import PackedMels, lay_end_to_end
from flap_fast.data.preprocess.preprocessor import make_preprocessor
from flap_fast.data.preprocess.waveform import BadSound, crop_and_fill
from flap_fast.interchange.to_onnx import embed
from flap_fast.interchange.to_onnx.comparison import compare
from flap_fast.interchange.to_onnx.folder import export_onnx
from flap_fast.interchange.to_onnx.graphs import (
    SoundFrontEnd,
    graphs,
    portable_model,
    write_graph,
)
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import load
from tests.sounds import chirp, noise
from tests.test_cli import flap
from tests.tiny import HTSAT, YAMNET_NAMED, tiny, tiny_clip

VARIABLE = ("audio.length=variable", "audio.max_duration_s=0.8", "audio.depth=1")
CLAP = ("audio.mel=clap", "audio.sample_rate_hz=16000", "audio.high_hz=8000")
CAPTIONS = ["a dog barks", "rain on a roof", "a piano"]


def session_of(file: Path) -> Any:
    """An onnxruntime session; of its type, an output may be much else than an array."""
    return onnxruntime.InferenceSession(file)


def model_of(config: Config) -> TwoTowers:
    """A model whose weights are all of some size, norms' and biases' too."""
    torch.manual_seed(0)
    model = TwoTowers(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model.eval()


def saved(config: Config, folder: Path) -> Path:
    model = model_of(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def written(config: Config, name: str, folder: Path) -> tuple[Any, TwoTowers]:
    """One graph of a model, and the model."""
    model = model_of(config)
    graph = graphs(portable_model(model, config), config)[name]
    write_graph(graph, folder / "graph.onnx")
    return session_of(folder / "graph.onnx"), model


@pytest.fixture(scope="module")
def ours(tmp_path_factory, roberta_folder: Path) -> Path:
    text = (f"text.folder={roberta_folder}", "text.pool=mean", "text.max_tokens=40")
    return saved(tiny(*VARIABLE, *CLAP, *text), tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def exported(ours: Path) -> Path:
    assert export_onnx(ours, ours / "onnx").startswith("for onnxruntime; see ")
    return ours / "onnx"


@pytest.fixture(scope="module")
def ours_of_images(tmp_path_factory) -> Path:
    return saved(tiny_clip("text.depth=1"), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def exported_of_images(ours_of_images: Path) -> Path:
    """Exported whole; a caption of the comparison is longer than its positions."""
    export_onnx(ours_of_images, ours_of_images / "onnx")
    return ours_of_images / "onnx"


def test_a_folder_that_exists_is_refused(ours: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    assert flap("export", ours, tmp_path / "old", "--onnx", monkeypatch=monkeypatch) == 2
    assert "OUT must be new" in capsys.readouterr().err


def test_the_page_says_how_far_each_file_is_from_pytorch(exported: Path):
    page = (exported / "README.md").read_text()
    rows = {row.split()[0]: row.split()[1:] for row in page.splitlines() if ".onnx  " in row}
    files = ["audio.onnx", "audio.int8.onnx", "text.onnx", "text.int8.onnx"]
    assert [name for name in rows if name in files] == files
    assert all(float(rows[name][1]) > (0.99 if "int8" in name else 0.9999) for name in files)
    assert 0 < float(rows["frontend.onnx"][0]) < 0.02
    assert (exported / "audio.int8.onnx").stat().st_size < (exported / "audio.onnx").stat().st_size


WITHOUT = """
import re, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "flap_fast", "flap_kernels", "transformers", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "")
(code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
exec(code, {})
"""


def test_the_python_of_the_page_runs_without_pytorch_and_this_package(exported: Path, ours: Path):
    wave = np.stack([chirp(200, 3000, 0.537, 22_050), noise(1, 0.537, 22_050)], 1)
    soundfile.write(exported / "dog.wav", wave, 22_050)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=exported, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    printed = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [caption for _, _, caption in printed] == CAPTIONS
    model = load(ours, "cpu")
    text, sound = model.embed_text(CAPTIONS), model.embed_audio([exported / "dog.wav"])
    cosines = [float(cosine) for cosine, _, _ in printed]
    assert np.allclose(cosines, (sound @ text.T)[0], atol=6e-4)  # printed with three digits
    percent = [float(p.rstrip("%")) for _, p, _ in printed]
    assert np.allclose(percent, 100 * model.probabilities(sound, text)[0], atol=0.06)
    assert max(cosines) - min(cosines) > 5e-3  # 6e-4 means something


def test_a_sound_of_any_length_embeds_as_with_pytorch(exported: Path, ours: Path):
    """One shorter than a patch, odd ones, and one that is cropped; int8 not far from it."""
    models = embed.Model(exported), embed.Model(exported, int8=True)
    pytorch = load(ours, "cpu")
    for n, seconds in enumerate((0.05, 0.3011, 0.7999, 1.3)):
        wave = noise(n, seconds, 16_000, slope=n % 3)
        soundfile.write(exported / "sound.wav", wave, 16_000, subtype="FLOAT")
        wanted = pytorch.embed_audio([wave], crop="center").numpy()
        found, rounded = (model.embed(exported / "sound.wav") for model in models)
        assert np.abs(found - wanted).max() < 1e-5
        assert 0.99 < (rounded * wanted).sum() < 0.999999


WAVE = chirp(200, 3000, 0.3, 16_000)
FAULTS: dict[str, tuple[np.ndarray, str]] = {
    "16-bit values as floats": (32767 * WAVE, "FLOAT"),
    "16-bit values as 32-bit ones": ((32767 * WAVE).astype(np.int32), "PCM_32"),
    "channels that cancel out": (np.stack([WAVE, -WAVE], 1), "PCM_16"),
    "no samples": (WAVE[:0], "PCM_16"),
    "not finite": (np.where(np.arange(len(WAVE)) == 9, np.nan, WAVE), "FLOAT"),
}


@pytest.mark.parametrize("name", [*FAULTS, "no file", "no sound"])
def test_a_sound_that_pytorch_refuses_is_refused_in_the_same_words(
    name: str, exported: Path, ours: Path, tmp_path: Path
):
    file = tmp_path / "sound.wav"
    if name in FAULTS:
        wave, subtype = FAULTS[name]
        soundfile.write(file, wave, 16_000, subtype=subtype)
    elif name == "no sound":
        file.write_text("hello")
    with pytest.raises(BadSound) as refused:
        load(ours, "cpu").embed_audio([file])
    with pytest.raises(ValueError, match=f"^{re.escape(str(refused.value))}$"):
        embed.Model(exported).embed(file)


def test_captions_are_refused_or_embedded_as_with_pytorch(exported: Path, ours: Path):
    model, pytorch = embed.Model(exported), load(ours, "cpu")
    assert model.embed_text([]).shape == tuple(pytorch.embed_text([]).shape) == (0, 16)
    captions = ["\ufeffa dog", "", *CAPTIONS]
    found = model.embed_text(captions, batch=2)
    assert np.abs(found - pytorch.embed_text(captions).numpy()).max() < 1e-5
    for wrong in ("a dog", ["a dog", None], ["\ud800"]):
        with pytest.raises((TypeError, ValueError)) as refused:
            pytorch.embed_text(wrong)
        with pytest.raises((TypeError, ValueError), match=re.escape(str(refused.value))):
            model.embed_text(wrong)


def test_a_clip_has_the_same_int8_vector_whichever_it_comes_with(exported: Path):
    tower = session_of(exported / "audio.int8.onnx")
    media = np.random.default_rng(0).standard_normal((3, 1, 48, 64)).astype(np.float32)
    media[2] *= 100
    (together,) = tower.run(None, {"media": media})
    (alone,) = tower.run(None, {"media": media[:1]})
    assert np.abs(together[0] - alone[0]).max() < 1e-6


TOWERS = {
    "htsat": tiny(*HTSAT, "audio.depths=[1, 2]", "text.depth=1"),
    "yamnet and its classes": tiny(*YAMNET_NAMED, "joint.class_names=0.1", "text.depth=1"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_media_in_batches_embed_as_with_pytorch(name: str, tmp_path: Path):
    config = TOWERS[name]
    session, model = written(config, config.encoder.modality, tmp_path)
    channels, frames, bins = config.encoder.input_shape(config.fusion)
    for B in (1, 3):
        media = 10 * torch.randn(B, channels, frames, bins)
        media *= torch.arange(1, B + 1)[:, None, None, None]
        (found,) = session.run(None, {"media": media.numpy()})
        with torch.no_grad():
            wanted = model.embed_media(media)
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-5
        assert B == 1 or (wanted[0] - wanted[1]).abs().max() > 1e-3  # 1e-5 means something


def compare_captions(folder: Path, pytorch: TwoTowers, longest: int) -> None:
    """The text file against PyTorch, on batches of captions of many lengths."""
    session = session_of(folder / "text.onnx")
    for lengths in ([1], [longest], [3, 17, 6]):
        ids = torch.randint(5, 200, (len(lengths), max(lengths)))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        (found,) = session.run(None, {"ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            wanted = pytorch.embed_text(ids, mask)
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-5
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3  # 1e-5 means something


def test_captions_in_batches_embed_as_with_a_roberta(exported: Path, ours: Path):
    compare_captions(exported, load(ours, "cpu").model, 40)


def test_captions_in_batches_embed_as_with_a_clip(exported_of_images: Path, ours_of_images: Path):
    compare_captions(exported_of_images, load(ours_of_images, "cpu").model, 77)


def compare_front_end(session: Any, config: Config) -> None:
    """A front end's file against this package, on waves of many lengths."""
    preprocessor = make_preprocessor(config, Ranks(device=torch.device("cpu")))
    for n, seconds in enumerate((0.01, 0.3011, 0.5, 1.0, 1.7)):
        wave = noise(n, seconds, config.audio.sample_rate_hz, slope=n % 3)
        clip = crop_and_fill(wave, 0.5, config.audio)
        wanted = preprocessor.finish(lay_end_to_end([clip], np.zeros(1))).media
        wanted = wanted.mel[None, None] if isinstance(wanted, PackedMels) else wanted
        (found,) = session.run(None, {"wave": wave[None]})
        assert found.shape == tuple(wanted.shape)
        assert np.abs(found - wanted.numpy()).max() < 2e-3


def test_a_front_end_for_clips_of_any_length_transforms_as_this_package(exported, ours):
    """CLAP's log-mel, whole repeats and then zeros."""
    compare_front_end(session_of(exported / "frontend.onnx"), load(ours, "cpu").config)


def test_a_front_end_for_one_length_transforms_as_this_package(tmp_path: Path):
    """Kaldi's log-mel of samples of 16 bits, repeats that are cut."""
    config = tiny("audio.filling=repeat", "audio.int16_roundtrip=true")
    compare_front_end(written(config, "frontend", tmp_path)[0], config)


@pytest.mark.parametrize("filling", ["repeatpad", "pad", "repeat"])
def test_waves_are_cropped_and_filled_as_by_this_package(filling: str):
    config = tiny(f"audio.filling={filling}")
    front_end = SoundFrontEnd(config)
    for samples in (1, 1000, 5333, 8000, 16_000, 16_001, 30_000):
        wave = noise(samples, samples / 16_000, 16_000)
        found = front_end._cropped_and_filled(torch.from_numpy(wave))
        assert np.array_equal(found.numpy(), crop_and_fill(wave, 0.5, config.audio))


def test_a_clip_embeds_images_of_any_size_as_with_pytorch(
    exported_of_images: Path, ours_of_images: Path, tmp_path: Path
):
    model, pytorch = embed.Model(exported_of_images), load(ours_of_images, "cpu")
    for n, (width, height) in enumerate(((32, 32), (75, 41), (50, 91))):
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        found = model.embed(tmp_path / "image.png")
        wanted = pytorch.embed_image([tmp_path / "image.png"]).numpy()
        assert np.abs(found - wanted).max() < 1e-5


def test_images_of_16_bits_embed_as_with_pytorch_and_strips_are_refused(
    exported_of_images: Path, ours_of_images: Path, tmp_path: Path
):
    model, pytorch = embed.Model(exported_of_images), load(ours_of_images, "cpu")
    file = tmp_path / "image.png"
    Image.fromarray((997 * np.arange(40 * 50)).astype(np.uint16).reshape(40, 50)).save(file)
    assert np.abs(model.embed(file) - pytorch.embed_image([file]).numpy()).max() < 1e-5
    Image.new("RGB", (400, 4)).save(file)
    for found in (pytorch.embed_image, lambda files: model.embed(files[0])):
        with pytest.raises(ValueError, match=r"image\.png: a strip: 400 x 4 pixels"):
            found([file])


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, monkeypatch):
    fused = saved(tiny(*HTSAT, "fusion.type=daf_1d"), tmp_path / "fused")
    with pytest.raises(ConfigError, match=r"fusion\.type must be none for --onnx.*got 'daf_1d'"):
        export_onnx(fused, tmp_path / "out")
    config = tiny(*VARIABLE, "text.depth=1", "audio.attention_window_s=0.1")
    rule = r"audio\.encoder = vit must be one that torch\.onnx can trace.*attention_window_s"
    with pytest.raises(ConfigError, match=rule):
        written(config, "audio", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'flap_fast\[onnx\]'"):
        export_onnx(fused, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_embeds_otherwise_than_pytorch_is_refused(exported: Path, ours: Path):
    model = load(ours, "cpu")
    with torch.no_grad():
        model.model.text_head[0].weight.mul_(-1)  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"text\.onnx must embed as PyTorch does, with a cosine"):
        compare(exported, model.model, model.config, model.tokenizer)


@pytest.mark.parametrize(("factor", "norm"), [(1e38, "0"), (float("nan"), "nan")])
def test_weights_that_are_too_large_are_blamed_and_not_the_export(
    factor: float, norm: str, exported: Path, ours: Path
):
    model = load(ours, "cpu")
    with torch.no_grad():
        model.model.audio_head[-1].weight.mul_(factor)  # type: ignore[index]
    rule = rf"audio embeddings of PyTorch must be unit vectors, got {norm}.*; take an earlier"
    with pytest.raises(ConfigError, match=rule):
        compare(exported, model.model, model.config, model.tokenizer)


def test_the_page_names_every_file_that_is_there(exported: Path):
    made = {"dog.wav", "sound.wav", "README.md", "SHA256SUMS", "__pycache__"}
    files = {file.name for file in exported.iterdir()} - made
    page = (exported / "README.md").read_text()
    assert files == set(re.findall(r"`([\w.]+\.(?:onnx|json))`", page)) | {"embed.py"}


def test_no_file_names_a_folder_of_the_machine_that_wrote_it(exported: Path):
    for file in exported.iterdir():
        found = file.read_bytes() if file.is_file() else b""
        assert str(Path(__file__).parents[2]).encode() not in found, file
        assert sys.prefix.encode() not in found, file


def test_the_program_says_what_it_takes_and_what_it_cannot_use(exported: Path):
    def said(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, exported / "embed.py", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        return done.stderr

    assert said("dog.wav").startswith("Embeds sounds, images and captions")
    assert said("none.wav", "a dog") == "none.wav: missing: no such file\n"
