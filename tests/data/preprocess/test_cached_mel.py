"""Cached log-mels: the batches of the sounds within fp16, and no front end for another."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config import Audio
from flap_fast.data.evaluation import evaluation_batches
from flap_fast.data.preprocess.cached_mel import crop_cached, front_end_settings, npy_of
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.waveform import BadSound, fill
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.cached_mel import CachedMelEncoder, log_mel_of
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared, ShardRange
from flap_fast.preparation.sources import SOURCES
from flap_fast.ranks import Ranks
from tests.data.test_loader import batches, loader, with_
from tests.preparation.test_prepare import contents
from tests.sounds import encode, noise, tone, write_manifest
from tests.tiny import crops, tiny

AUDIO = tiny().audio
RATE = AUDIO.sample_rate_hz
# Of fp16 below 16 in size, the log-mels' range; normalised it is 9.1 times less.
ROUNDING = 2.0**-8


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds of 0.3 s, 1 s and 1.005 s: shards/train, and the log-mels of them: mels/train."""
    folder = tmp_path_factory.mktemp("both")
    rows = []
    for n in range(12):
        seconds = (0.3, 1.0, 1.005)[n % 3]
        rate = (48_000, RATE, RATE)[n % 3]
        wave = noise(n, seconds, rate, slope=n % 2) + tone(300 + 40 * n, seconds, rate)
        (folder / f"{n}.flac").write_bytes(encode(wave, rate))
        rows.append({"audio": f"{n}.flac", "captions": [f"{n}, one", f"{n}, two"], "n": n})
    manifest = write_manifest(folder / "m.jsonl", rows)
    prepare(manifest, folder / "shards", shard_clips=5, show=False)
    done = prepare(manifest, folder / "mels", shard_clips=5, cache=AUDIO, show=False)
    assert done == Prepared(12, 3, 12, 0)
    return folder


@pytest.mark.parametrize("filling", ["repeatpad", "pad"])
def test_a_run_on_cached_log_mels_sees_the_batches_of_the_sounds(both, tmp_path, filling):
    """None of these clips has a second place to be cropped at that is a frame away."""
    mels = both / "mels"
    if filling == "pad":
        mels, audio = tmp_path, AUDIO.model_copy(update={"filling": filling})
        prepare(both / "m.jsonl", mels, shard_clips=5, cache=audio, show=False)
    config = tiny(f"data.train={both}/shards/train", f"audio.filling={filling}", "specaug={}")
    cached = with_(config, "data", train=(mels / "train",))
    for sounds, read in zip(batches(config, 0, 3), batches(cached, 0, 3), strict=True):
        assert (sounds.clips == read.clips).all()
        assert torch.equal(sounds.ids, read.ids)
        assert (read.stacked.shape, read.stacked.dtype) == (sounds.stacked.shape, torch.float32)
        # Clips of 1.005 s may be cropped half a frame off: all others within fp16's rounding.
        exact = torch.from_numpy(sounds.clips % 3 != 2)
        error = (sounds.stacked - read.stacked)[exact].abs().max()
        assert 0 < error <= ROUNDING / (2 * AUDIO.std) * 1.02
        assert torch.equal(sounds.stacked[:, :, 98:], read.stacked[:, :, 98:])  # the rows of zeros


def test_a_long_clip_is_cropped_at_frames_that_are_those_of_its_sound():
    """3.217 s: 320 frames, 223 crops of 98, each the front end's of the sound from there."""
    mel = kaldi_log_mel(AUDIO)
    wave = noise(0, 3.217, RATE, slope=1)
    rows = log_mel_of(wave, mel, mel.audio)
    assert rows.shape == (320, 128)
    data = io.BytesIO()
    np.save(data, rows.astype(np.float16))
    for where, first in ((0.0, 0), (0.5, 111), (1 - 2**-24, 222), (1.5 / 223, 1)):
        crop = torch.from_numpy(wave[first * 160 : first * 160 + AUDIO.samples])
        exact = mel(crop[None])[0, :98].numpy()
        assert np.abs(crop_cached(data.getvalue(), where, AUDIO) - exact).max() <= ROUNDING


@pytest.mark.parametrize("seconds", [0.03, 0.5, 1.0])
def test_a_short_clip_is_filled_before_its_log_mel_is_taken(seconds):
    wave = noise(0, seconds, RATE)
    filled = torch.from_numpy(fill(wave, RATE, "repeatpad"))
    mel = kaldi_log_mel(AUDIO)
    assert np.array_equal(log_mel_of(wave, mel, mel.audio), mel(filled[None])[0, :98].numpy())


def test_evaluation_scores_cached_log_mels_as_sounds(both):
    clips, ranks = np.array([3, 0, 7, 1, 6]), Ranks()
    config = tiny("eval.batch=2", "eval.crop=center")
    sounds, read = (
        torch.cat(
            [
                found.stacked
                for found in evaluation_batches(config, shards, crops(config, clips), ranks)
            ]
        )
        for shards in (open_shards([both / kind / "train"]) for kind in ("shards", "mels"))
    )
    assert sounds.shape == read.shape == (5, 1, 112, 128)
    assert (sounds - read).abs().max() <= ROUNDING / (2 * AUDIO.std) * 1.02


