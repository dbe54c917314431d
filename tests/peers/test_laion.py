"""LAION-CLAP's preprocessing and HTSAT, on the weights of ours, from sounds to embeddings."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from flap_fast.data.batch import lay_end_to_end
from flap_fast.data.preprocess.waveform import fill
from flap_fast.interchange.laion import to_laion

pytest.importorskip("torchlibrosa")
if find_spec("laion_clap") is None:
    pytest.skip("laion_clap is not installed", allow_module_level=True)

FEATURES = dict(
    [("mel_bins", 64), ("sample_rate", 48_000), ("window_size", 1024), ("hop_size", 480)],
    fmin=50,
    fmax=14_000,
    class_num=527,
)
WHY = "its STFT is a float32 convolution"


@pytest.fixture(scope="module")
def laion() -> Any:
    """Its modules, imported without the tokenizers that it would download meanwhile."""
    spec = find_spec("laion_clap")
    assert spec is not None
    assert spec.submodule_search_locations
    with (
        mock.patch.object(sys, "path", [*sys.path, *spec.submodule_search_locations]),
        mock.patch.object(PreTrainedTokenizerBase, "from_pretrained"),
    ):
        data, htsat = import_module("training.data"), import_module("clap_module.htsat")
    return SimpleNamespace(data=data, htsat=htsat)


def theirs(laion: Any, ours: Any) -> torch.nn.Module:
    """Its HTSAT of the same sizes and weights."""
    audio = ours.config.audio
    model = laion.htsat.HTSAT_Swin_Transformer(
        spec_size=audio.image_side,
        embed_dim=audio.stages[0][0],
        depths=[depth for _, depth, _ in audio.stages],
        num_heads=[heads for _, _, heads in audio.stages],
        config=SimpleNamespace(**FEATURES),
    )
    begin = "audio_branch."
    weights = to_laion(ours.model.state_dict(), {})
    own = {n.removeprefix(begin): v for n, v in weights.items() if n.startswith(begin)}
    missing, unexpected = model.load_state_dict(own, strict=False)
    computed = ("extractor.", "tscam_conv.", "head.", "relative_position_index", "attn_mask")
    assert not unexpected
    assert [name for name in missing if not any(part in name for part in computed)] == []
    return model.eval()


def test_sounds_have_the_same_embeddings(clips, rounded, largest, laion):
    ours = rounded.opened
    model, data = theirs(laion, ours), laion.data
    waves = []
    for wave in clips.waves:
        exact = torch.from_numpy(data.int16_to_float32(data.float32_to_int16(wave)))
        sample = data.get_audio_features({}, exact, 480_000, "rand_trunc", "repeatpad", FEATURES)
        waves.append(sample["waveform"])
    batch = torch.stack(waves)
    with torch.no_grad():
        mels: Any = model.logmel_extractor(model.spectrogram_extractor(batch))  # type: ignore[operator]
        pooled = model({"waveform": batch})["embedding"]
        found = functional.normalize(ours.model.get_submodule("audio_head")(pooled), dim=-1)
    filled = [fill(wave, 480_000, "repeatpad") for wave in clips.waves]
    own = ours._preprocessor.finish(lay_end_to_end(filled, np.zeros((len(filled), 4)))).media
    loud = mels > -80
    difference = (own.reshape(mels.shape) - mels)[loud].abs().max().item()
    largest("laion_clap", "log-mels, in dB, above -80 dB", difference, 2e-2, WHY)
    audio = ours.embed_audio(clips.files)
    assert (audio - audio.mean(0)).abs().max() > 0.01
    difference = (found - audio).abs().max().item()
    largest("laion_clap", "embeddings of sounds", difference, 1e-5, WHY)
