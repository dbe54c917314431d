"""A model as a tool: whatever sound comes in, the row that its samples deserve comes out."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from flap_fast.checks import ConfigError
from flap_fast.data import evaluation
from flap_fast.data.preprocess import waveform
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import _SECONDS_AT_A_TIME, Embedder, load
from flap_fast.tools.sounds import crops_of
from tests.sounds import chirp, encode, noise, tone
from tests.tiny import tiny

RATE = 16_000
WAVE = chirp(200, 2000, 1.0, RATE)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    config = tiny("frontend.threads=2")
    torch.manual_seed(0)
    return Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))


def same(a: torch.Tensor, b: torch.Tensor, abs: float = 1e-5) -> bool:
    return bool((a - b).abs().max() < abs)


def test_every_way_to_hand_over_a_waveform_gives_the_same_row(embedder: Embedder, tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(encode(WAVE, RATE, "WAV", "FLOAT"))
    stereo = np.stack([1.5 * WAVE, 0.5 * WAVE])
    ways = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        WAVE,
        torch.from_numpy(WAVE),
        WAVE.astype(np.float64),
        (WAVE, RATE),
        (stereo, RATE),  # (channels, samples), as torchaudio loads it
        (torch.from_numpy(stereo), RATE),
        (stereo.T, RATE),  # (samples, channels), as soundfile does
        {"array": WAVE, "sampling_rate": RATE, "path": None},
        (WAVE * 2.0**31).astype(np.int32),  # integers are PCM
    ]
    rows = embedder.embed_audio(ways)
    assert rows.shape == (len(ways), 16)
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(ways)))
    for row in rows:
        assert same(row, rows[0], 1e-4)


def test_a_tensor_of_half_precision_is_its_own_numbers(embedder: Embedder):
    half = torch.from_numpy(WAVE).bfloat16()
    assert same(embedder.embed_audio([half]), embedder.embed_audio([half.float()]))


def test_a_waveforms_rate_counts(embedder: Embedder):
    fast = chirp(200, 2000, 1.0, 48_000)
    wanted = embedder.embed_audio([WAVE])
    assert same(embedder.embed_audio([(fast, 48_000)]), wanted, 1e-3)
    assert same(embedder.embed_audio([fast], sample_rate_hz=48_000), wanted, 1e-3)
    # A waveform's own rate is above the call's.
    assert same(embedder.embed_audio([(WAVE, RATE)], sample_rate_hz=48_000), wanted)
    assert not same(embedder.embed_audio([fast]), wanted, 1e-3)


@pytest.mark.parametrize(
    ("sound", "why"),
    [
        (np.zeros(0, np.float32), r"a waveform must be \(samples,\) .* got shape \(0,\)"),
        (np.zeros((2, 2, 9), np.float32), r"got shape \(2, 2, 9\)"),
        (np.array([0.1, np.nan], np.float32), "samples are not finite"),
        (np.ones(9, bool), "must be floats or signed integers, got bool"),
        ((WAVE, 0), "rate must be a number of hertz above 0, got 0"),
        ((WAVE, None), "hertz above 0, got None"),
        ((WAVE, "16000"), "hertz above 0, got '16000'"),
        ((WAVE, float("inf")), "hertz above 0, got inf"),
        ({"array": WAVE, "sampling_rate": None}, "hertz above 0, got None"),
        ((WAVE, RATE, 1), "must be an array or a pair of array and rate, got 3 items"),
        ([[0.1, 0.2], [0.3]], "a waveform must be an array of numbers"),
        (32_767 * WAVE, r"must be in \[-1, 1\], with peaks up to 4, got .*; divide"),
        ((32_767 * WAVE).astype(np.int32), "of int32 must use more than 16 of its bits; pass"),
        ((32_767 * WAVE).astype(np.int64), "of int64 must use more than 16 of its bits; pass"),
        (np.stack([WAVE, -WAVE]), "its channels must not cancel out"),
        ({"array": WAVE}, "must have 'array' and 'sampling_rate'"),
        ("nowhere.wav", "nowhere.wav: missing: no such file"),
    ],
)
def test_a_sound_that_cannot_be_used_is_named(embedder: Embedder, sound, why: str):
    with pytest.raises(BadSound, match=why) as error:
        embedder.embed_audio([WAVE, sound])
    assert str(error.value).startswith(("sound number 1: ", "nowhere.wav: "))


def test_one_bad_sound_does_not_hurt_the_others(embedder: Embedder, tmp_path: Path):
    (tmp_path / "bad.ogg").write_bytes(b"no sound")
    waves = [tone(300 + 50 * n, 1.0, RATE) for n in range(7)]
    good = embedder.embed_audio(waves, batch=7)
    found = list(embedder.embed_each([*waves[:3], tmp_path / "bad.ogg", *waves[3:]], batch=2))
    bad = found.pop(3)
    assert isinstance(bad, BadSound)
    assert "bad.ogg: unreadable" in str(bad)
    rows = [row for row in found if isinstance(row, torch.Tensor)]
    assert same(torch.stack(rows), good)


@pytest.mark.parametrize(
    ("taken", "most", "options"),
    [
        (9, 39, {"batch": 4}),
        # A sound that is heard whole may be many crops: a batch; two more, and one for each thread.
        (1, 8 + 2 + 2, {"batch": 8, "crop": "whole"}),
    ],
)
def test_a_million_sounds_are_decoded_as_they_are_needed(
    embedder: Embedder, taken: int, most: int, options: dict[str, Any]
):
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield WAVE

    some = embedder.embed_each(endless(), **options)
    for _ in range(taken):
        next(some)
    some.close()
    assert drawn <= most


@pytest.mark.parametrize("crop", ["center", "multi:3", "whole"])
def test_a_crop_does_not_keep_its_recording_in_memory(embedder: Embedder, crop: str):
    recording = (np.ones(16_000 * 60, np.float32), RATE)
    crops = list(crops_of(recording, RATE, crop, embedder.config))
    assert crops
    for wave in crops:
        owner = wave if wave.base is None else wave.base
        assert (len(wave), owner.nbytes) == (RATE, wave.nbytes)


@pytest.fixture(scope="module", params=["WAV", "OGG"])
def recording(tmp_path_factory: pytest.TempPathFactory, request) -> Path:
    """Four minutes of 48 kHz stereo, 92 MB as samples: a format that is sought in, and another."""
    file = tmp_path_factory.mktemp("recording") / f"r.{request.param.lower()}"
    minute = np.tile(chirp(200, 2000, 1.0, 48_000)[:, None], (60, 2))
    with soundfile.SoundFile(file, "w", 48_000, 2, format=request.param) as f:
        for _ in range(4):
            for second in np.split(minute, 60):  # Vorbis' encoder fails on much at once
                f.write(second)
    return file


@pytest.mark.parametrize("crop", ["center", "multi:4", "whole"])
def test_memory_does_not_grow_with_a_recording(
    embedder: Embedder, recording: Path, crop: str, monkeypatch
):
    monkeypatch.setattr(waveform, "_KEPT", 2**18)
    embedder.embed_audio([WAVE])
    tracemalloc.start()
    try:
        rows = embedder.embed_audio([recording], batch=16, crop=crop)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same(rows.norm(dim=1), torch.ones(1))
    assert peak < 16 * 2**20


def test_a_sound_that_breaks_off_leaves_the_others_their_rows(embedder: Embedder, tmp_path: Path):
    """Its first crops are in a batch with theirs when the error shows."""
    data = bytearray(encode(noise(0, 60.0, RATE), RATE))
    middle = len(data) // 2
    data[middle : middle + 40_000] = bytes(40_000)
    (tmp_path / "bad.flac").write_bytes(data)
    waves = [tone(300 + 50 * n, 1.0, RATE) for n in range(3)]
    good = embedder.embed_audio(waves)
    found = embedder.embed_each([waves[0], tmp_path / "bad.flac", *waves[1:]], 4, crop="whole")
    first, bad, *others = found
    assert isinstance(bad, BadSound)
    assert "bad.flac: unreadable: " in str(bad)
    rows = [row for row in (first, *others) if isinstance(row, torch.Tensor)]
    assert same(torch.stack(rows), good)


def test_long_sounds_are_cropped_as_asked(embedder: Embedder):
    """3.5 s in windows of 1 s: the middle; the begin, the middle, the end; four that cover it."""
    wave = noise(0, 3.5, RATE) * np.linspace(0.1, 2, 56_000, dtype=np.float32)
    starts = {
        "center": [20_000],
        "multi:3": [0, 20_000, 40_000],
        "whole": [0, 13_333, 26_667, 40_000],
    }
    for crop, at in starts.items():
        pieces = embedder.embed_audio([wave[n : n + RATE] for n in at])
        mean = torch.nn.functional.normalize(pieces.mean(0), dim=0)
        # Behind another sound, in batches that split its crops.
        found = embedder.embed_audio([WAVE, wave, WAVE], batch=2, crop=crop)
        assert same(found[1], mean), crop
        assert same(found[2], found[0])
    assert same(embedder.embed_audio([wave]), embedder.embed_audio([wave], crop="center"))
    # A short sound is the same whatever is asked.
    assert same(embedder.embed_audio([WAVE], crop="multi:3"), embedder.embed_audio([WAVE]))
    with pytest.raises(ConfigError, match="crop must be center, multi:K or whole, got 'random'"):
        embedder.embed_audio([wave], crop="random")


@pytest.mark.parametrize(("samples", "windows"), [(RATE, 1), (RATE + 1, 1), (RATE + 2, 2)])
def test_a_rounding_more_is_no_second_window(samples: int, windows: int, monkeypatch):
    """As in evaluation, which knows lengths from headers: at the front end's rate or another."""
    config = tiny()
    crops = crops_of(noise(0, samples / RATE, RATE), RATE, "whole", config)
    assert len(list(crops)) == windows
    monkeypatch.setattr(evaluation, "clip_seconds", lambda *_: np.array([samples / RATE]))
    clip: Any = [None]
    whole = tiny("audio.length=variable", "audio.max_duration_s=1")
    assert len(evaluation.crops_of(whole, clip, Ranks()).clips) == windows