def test_a_cache_of_shards_is_the_cache_of_their_manifest(both, tmp_path):
    shards = SOURCES["shards"].read(both / "shards")
    prepare(shards, tmp_path, shard_clips=5, cache=AUDIO, show=False)
    ours, theirs = (open_shards([place / "train"]) for place in (both / "mels", tmp_path))
    assert ours.kind == theirs.kind == "mels"
    for clip in range(12):
        assert ours.encoded(clip) == theirs.encoded(clip)
        assert ours.record(clip) == theirs.record(clip)


def test_neither_threads_nor_parts_change_a_byte_of_a_cache(both, tmp_path):
    settings = {"shard_clips": 5, "cache": AUDIO, "show": False}
    prepare(both / "m.jsonl", tmp_path, threads=1, shard_range=ShardRange(2, 2), **settings)
    prepare(both / "m.jsonl", tmp_path, threads=3, shard_range=ShardRange(1, 2), **settings)
    assert contents(tmp_path) == contents(both / "mels")


def test_caching_leaves_pytorchs_threads_as_they_were(both, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prepare(both / "m.jsonl", tmp_path, shard_clips=5, cache=AUDIO, show=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


OTHER = [
    ("sample_rate_hz", 32_000, "must be 16000"),
    ("mel_bins", 64, "must be 128"),
    ("duration_s", 0.9, r"must be 1\.0"),
    ("filling", "pad", "must be 'repeatpad'"),
]


@pytest.mark.parametrize(("name", "value", "rule"), OTHER)
def test_a_cache_of_another_front_end_is_refused_by_the_settings_name(both, name, value, rule):
    config = tiny(f"data.train={both}/mels/train", f"audio.{name}={value}")
    wanted = rf"audio\.{name} {rule}.*, as in the log-mels cached in '.*mels/train', got .*{value}"
    with pytest.raises(ConfigError, match=wanted):
        loader(config)
    shards = open_shards([both / "mels/train"])
    with pytest.raises(ConfigError, match=wanted):
        next(evaluation_batches(config, shards, crops(config, np.arange(2)), Ranks()))


VARIABLE = ("audio.length=variable", "audio.max_duration_s=1")


@pytest.mark.parametrize(
    ("cached", "trained", "message"),
    [
        ((), VARIABLE, r"audio\.length must be 'fixed', as in .*, got 'variable'"),
        (VARIABLE, (), r"audio\.length must be 'variable', as in .*, got 'fixed'"),
        # A clip shorter than a patch has been filled to one.
        (VARIABLE, (*VARIABLE, "audio.patch=32"), r"audio\.patch must be 16, as in .*, got 32"),
    ],
)
def test_a_cache_of_another_length_is_refused_by_name(both, tmp_path, cached, trained, message):
    prepare(both / "m.jsonl", tmp_path, cache=tiny(*cached).audio, show=False)
    with pytest.raises(ConfigError, match=message):
        loader(tiny(*trained, f"data.train={tmp_path}/train"))


def test_what_comes_after_the_log_mel_may_be_changed(both):
    overrides = ("audio.mean=-5", "audio.std=3", "audio.frames=128", "audio.width=64")
    (batch,) = batches(tiny(f"data.train={both}/mels/train", *overrides), 0, 1)
    (sounds,) = batches(tiny(f"data.train={both}/shards/train", *overrides), 0, 1)
    exact = torch.from_numpy(sounds.clips % 3 != 2)
    assert batch.stacked.shape == (8, 1, 128, 128)
    assert (batch.stacked - sounds.stacked)[exact].abs().max() <= ROUNDING / 6 * 1.02


def test_every_setting_of_audio_is_the_front_ends_or_known_to_come_after():
    """A new one must be put on either side by hand: a cache that ignores it would be wrong."""
    assert set(front_end_settings(Audio())) == {
        *("sample_rate_hz", "mel_bins", "duration_s", "filling", "int16_roundtrip"),
        *("mel", "mel_variant", "low_hz", "high_hz"),
    }


def test_a_cache_that_does_not_say_how_it_was_made_is_refused(both, tmp_path):
    (tmp_path / "train").mkdir()
    for name, data in contents(both / "mels/train").items():
        (tmp_path / "train" / name).write_bytes(data)
    (tmp_path / "train/frontend.json").unlink()
    with pytest.raises(ConfigError, match=r"frontend\.json must say how the log-mels were cached"):
        loader(tiny(f"data.train={tmp_path}/train"))


def test_sounds_and_log_mels_are_not_trained_on_together(both):
    with pytest.raises(ShardError, match=r"of one kind, got sounds in .*, mels in "):
        open_shards([both / "shards/train", both / "mels/train"])


def test_another_cache_or_sounds_are_not_written_into_a_cache(both):
    before = contents(both / "mels")
    for cache in (None, AUDIO.model_copy(update={"filling": "pad"})):
        with pytest.raises(ManifestError, match="the cache or the clips of a shard changed"):
            prepare(both / "m.jsonl", both / "mels", shard_clips=5, cache=cache, show=False)
    assert contents(both / "mels") == before


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


GOOD = np.zeros((98, 128), np.float16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"fLaC",
        npy(np.zeros((98, 128), np.float16))[:-2],
        npy(np.zeros((97, 128), np.float16)),
        npy(np.zeros((98, 64), np.float16)),
        npy(np.zeros((98, 128), np.float32)),
        npy(np.zeros(98, np.float16)),
        npy(np.array([{}])),
        npy(np.where(np.eye(98, 128), np.nan, 0).astype(np.float16)),
        npy(np.where(np.eye(98, 128), -np.inf, 0).astype(np.float16)),
        b"PK\x03\x04" + npy(GOOD),
        npy(GOOD).replace(b"{'descr'", b"{'descr("),
        npy(GOOD).replace(b"'<f2'", b"'<f2 "),
        npy(GOOD).replace(b"'<f2'", b"(3,) "),
        npy(GOOD).replace(b"(98", b"-98"),
        npy(GOOD).replace(b"(98, 128)", b"(98, 128 "),
    ],
)
def test_a_clip_that_is_no_cached_log_mel_is_bad(data):
    with pytest.raises(BadSound, match="cached log-mel"):
        crop_cached(data, 0.5, AUDIO)


CHANGED = [(at, 1 << bit) for at in (-1, -32, -33, -2000, 60, 128) for bit in (0, 6)]


@pytest.mark.parametrize(("at", "bits"), CHANGED)
def test_a_cached_log_mel_with_one_changed_bit_is_bad(at: int, bits: int):
    """In its digest, its rows, or the blanks of its header."""
    good = npy_of(np.ones((98, 128)))
    assert np.array_equal(np.load(io.BytesIO(good)), np.ones((98, 128)))
    assert np.array_equal(crop_cached(good, 0.5, AUDIO), np.ones((98, 128)))
    changed = bytearray(good)
    changed[at] ^= bits
    with pytest.raises(BadSound, match="cached log-mel"):
        crop_cached(bytes(changed), 0.5, AUDIO)


@pytest.mark.parametrize("left", [1, 31, -1, -40])
def test_a_cached_log_mel_with_part_of_its_digest_or_more_is_bad(left: int):
    good = npy_of(np.ones((98, 128)))
    with pytest.raises(BadSound, match="cached log-mel that changed since it was written"):
        crop_cached(good + bytes(-left) if left < 0 else good[:-left], 0.5, AUDIO)


def test_a_cache_of_before_digests_is_read():
    assert crop_cached(npy(GOOD), 0.5, AUDIO).shape == (98, 128)


def test_a_changed_byte_of_a_cache_is_replaced_in_training_and_named_in_evaluation(both, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(both / "mels/train", folder)
    shards = open_shards([folder])
    file, at, size, *_ = shards.locations[3].tolist()
    with shards.files[file].open("r+b") as tar:
        tar.seek(at + size // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 1]))
    found = loader(tiny(f"data.train={folder}", "data.on_bad_clip=replace"))
    list(found.batches(0, 3))
    assert {(bad.clip, bad.reason) for bad in found.bad} == {
        (shards.name(3), "unreadable: a cached log-mel that changed since it was written (SHA-256)")
    }
    config = tiny("eval.batch=2", "eval.crop=center")
    with pytest.raises(ShardError, match=r"cannot be decoded: .*SHA-256"):
        list(evaluation_batches(config, shards, crops(config, np.arange(5)), Ranks()))


def test_a_bad_clip_of_a_cache_is_replaced_and_reported(both, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name, data in contents(both / "mels/train").items():
        (folder / name).write_bytes(data)
    shards = open_shards([folder])
    file, at, *_ = shards.locations[4].tolist()
    with shards.files[file].open("r+b") as tar:
        tar.seek(at)
        tar.write(b"spoilt")
    training = loader(tiny(f"data.train={folder}"))
    got = {clip for batch in training.batches(0, 2) for clip in batch.clips.tolist()}
    assert 4 not in got
    assert {bad.reason[:30] for bad in training.bad} == {"unreadable: no cached log-mel:"}
    assert {bad.clip for bad in training.bad} == {shards.name(4)}


def test_frontend_json_stands_beside_the_shards(both):
    said = json.loads((both / "mels/train/frontend.json").read_text())
    assert said == front_end_settings(AUDIO)


def test_neither_claps_log_mels_nor_fusion_are_cached(both):
    with pytest.raises(ConfigError, match=r"audio\.mel must be kaldi to be cached"):
        CachedMelEncoder(Audio(mel="clap", sample_rate_hz=48_000, mel_bins=64, frames=1001))
    config = tiny("fusion.type=aff_2d", f"data.train={both}/mels/train")
    with pytest.raises(ConfigError, match=r"fusion\.type must be none with cached log-mels"):
        batches(config, 0, 1)
