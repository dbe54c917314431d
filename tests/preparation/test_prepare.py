"""`flap prepare`: each clip once, what cannot be used with its reason, always the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import ShardError, open_shards, pack
from flap_fast.files import ManifestError
from flap_fast.preparation.encoding import FlacEncoder
from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.prepare import ahead, prepare
from flap_fast.preparation.shard_tasks import Prepared, ShardTask
from flap_fast.preparation.sources import SOURCES
from tests.sounds import encode, noise, tone, write_corpus, write_manifest

RATE = 16_000


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its name."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_shards_hold_what_the_manifest_names_at_the_front_ends_rate(corpus, prepared):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for split, sizes in (("train", [7, 7, 7, 3]), ("val", [6])):
        shards = open_shards([prepared / split])
        listed = json.loads((prepared / split / "sizes.json").read_text())
        assert listed == {f"{n}.tar": size for n, size in enumerate(sizes)}
        wanted = [row for row in rows if row["split"] == split]
        assert len(shards) == len(wanted)
        for clip, row in enumerate(wanted):
            record = shards.record(clip)
            assert (record["text"], record["id"]) == (row["captions"], row["id"])
            assert record["original_data"] == {"file": row["audio"], "start_s": 0.0}
            stored = read_sound(shards.encoded(clip), RATE)
            original = read_sound(corpus.parent / row["audio"], RATE).clip(-1, 1)
            assert np.abs(stored - original).max() <= 2**-15
    assert (prepared / "rejected.jsonl").read_text() == ""


def test_negatives_come_into_the_shards_that_have_some_and_change_no_other(
    corpus, prepared, tmp_path
):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows[8]["negatives"] = ["A cat.", "half an emoji \ud83d"]
    manifest = write_manifest(corpus.with_name("negatives.jsonl"), rows)
    prepare(manifest, tmp_path / "out", shard_clips=7, show=False)
    shards = open_shards([tmp_path / "out" / "train"])
    assert shards.record(8)["negatives"] == ["A cat.", "half an emoji \ufffd"]
    assert not any("negatives" in shards.record(n) for n in range(len(shards)) if n != 8)
    before, after = contents(prepared), contents(tmp_path / "out")
    changed = {name for name, data in after.items() if before[name] != data}
    shard = {"train/1.tar", "train/1.idx", ".prepare/train-1.json"}
    assert changed == shard | {"train/SHA256SUMS"}
    with pytest.raises(ManifestError, match=r"OUT must be new .* got another train-1 in"):
        prepare(corpus, tmp_path / "out", shard_clips=7, show=False)
    # Shards are a source, too: to another rate, say.
    again = tmp_path / "again"
    prepare(SOURCES["shards"].read(tmp_path / "out"), again, shard_clips=7, show=False)
    copied = open_shards([again / "train"])
    assert copied.record(8)["negatives"] == shards.record(8)["negatives"]
    assert "negatives" not in copied.record(7)


def test_what_tells_a_shard_apart_is_what_it_was_before_there_were_negatives():
    """So that a call may go on with shards that an earlier version wrote."""
    entry = Entry(3, Path("a/x.wav"), ["a dog"], "x")
    fingerprint = ShardTask("train", 0, [entry]).fingerprint(FlacEncoder(RATE))
    assert fingerprint == "d79cf60e1b6ad812bc6d9f54ef0db604c13b9b2f0f6c3c5812f8661194656e00"
    entry.negatives.append("a cat")
    assert ShardTask("train", 0, [entry]).fingerprint(FlacEncoder(RATE)) != fingerprint


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A manifest with one of everything that cannot be used, between two clips that can."""
    flac = encode(noise(0, 0.5, RATE), RATE)
    files = {
        "good.wav": encode(tone(300, 0.5, 48_000), 48_000, "WAV"),
        "page.flac": b"<html>404 Not Found</html>",
        "cut.flac": flac[: len(flac) // 2],
        "nothing.wav": encode(np.zeros(0), RATE, "WAV"),
        "short.wav": encode(tone(300, 0.02, RATE), RATE, "WAV"),
        "silent.wav": encode(tone(300, 0.5, RATE, level=5e-5), RATE, "WAV", "FLOAT"),
        "nan.wav": encode(np.full(800, np.nan), RATE, "WAV", "FLOAT"),
        "quiet.wav": encode(tone(300, 0.5, RATE, level=2e-4), RATE, "WAV", "FLOAT"),
        "loud.wav": encode(tone(300, 0.5, RATE, level=3.0), RATE, "WAV", "FLOAT"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows: list[dict[str, Any]] = [
        {"audio": name, "caption": "x", "id": name.split(".")[0]} for name in files
    ]
    rows.insert(3, {"audio": "good.wav", "start_s": 0.1, "id": "captionless", "captions": [" "]})
    rows.insert(4, {"audio": "no.wav", "caption": "x", "id": "missing"})
    rows.insert(5, {"audio": "good.wav", "caption": "x", "id": "after the end", "start_s": 9})
    return write_manifest(tmp_path / "m.jsonl", rows)


def test_what_cannot_be_used_is_rejected_with_line_and_reason(spoilt):
    out = spoilt.parent / "out"
    done = prepare(spoilt, out, shard_clips=4, threads=2, show=False)
    assert done == Prepared(clips=12, shards=2, kept=3, rejected=9)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rejected}
    assert reasons.pop("page").startswith("unreadable: Format not recog")
    assert reasons.pop("cut").startswith("unreadable: ")
    assert reasons == {
        "captionless": "captionless",
        "missing": "missing: no such file",
        "after the end": "empty: no samples",
        "nothing": "empty: no samples",
        "short": "empty: 20.0 ms, shorter than a window",
        "silent": "silent: below -80 dB of full scale throughout",
        "nan": "unreadable: samples are not finite",
    }
    assert [row["line"] for row in rejected] == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert rejected[0]["audio"] == str(spoilt.parent / "page.flac")
    shards = open_shards([out / "train"])
    assert [shards.record(clip)["id"] for clip in range(len(shards))] == ["good", "quiet", "loud"]
    # Louder than full scale is cut off there; it does not wrap around.
    loud = read_sound(shards.encoded(2), RATE)
    assert np.abs(loud - tone(300, 0.5, RATE, level=3.0).clip(-1, 1)).max() < 1e-4
    # The shard in which nothing was left is not written.
    assert sorted(f.name for f in (out / "train").glob("*.tar")) == ["0.tar", "2.tar"]


def test_another_call_does_nothing_again(corpus, prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    times = {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")}
    assert prepare(corpus, out, shard_clips=7, show=False) == Prepared(30, 5, 30, 0)
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.tar")} == times
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("lost", ["train/1.tar", "train/1.idx", ".prepare/train-1.json"])
def test_a_lost_file_is_written_again(corpus, prepared, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / lost).unlink()
    prepare(corpus, out, shard_clips=7, show=False)
    assert contents(out) == contents(prepared)


def test_threads_do_not_change_a_byte(corpus, prepared, tmp_path):
    prepare(corpus, tmp_path, shard_clips=7, threads=1, show=False)
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize("change", ["rate", "clips of a shard", "caption", "fewer rows", "start"])
def test_shards_of_another_manifest_or_rate_are_not_mixed(corpus, prepared, tmp_path, change):
    shutil.copytree(prepared, tmp_path / "out")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    if change == "caption":
        rows[9]["captions"] = ["another"]
    if change == "start":
        rows[9]["start_s"] = 0.1
    if change == "fewer rows":
        rows = [row for row in rows if row["split"] == "train"]
    settings: dict[str, Any] = {"sample_rate_hz": RATE, "shard_clips": 7}
    if change == "rate":
        settings["sample_rate_hz"] = 32_000
    if change == "clips of a shard":
        settings["shard_clips"] = 8
    manifest = corpus.with_name(f"{change}.jsonl")
    write_manifest(manifest, rows)
    with pytest.raises(ManifestError, match=r"OUT must be new or hold this manifest's .* delete '"):
        prepare(manifest, tmp_path / "out", **settings, show=False)
    assert contents(tmp_path / "out") == contents(prepared)


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from flap_fast.preparation.prepare import prepare
manifest, out, kill_at, limit = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
synced, fsync = 0, os.fsync

def sync_or_die(file):
    global synced
    fsync(file)
    synced += 1
    if synced == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = sync_or_die
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
prepare(manifest, out, shard_clips=7, threads=2, show=False)
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`PROGRAM` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True
    )


def test_killed_anywhere_and_gone_on_with_gives_the_same_bytes(corpus, prepared, tmp_path):
    """SIGKILL while the n-th file is written: an index, a tar, a record; first shard and later."""
    whole, finished = contents(prepared), 0
    for kill_at in (1, 2, 3, 8):
        killed = run(corpus, tmp_path, kill_at, 0)
        assert killed.returncode == -signal.SIGKILL
        left = contents(tmp_path)
        assert sum(name.endswith(".part") for name in left) == 1
        assert all(whole[name] == data for name, data in left.items() if not name.endswith(".part"))
        finished += (kill_at - 1) // 3
        assert len([name for name in left if name.endswith(".json")]) == finished

    again = run(corpus, tmp_path, 0, 0)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path) == whole


def test_a_full_disk_is_said_with_the_file_and_leaves_no_half_shard(corpus, prepared, tmp_path):
    """Files may not grow beyond the first shard's size; a later one needs more."""
    sizes = [len(contents(prepared)[f"train/{n}.tar"]) for n in range(4)]
    first_too_large = next(n for n, size in enumerate(sizes) if size > sizes[0])
    full = run(corpus, tmp_path, 0, sizes[0])
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert "File too large; make room and run the same command again" in last
    assert f"train/{first_too_large}.tar" in last
    left = contents(tmp_path)
    assert {name for name in left if name.endswith(".tar")} == {
        f"train/{n}.tar" for n in range(first_too_large)
    }
    assert all(contents(prepared)[name] == data for name, data in left.items())

    assert run(corpus, tmp_path, 0, 0).returncode == 0
    assert contents(tmp_path) == contents(prepared)


def test_a_rejected_clip_does_not_move_the_others_to_other_shards(tmp_path):
    manifest = write_corpus(tmp_path / "a", 9)
    prepare(manifest, tmp_path / "whole", shard_clips=3, show=False)
    (tmp_path / "a/04.flac").write_bytes(b"spoilt")
    prepare(manifest, tmp_path / "spoilt", shard_clips=3, show=False)
    whole, spoilt = contents(tmp_path / "whole"), contents(tmp_path / "spoilt")
    assert spoilt["train/0.tar"] == whole["train/0.tar"]
    assert spoilt["train/1.tar"] != whole["train/1.tar"]
    assert spoilt["train/2.tar"] == whole["train/2.tar"]


def laion(folder: Path, shards: int) -> Path:
    """Shards of three tones at 48 kHz, without an index; gives the folder above theirs."""
    (folder / "train").mkdir(parents=True)
    for n in range(shards):
        clips = [(f"{i}", encode(tone(300 + 99 * i, 0.2, 48_000), 48_000)) for i in range(3)]
        tar = pack([(key, sound, {"text": f"{n} {key}"}) for key, sound in clips])[0]
        (folder / f"train/{n}.tar").write_bytes(tar)
    return folder


@pytest.mark.parametrize("begun", [False, True])
def test_shards_are_not_overwritten_by_what_is_read_from_them(tmp_path, begun):
    """Nor where a record or an index makes them look like ours."""
    folder = laion(tmp_path / "l", 3)
    clips = SOURCES["shards"].read(folder)
    if begun:
        (folder / ".prepare").mkdir()
        for n in range(3):
            (folder / f"train/{n}.idx").write_bytes(b"")
    before = contents(folder)
    with pytest.raises(ManifestError, match=r"got '.*/0\.tar', which is not one of .*; name"):
        prepare(clips, folder, shard_clips=2, show=False)
    assert contents(folder) == before
    assert (folder / ".prepare").is_dir() == begun


@pytest.mark.parametrize("name", ["0.tar", "extra.tar"])
def test_shards_that_are_not_ours_are_neither_overwritten_nor_joined(corpus, tmp_path, name):
    (tmp_path / ".prepare").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / name).write_bytes(b"another's")
    with pytest.raises(ManifestError, match=f"got '.*/val/{name}', which is not one"):
        prepare(corpus, tmp_path, shard_clips=7, show=False)
    assert contents(tmp_path) == {f"val/{name}": b"another's"}


def test_clips_that_were_rejected_are_tried_again_when_asked(tmp_path):
    manifest = write_corpus(tmp_path / "a", 9)
    prepare(manifest, tmp_path / "whole", shard_clips=3, show=False)
    sound = (tmp_path / "a/04.flac").read_bytes()
    (tmp_path / "a/04.flac").unlink()
    out = tmp_path / "out"
    assert prepare(manifest, out, shard_clips=3, show=False) == Prepared(9, 3, 8, 1)
    (tmp_path / "a/04.flac").write_bytes(sound)
    others = {n: (out / f"train/{n}.tar").stat().st_mtime_ns for n in (0, 2)}
    assert prepare(manifest, out, shard_clips=3, show=False) == Prepared(9, 3, 8, 1)
    assert prepare(manifest, out, shard_clips=3, retry=True, show=False) == Prepared(9, 3, 9, 0)
    assert contents(out) == contents(tmp_path / "whole")
    assert {n: (out / f"train/{n}.tar").stat().st_mtime_ns for n in (0, 2)} == others


def test_a_retry_that_was_stopped_leaves_no_half_for_a_whole(tmp_path, monkeypatch):
    manifest = write_corpus(tmp_path / "a", 4)
    (tmp_path / "a/02.ogg").unlink()
    prepare(manifest, tmp_path / "out", shard_clips=2, show=False)
    monkeypatch.setattr("flap_fast.preparation.prepare.write_shards", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(manifest, tmp_path / "out", shard_clips=2, retry=True, show=False)
    with pytest.raises(ShardError, match="must have been written to its end"):
        open_shards([tmp_path / "out/train"])
    monkeypatch.undo()
    (tmp_path / "a/03.wav").unlink()  # nothing is left of the shard
    done = prepare(manifest, tmp_path / "out", shard_clips=2, show=False)
    assert done == Prepared(4, 1, 2, 2)
    assert len(open_shards([tmp_path / "out/train"])) == 2


def test_another_file_of_the_same_name_is_another_clip(tmp_path):
    for version in ("v1", "v2"):
        write_corpus(tmp_path / f"a/{version}", 1)
        write_manifest(tmp_path / f"a/{version}.jsonl", [{"audio": f"{version}/00.wav"}])
    prepare(tmp_path / "a/v1.jsonl", tmp_path / "out", show=False)
    with pytest.raises(ManifestError, match="got another train-0"):
        prepare(tmp_path / "a/v2.jsonl", tmp_path / "out", show=False)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    done = prepare(tmp_path / "moved/v1.jsonl", tmp_path / "out", show=False)
    assert done == Prepared(1, 0, 0, 1)


def test_a_folder_whose_name_is_no_utf8_may_have_a_rejected_clip(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcsik"))
    write_corpus(folder, 2)
    (folder / "01.flac").unlink()
    out = tmp_path / "out"
    assert prepare(folder / "manifest.jsonl", out, show=False) == Prepared(2, 1, 1, 1)
    (line,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["audio"] == str(folder / "01.flac")


def test_a_wrong_manifest_leaves_nothing_behind(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"caption": "x"}])
    with pytest.raises(ManifestError, match="audio must name a sound file"):
        prepare(manifest, tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()


def test_work_ahead_is_bounded_in_order_and_dropped_when_nobody_wants_it():
    asked: list[int] = []

    def numbers():
        for n in range(1000):
            asked.append(n)
            yield n

    with ThreadPoolExecutor(2) as pool:
        results = ahead(pool, lambda n: n * n, numbers(), limit=5)
        assert [next(results) for _ in range(3)] == [0, 1, 4]
        assert len(asked) == 7
        results.close()
        assert list(ahead(pool, lambda n: n * n, range(12), limit=5)) == [n * n for n in range(12)]
    assert len(asked) == 7


def test_work_that_nobody_wants_any_more_is_not_begun():
    gate, begun = threading.Event(), []

    def wait(n: int) -> None:
        begun.append(n)
        assert n == 0 or gate.wait(10)

    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, wait, range(100), limit=5)
        next(results)
        results.close()
        gate.set()
    assert len(begun) <= 2


@pytest.mark.parametrize(("start_s", "duration_s"), [(0.0, None), (180.0, 10.0)])
def test_a_recording_is_encoded_in_the_memory_of_its_flac(tmp_path, start_s, duration_s):
    """Four minutes of 48 kHz stereo: 92 MB as samples."""
    file = tmp_path / "r.wav"
    second = np.tile(tone(300, 1.0, 48_000)[:, None], (1, 2))
    with soundfile.SoundFile(file, "w", 48_000, 2) as f:
        for _ in range(240):
            f.write(second)
    encoder = FlacEncoder(RATE)
    entry = Entry(1, file, ["a tone"], "r", start_s=start_s, duration_s=duration_s)
    tracemalloc.start()
    try:
        _, flac = encoder.encode(entry)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(read_sound(flac, RATE)) == RATE * (duration_s or 240)
    assert peak < 2.5 * len(flac) + 8 * 2**20


def test_an_error_that_is_not_a_sounds_stops_everything(corpus, tmp_path, monkeypatch):
    """A bug or a lack of memory is not written down as a bad clip."""

    def broken(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setattr("flap_fast.preparation.encoding.read_blocks", broken)
    with pytest.raises(MemoryError):
        prepare(corpus, tmp_path, show=False)


@pytest.mark.parametrize("manifest", [None, 5, [], ["a.jsonl"], [{"audio": "a.wav"}]])
def test_what_is_no_manifest_is_refused(manifest: Any, tmp_path: Path):
    rule = r"^manifest must be one file, or the clips of a source, got .*; write rows to a \.jsonl"
    with pytest.raises(TypeError, match=rule):
        prepare(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