def test_a_cpu_embeds_a_bounded_time_of_long_sounds_at_once(embedder: Embedder, monkeypatch):
    """Of an hour 64 windows are 640 s, and of 0.3 s each they are a batch."""
    sizes: list[int] = []
    embed = embedder._embed_waves

    def counted(waves: list[np.ndarray]) -> torch.Tensor:
        sizes.append(len(waves))
        return embed(waves)

    monkeypatch.setattr(embedder, "_embed_waves", counted)
    monkeypatch.setitem(_SECONDS_AT_A_TIME, "cpu", 4.0)
    rows = embedder.embed_audio([noise(0, 10.0, RATE), WAVE, WAVE], batch=8, crop="whole")
    assert sizes == [4, 4, 4]
    sizes.clear()
    monkeypatch.setitem(_SECONDS_AT_A_TIME, "cpu", 160.0)
    found = embedder.embed_audio([noise(0, 10.0, RATE), WAVE, WAVE], batch=8, crop="whole")
    assert sizes == [8, 4]
    assert same(rows, found)
    sizes.clear()
    monkeypatch.setitem(_SECONDS_AT_A_TIME, "cpu", 3.5)  # no fourth crop, though three are less
    assert same(embedder.embed_audio([noise(0, 10.0, RATE), WAVE], crop="whole"), found[:2])
    assert sizes == [3, 3, 3, 2]
    sizes.clear()
    monkeypatch.setitem(_SECONDS_AT_A_TIME, "cpu", 0.5)  # a crop has more
    assert same(embedder.embed_audio([noise(0, 2.0, RATE), WAVE], crop="whole")[1:], found[1:2])
    assert sizes == [1, 1, 1]


