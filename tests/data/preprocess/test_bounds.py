"""Sounds and texts that claim too much: refused by name, in little memory, and alone."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config
from flap_fast.data.preprocess import sound_file
from flap_fast.data.preprocess.waveform import BadSound, read_crop, read_sound
from flap_fast.files import ManifestError, parsed_json
from flap_fast.preparation.manifest import read_manifest
from flap_fast.preparation.prepare import prepare
from tests.sounds import encode, noise, write_manifest

RATE = 16_000


def claiming(rate_hz: int) -> bytes:
    """A WAV of 0.1 s with another rate in its header."""
    data = encode(noise(0, 0.1, RATE), RATE, "WAV")
    return data[:24] + rate_hz.to_bytes(4, "little") + data[28:]


@pytest.mark.parametrize("rate_hz", [1, 10, 999, 1_000_001, 16_000_000, 2**31 - 1])
def test_a_rate_that_cannot_be_true_is_refused_in_little_memory(rate_hz):
    tracemalloc.start()
    for read in (read_sound, lambda data, rate: read_crop(data, rate, 1000, 0.5)):
        with pytest.raises(BadSound, match="its sample rate must be"):
            read(claiming(rate_hz), RATE)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("channels", "read"), [(1, True), (64, True), (65, False), (512, False)])
def test_as_many_channels_as_can_be_true_are_read(channels, read):
    data = encode(np.tile(noise(0, 0.1, RATE)[:, None], channels), RATE, "WAV")
    if read:
        assert len(read_sound(data, RATE)) == 1600
        return
    with pytest.raises(BadSound, match=f"must have 64 channels or fewer, got {channels}"):
        read_sound(data, RATE)


def test_a_sound_that_lasts_too_long_is_refused_while_it_is_read(monkeypatch):
    monkeypatch.setattr(sound_file, "LONGEST_S", 1)
    data = encode(np.zeros(3 * RATE, np.float32), RATE)
    with pytest.raises(BadSound, match="must last 0 hours or less; cut it into clips"):
        read_sound(data, RATE)
    assert len(read_sound(data, RATE, duration_s=0.5)) == RATE // 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("start_s", 1e308), ("start_s", 1e12), ("duration_s", 1e308), ("duration_s", 1e6)],
)
def test_a_piece_that_cannot_be_is_rejected_and_the_others_are_prepared(tmp_path, name, value):
    (tmp_path / "a.wav").write_bytes(encode(noise(0, 0.5, RATE), RATE, "WAV"))
    (tmp_path / "one_hz.wav").write_bytes(claiming(1))
    rows = [
        {"audio": "a.wav", "caption": "x", "id": "bad", name: value},
        {"audio": "one_hz.wav", "caption": "x"},
        {"audio": "a.wav", "caption": "x", "id": "good"},
    ]
    done = prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", show=False)
    assert (done.kept, done.rejected) == (1, 2)
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert json.loads(rejected.splitlines()[0])["reason"].startswith(
        f"{name} must be in [0, 86400]"
    )


DEEP = "[" * 100_000
DIGITS = "9" * 5000


@pytest.mark.parametrize("text", [DEEP, DEEP + "]" * 100_000, DIGITS, "{"])
def test_json_of_any_depth_and_length_is_an_error_of_json(tmp_path, text):
    with pytest.raises(json.JSONDecodeError):
        parsed_json(text)
    (tmp_path / "m.jsonl").write_text(f'{{"audio": "a.wav", "caption": {text}}}\n')
    with pytest.raises(ManifestError, match=r"m\.jsonl:1 is not JSON: "):
        read_manifest(tmp_path / "m.jsonl")


def test_seconds_of_many_digits_are_an_error_of_the_manifest(tmp_path):
    row = {"audio": "a.wav", "caption": "x", "start_s": int("9" * 400)}
    with pytest.raises(ManifestError, match=r"m\.jsonl:1: start_s and duration_s must be seconds"):
        read_manifest(write_manifest(tmp_path / "m.jsonl", [row]))


def laughs() -> str:
    out = io.StringIO("a0: &a0 [x, x, x, x, x, x, x, x, x]\n")
    out.seek(0, io.SEEK_END)
    for n in range(1, 9):
        out.write(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n")
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (laughs(), "must be YAML: at most 100000 values, aliases written out, got"),
        ("run: &r [*r]\n", "must be YAML: "),
        ("run: " + "[" * 3000 + "]" * 3000, "must be YAML: nested too deeply"),
        ("run: {" * 3000, "must be YAML: "),
        (f"run: {{seed: {DIGITS}}}\n", "must be YAML: "),
    ],
)
def test_a_config_that_grows_is_refused_at_once(tmp_path: Path, text, why):
    (tmp_path / "c.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"c.yaml.*{why}"):
        load_config(tmp_path / "c.yaml")
    assert time.monotonic() - start < 5
