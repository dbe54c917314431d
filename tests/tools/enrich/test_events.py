"""Event tags: which are told, YAMNet's front end and numbers, transformers' classifiers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.data.preprocess.kaldi_mel import mel_matrix
from flap_fast.tools.enrich.classifier import Classifier
from flap_fast.tools.enrich.events import open_tagger, strongest
from flap_fast.tools.enrich.yamnet import Scale, log_mel_patches
from tests.sounds import noise, tone

RATE = 16_000


def test_likely_events_are_told_best_first_and_one_in_any_case():
    tags = [("Dog", 0.2), ("Rain", 0.9), ("Car", 0.19), ("Wind", 0.5)]
    assert strongest(tags, 0.2, 5) == [("Rain", 0.9), ("Wind", 0.5), ("Dog", 0.2)]
    assert strongest(tags, 0.2, 2) == [("Rain", 0.9), ("Wind", 0.5)]
    assert strongest(tags, 0.95, 5) == [("Rain", 0.9)]
    assert strongest([("Dog", 0.1), ("Rain", 0.1)], 0.0, 1) == [("Dog", 0.1)]


def yamnet_mel() -> np.ndarray:
    return mel_matrix(64, 400, RATE, 125.0, 7500.0).T


@pytest.mark.parametrize(
    ("samples", "patches"),
    [(1, 1), (15_600, 1), (15_601, 2), (15_600 + 7_680, 2), (15_600 + 7_681, 3), (160_000, 20)],
)
def test_a_clip_has_a_patch_every_048_seconds_and_none_of_it_is_left_out(samples, patches):
    assert log_mel_patches(np.zeros(samples, np.float32), yamnet_mel()).shape == (patches, 96, 64)


def test_yamnets_log_mel_by_hand():
    """HTK's mel in its other form, a window from NumPy, the triangles in mel; silence; a tone."""
    wave = noise(0, 0.975, RATE)
    magnitude = np.abs(np.fft.rfft(wave[160:560] * np.hanning(401)[:400], 512))

    def mel(hz):
        return 2595 * np.log10(1 + np.asarray(hz) / 700)

    points, at = np.linspace(mel(125), mel(7500), 66), mel(np.arange(257) * RATE / 512)[:, None]
    up = (at - points[:-2]) / (points[1:-1] - points[:-2])
    down = (points[2:] - at) / (points[2:] - points[1:-1])
    wanted = np.log(magnitude @ np.maximum(0, np.minimum(up, down)) + 0.001)
    # 1127 is 2595 / ln 10, rounded.
    assert np.abs(log_mel_patches(wave, yamnet_mel())[0, 1] - wanted).max() < 1e-3
    assert np.allclose(log_mel_patches(np.zeros(16_000), yamnet_mel()), np.log(0.001))
    loudest = log_mel_patches(tone(1000, 0.975, RATE), yamnet_mel())[0].mean(0).argmax()
    assert loudest == np.abs(points[1:-1] - mel(1000)).argmin()


def test_quantised_numbers_by_hand():
    scale = Scale(0.5, 10)
    assert scale.quantise(np.array([-100.0, -5.0, 0.0, 0.3, 1.0, 500.0])).tolist() == [
        0,
        0,
        10,
        11,
        12,
        255,
    ]
    assert scale.real(np.array([0, 10, 12], np.uint8)).tolist() == [-5.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """An AST of random weights, over three classes, as transformers saves one."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("ast")
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=1024,
        id2label={0: "Dog", 1: "Rain", 2: "Car"},
        label2id={"Dog": 0, "Rain": 1, "Car": 2},
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=1024).save_pretrained(folder)
    return folder


def test_a_classifier_of_transformers_is_a_tagger(classifier_folder):
    tagger = open_tagger(str(classifier_folder))
    assert isinstance(tagger, Classifier)
    assert (tagger.name, tagger.sample_rate_hz) == (str(classifier_folder), 16_000)
    short, long = noise(1, 1.0, RATE), noise(2, 12.0, RATE)
    tags = dict(tagger(short))
    assert list(tags) == ["Dog", "Rain", "Car"]
    assert all(0 < p < 1 for p in tags.values())
    assert sum(tags.values()) != pytest.approx(1, abs=0.05)  # each class on its own
    parts = [dict(tagger(long[: 10 * RATE])), dict(tagger(long[10 * RATE :]))]
    for name, probability in tagger(long):
        wanted = (10 * parts[0][name] + 2 * parts[1][name]) / 12
        assert probability == pytest.approx(wanted, abs=1e-5)
    # What is left of a second window counts from half a second on; a clip of nothing is silence.
    assert tagger(long[: 10 * RATE + 399]) == tagger(long[: 10 * RATE])
    assert len(tagger(short[:1])) == 3


def test_none_is_no_tagger_and_another_folder_is_refused(tmp_path, monkeypatch):
    assert open_tagger("none") is None
    with pytest.raises(
        ConfigError, match=r"^--tagger must hold an .onnx model .* or --tagger none"
    ):
        open_tagger(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--tagger must name an installed package, .* pip"):
        open_tagger("package:no_such_tagger/data")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--tagger must hold an audio classifier"):
        open_tagger(str(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^--tagger must have one \*class_map\*.csv next"):
        open_tagger(str(tmp_path))
    (tmp_path / "some_class_map.csv").write_text("index,mid,display_name\n0,/m/1,Dog\n")
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    rule = r"^--tagger must be 'none' without onnx; pip install 'flap_fast\[enrich\]'"
    with pytest.raises(ConfigError, match=rule):
        open_tagger(str(tmp_path))