def test_a_fused_model_hears_more_of_a_sound_at_once():
    """2 s of 3.5 s in one crop of four channels; a sound that fits in the window is not fused."""
    config = tiny("fusion.type=aff_2d", "fusion.max_duration_s=2.0")
    torch.manual_seed(0)
    fused = Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))
    wave = noise(0, 3.5, RATE) * np.linspace(0.1, 2, 56_000, dtype=np.float32)
    pieces = fused.embed_audio([wave[:32_000], wave[24_000:]])
    mean = torch.nn.functional.normalize(pieces.mean(0), dim=0)
    found = fused.embed_audio([WAVE, wave, WAVE], batch=2, crop="whole")
    assert same(found[1], mean)
    assert same(found[2], found[0])
    (centre,) = fused.embed_audio([wave[12_000:44_000]])
    assert same(fused.embed_audio([wave])[0], centre)
    assert not same(fused.embed_audio([wave[20_000:36_000]])[0], centre, 1e-4)
    # Another index's worth of embeddings: the same weights, other pieces of a sound.
    longer = tiny("fusion.type=aff_2d", "fusion.max_duration_s=3.0")
    other = Embedder(fused.model, longer, tokenizer(longer.text), torch.device("cpu"))
    assert other.identity != fused.identity


def test_a_single_sound_or_caption_wants_brackets(embedder: Embedder):
    with pytest.raises(TypeError, match="a list"):
        embedder.embed_audio("dog.wav")
    with pytest.raises(TypeError, match="a list"):
        embedder.embed_text("a dog")


