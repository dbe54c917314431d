"""YAMNet: against its layers one by one, packed and alone, trained, resumed and read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, pad, relu

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.data.batch import EncodedBatch, PackedMels, lay_end_to_end
from flap_fast.data.preprocess.audio import AudioPreprocessor
from flap_fast.data.preprocess.kaldi_mel import mel_matrix
from flap_fast.encoders.audio_settings import Mel
from flap_fast.encoders.yamnet.model import Yamnet
from flap_fast.encoders.yamnet.settings import YamnetSettings
from flap_fast.model.masking import tokens_of_seconds
from flap_fast.model.model_folder import load_weights, model_folder
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import load
from flap_fast.tools.enrich.yamnet import log_mel_patches
from flap_fast.training.loop import Stopped, train
from flap_fast.training.stop import Stop
from tests.sounds import encode, noise
from tests.tiny import YAMNET, tiny

# MobileNet v1's table: channels and stride of each block. Source: arXiv 1704.04861, table 1.
TABLE = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


def encoder(width: int = 32) -> Yamnet:
    torch.manual_seed(0)
    module = Yamnet(YamnetSettings(width=width, mel_bins=64, max_duration_s=4))
    for bias in (p for p in module.parameters() if p.ndim == 1):
        torch.nn.init.normal_(bias, std=0.1)
    return module.eval()


def packed(*pieces: int) -> PackedMels:
    """Clips of so many pieces, ascending, whose rows are the other way round."""
    frames = tuple(48 * (count + 1) for count in pieces)
    return PackedMels(torch.randn(sum(frames), 64), frames, tuple(range(len(pieces)))[::-1])


@pytest.mark.parametrize("seconds", [0.05, 0.95, 1.0, 1.44, 1.46, 3.3])
def test_a_sounds_pieces_are_those_of_the_tagger(seconds: float):
    """From the waveform on: YAMNet's own front end, its pieces every 0.48 s, its last one.

    But for one more piece where a frame and a half at most reach beyond the others.
    """
    config = tiny(*YAMNET, "audio.mel_bins=64", "audio.max_duration_s=4", "frontend.backend=torch")
    wave = noise(0, seconds, 16_000).astype(np.float32)
    decoded = lay_end_to_end([wave], np.zeros((1, 1)))
    media = AudioPreprocessor(config, Ranks()).finish(decoded).media
    pieces = log_mel_patches(wave, mel_matrix(64, 400, 16_000, 125.0, 7500.0).T)
    module = encoder()
    with torch.no_grad():
        wanted = [module(torch.from_numpy(piece).float()[None, None]).pooled for piece in pieces]
        found = module(media)
    assert torch.allclose(found.tokens, torch.cat(wanted), atol=1e-4)
    assert torch.allclose(found.pooled, torch.cat(wanted).mean(0, keepdim=True), atol=1e-4)
    assert tokens_of_seconds(config, np.array([seconds])).whole.tolist() == [len(pieces)]


@pytest.mark.parametrize("kind", ["torch", "dali_wave", "dali_mel"])
def test_a_sound_shorter_than_a_window_ends_in_silence(kind: str):
    config = tiny(*YAMNET, "audio.mel_bins=64", f"frontend.backend={kind}")
    wave = noise(0, 0.01, 16_000).astype(np.float32)  # of 160 samples: one frame
    batch = EncodedBatch([encode(wave, 16_000, "WAV", "FLOAT")], np.zeros((1, 1), np.float32))
    (given,) = AudioPreprocessor(config, Ranks()).stream(iter([batch]), 1)
    assert isinstance(given.media, PackedMels)
    silence = math.log(0.001)
    assert given.media.mel.shape == (96, 64)
    assert given.media.mel[0].min() > silence + 0.1
    assert (given.media.mel[1:] - silence).abs().max() < 1e-5


def test_of_which_lengths_there_is_a_piece_more_than_googles():
    settings, samples = YamnetSettings(), np.arange(1, 40_000)
    frames = settings.padded_frames(settings.frames_of(samples.clip(settings.least_samples)))
    more = np.array(settings.patches_of(frames.tolist())) - (
        1 + -(-(samples - 15_600).clip(0) // 7680)
    )
    assert set(more) == {0, 1}
    assert np.flatnonzero(np.diff(more, prepend=0)).tolist() == [
        first - 1 for n in range(15_360, 40_000, 7680) for first in (n + 1, n + 241)
    ]


def test_it_is_mobilenet_with_tensorflows_borders():
    """48 x 32 cells of 32 channels behind the stem, 3 x 2 of 1024 at the end; 3.2 million."""
    module = encoder(1024)
    blocks: Any = module.blocks
    assert sum(p.numel() for p in module.parameters()) == 3_195_456
    assert [block.pointwise.out_channels for block in blocks] == [c for c, _ in TABLE]
    x = torch.randn(2, 1, 96, 64)
    with torch.no_grad():
        found = module(x).pooled
        y = relu(conv2d(pad(x, (0, 1, 0, 1)), module.stem.weight, module.stem.bias, 2))
        assert y.shape[1:] == (32, 48, 32)
        for block, (_, stride) in zip(blocks, TABLE, strict=True):
            deep, wide = block.depthwise, block.pointwise
            border = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
            y = relu(conv2d(pad(y, border), deep.weight, deep.bias, stride, groups=y.shape[1]))
            y = relu(conv2d(y, wide.weight, wide.bias))
        assert y.shape[1:] == (1024, 3, 2)
    assert torch.allclose(found, y.mean((2, 3)), atol=1e-5)


def test_packed_clips_are_those_in_rows():
    module, clips = encoder(), packed(1, 1, 3)
    with torch.no_grad():
        found = module(clips)
        rows = [module(mel[None, None]) for mel in clips.mel.split(clips.frames)]
    assert found.tokens.shape == (5, 32)
    assert torch.allclose(found.tokens, torch.cat([row.tokens[0] for row in rows]), atol=1e-6)
    for row, clip in zip(clips.order, rows, strict=True):
        assert torch.allclose(found.pooled[row], clip.pooled[0], atol=1e-6)


def test_rows_of_part_of_a_piece_are_refused():
    for frames, most in ((100, 96), (48, 96), (200, 192)):
        rule = rf"media must be \(B, 1, {most}, 64\), got \(2, 1, {frames}, 64\)"
        with pytest.raises(ValueError, match=rule):
            encoder()(torch.randn(2, 1, frames, 64))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("audio.length=fixed", "audio.length must be variable with audio.encoder = yamnet"),
        ("mask.kind=2d", "mask.kind must be 'none' with audio.encoder = yamnet, whose conv"),
        ("audio.lora_rank=2", "audio.lora_rank must be 0 with this encoder, whose blocks have no"),
        ("train.compile=true", "train.compile must be off with audio.encoder = yamnet"),
        ("audio.mel_bins=48", "audio.mel_bins must be a multiple of 32, which five strides"),
        ("audio.sample_rate_hz=8000", "audio.sample_rate_hz must be at least 15000 with audio.mel"),
        ("audio.width=48", "audio.width must be a multiple of 32"),
    ],
)
def test_what_it_cannot_do_is_refused(setting: str, message: str):
    with pytest.raises(ConfigError) as caught:
        TwoTowers(tiny(*YAMNET, setting))
    assert message in str(caught.value)


def settings(prepared: Path, runs: Path, *overrides: str) -> Config:
    return tiny(
        *YAMNET,
        *(f"run.folder={runs}", f"data.train={prepared}/train", f"data.val={prepared}/val"),
        *("train.steps=3", "log.every_steps=1", "ckpt.every_steps=2", "log.tensorboard=false"),
        *("sched.warmup_steps=1", "specaug.time_frames=24", "specaug.freq_bins=4"),
        *overrides,
    )


def test_a_resumed_run_has_the_same_weights_and_embeds_sounds(prepared, tmp_path, monkeypatch):
    train(settings(prepared, tmp_path / "whole"))
    asked = iter([False, True])
    monkeypatch.setattr(Stop, "agreed", lambda self: next(asked))
    with pytest.raises(Stopped):
        train(settings(prepared, tmp_path / "parts"))
    monkeypatch.undo()
    train(settings(prepared, tmp_path / "parts"), resume=True)
    ours, theirs = (
        load_weights(model_folder(tmp_path / run / "flap")) for run in ("parts", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    model = load(tmp_path / "whole/flap", "cpu")
    waves = [noise(n, seconds, 16_000) for n, seconds in enumerate((0.1, 1.5, 5.0))]
    found = model.embed_audio(waves)
    assert found.shape == (3, 16)
    # A clip is embedded whatever it comes with; what is longer than 2 s, in windows.
    for n, wave in enumerate(waves):
        assert torch.allclose(model.embed_audio([wave])[0], found[n], atol=1e-5)


def test_micro_batches_have_the_gradients_of_one_pass(prepared, tmp_path):
    weights = []
    for name, more in (("one", ()), ("four", ("train.micro_batch=2",))):
        train(settings(prepared, tmp_path, f"run.name={name}", "data.val=[]", *more))
        weights.append(load_weights(model_folder(tmp_path / name)))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-4), name


def test_weights_keep_their_bins_and_a_checkpoint_of_before_opens(prepared, tmp_path):
    """Convolutions take any number of bins: no shape tells it."""
    train(settings(prepared, tmp_path, "data.val=[]"))
    begin = "run.name=next", "data.val=[]", f"train.init_audio_from={tmp_path}/flap"
    with pytest.raises(ConfigError, match=r"audio\.mel_bins must be 32, as in .*, got 64; set"):
        train(settings(prepared, tmp_path, *begin, "audio.mel_bins=64"))
    train(settings(prepared, tmp_path, *begin))
    # Written where short sounds were repeated, which it then is in it.
    model = model_folder(tmp_path / "flap")
    before = model / "config.yaml"
    before.write_text(before.read_text().replace("filling: pad", "filling: repeatpad"))
    (model / "SHA256SUMS").unlink()
    assert load(model, "cpu").config.audio.filling == "repeatpad"
    bins = {mel: YamnetSettings.model_validate({"mel": mel}).mel_bins for mel in get_args(Mel)}
    assert bins == {"kaldi": 128, "clap": 64, "yamnet": 64}


def test_first_blocks_stay_frozen(prepared, tmp_path):
    train(settings(prepared, tmp_path, "audio.freeze_blocks=5", "data.val=[]"))
    train(settings(prepared, tmp_path, "run.name=first", "train.steps=0", "data.val=[]"))
    ours, first = (load_weights(model_folder(tmp_path / run)) for run in ("flap", "first"))
    moved = {name for name in ours if not torch.equal(ours[name], first[name])}
    audio = {name for name in moved if name.startswith("audio.")}
    assert audio == {n for n in ours if n.startswith("audio.blocks.") and int(n.split(".")[2]) > 4}