def test_nothing_gives_no_rows(embedder: Embedder):
    assert embedder.embed_audio([]).shape == (0, 16)
    assert embedder.embed_text([]).shape == (0, 16)


def test_captions_of_any_length_come_back_in_their_order(embedder: Embedder):
    captions = ["a", "a long caption about a dog that barks", "bb", "a dog"]
    whole = embedder.embed_text(captions)
    one = torch.cat([embedder.embed_text([caption]) for caption in captions])
    assert same(whole, one)
    assert same(embedder.embed_text(captions, batch=2), one)


def test_classify_is_a_softmax_of_the_scaled_cosines(embedder: Embedder):
    labels = ["dog", "cat", "rain"]
    found = embedder.classify(WAVE, labels)
    text = embedder.embed_text([f"This is a sound of {label}." for label in labels])
    cosines = text @ embedder.embed_audio([WAVE])[0]
    wanted = (cosines / 0.07).softmax(0)  # the scale before training
    assert dict(found) == pytest.approx(dict(zip(labels, wanted.tolist(), strict=True)), abs=1e-5)
    assert [share for _, share in found] == sorted((s for _, s in found), reverse=True)
    many = dict(embedder.classify(WAVE, labels, "audio29"))
    assert sum(many.values()) == pytest.approx(1)
    assert many["dog"] != pytest.approx(dict(found)["dog"], abs=1e-6)


@pytest.mark.parametrize("again", ["dog", " dog ", "dog\n", "cafe\u0301", "the  cat"])
def test_a_label_that_is_given_twice_is_one_class(again: str, embedder: Embedder):
    labels = ["dog", "caf\u00e9", "the cat", "Dog"]  # another text: its vector is another
    found = embedder.classify(WAVE, [*labels, again, again])
    assert dict(found) == pytest.approx(dict(embedder.classify(WAVE, labels)))
    assert len(found) == 4
    assert len(embedder.embed_labels([*labels, again])) == 5  # a row a label


def test_ranking_gives_each_caption_its_cosine_once_or_twice(embedder: Embedder):
    once, twice = (embedder.rank(WAVE, captions) for captions in (["a", "b"], ["a", "b", "a"]))
    assert len(twice) == 3
    assert dict(twice) == pytest.approx(dict(once))


def test_the_identity_is_the_weights_and_the_front_end():
    def identity(seed: int, *overrides: str) -> str:
        config = tiny(*overrides)
        torch.manual_seed(seed)
        return Embedder(
            TwoTowers(config), config, tokenizer(config.text), torch.device("cpu")
        ).identity

    assert identity(0) == identity(0, "train.steps=9")
    assert len({identity(0), identity(1), identity(0, "audio.mean=-4")}) == 3


def test_what_is_no_folder_and_no_device_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"path must be the folder of a run .* got None"):
        load(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"device must be a device of PyTorch, .* got 'gpu'"):
        load(tmp_path, device="gpu")
