"""Damaged tars: every pair that is whole is read with its own caption, or the shard is named."""

from __future__ import annotations

import io
import json
import re
import tarfile
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from random import Random

import soundfile

from flap_fast.data.preprocess.unusable import Unusable
from flap_fast.data.preprocess.waveform import read_sound
from flap_fast.data.shards import ShardError, open_shards, pack
from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.damage import of_bytes
from tests.faults.test_manifests import CLIPS, RATE, sound, sound_of

BLOCK = tarfile.BLOCKSIZE
Member = tuple[str, bytes]


@cache
def members() -> tuple[Member, ...]:
    """Name and bytes of each file of a shard."""
    files = []
    for n in range(CLIPS):
        out = io.BytesIO()
        soundfile.write(out, read_sound(sound(n), RATE), RATE, format="FLAC")
        record = {"id": f"clip-{n}", "text": [f"Sound {n}, a tone"]}
        files += [(f"{n:03d}.flac", out.getvalue()), (f"{n:03d}.json", json.dumps(record).encode())]
    return tuple(files)


def tar_of(files: list[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def of_tar(draw: Random, folder: Path) -> None:
    """Bytes of the tar."""
    (folder / "0.tar").write_bytes(of_bytes((folder / "0.tar").read_bytes(), draw)[0])


def of_blocks(draw: Random, folder: Path) -> None:
    """A block that was never written or is missing, or all of them from one on."""
    data = (folder / "0.tar").read_bytes()
    at = BLOCK * draw.randrange(len(data) // 2 // BLOCK)
    how, end = draw.choice(("zero", "gone", "lost")), at + BLOCK
    if how == "lost":
        new = data[:at].ljust(len(data), b"\0")
    else:
        new = data[:at] + bytes(BLOCK if how == "zero" else 0) + data[end:]
    (folder / "0.tar").write_bytes(new)


def of_index(draw: Random, folder: Path) -> None:
    """Bytes of the index, or two of its numbers exchanged."""
    file = folder / "0.idx"
    text = file.read_text()
    if draw.random() < 0.5:
        words = re.split(r"([ \n])", text)
        numbers = [n for n, word in enumerate(words) if word.isdigit()]
        at = draw.randrange(len(numbers))
        # A clip's line has four of them, after that of the first line.
        steps = draw.choice(((4,), (1, 2, 3, 5), range(1, len(numbers))))
        one, other = numbers[at], numbers[(at + draw.choice(steps)) % len(numbers)]
        words[one], words[other] = words[other], words[one]
        data = "".join(words).encode()
    else:
        data = of_bytes(text.encode(), draw)[0]
    file.write_bytes(data)


def of_header(draw: Random, folder: Path) -> None:
    """A field of a member's header, mostly with a checksum that is right."""
    data = bytearray((folder / "0.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = draw.choice(tar.getmembers()).offset
    begin, size = draw.choice(((0, 100), (100, 8), (124, 12), (156, 1), (257, 8), (345, 155)))
    new = draw.choice((b"", b"0", b"7", b"77777777777", b"\xff" * 12, b"5", b"x", b"../a.flac"))
    new = draw.choice((new, b"001.flac", b"002.json", draw.randbytes(size)))
    data[at + begin : at + begin + size] = new[:size].ljust(size, b"\0")
    if draw.random() < 0.8:
        header = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + BLOCK])
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    (folder / "0.tar").write_bytes(data)


def of_members(draw: Random, folder: Path) -> None:
    """Members left out, in another order, twice, under other names, or of nobody."""
    files, n = list(members()), draw.randrange(2 * CLIPS)
    how = draw.choice(("out", "order", "twice", "name", "others", "case"))
    if how == "out":
        del files[n]
    elif how == "order":
        draw.shuffle(files)
    elif how == "twice":
        files.insert(draw.randrange(len(files)), (files[n][0], draw.choice(files[n % 2 :: 2])[1]))
    elif how == "name":
        new = ("", ".flac", "003.flac", "x/y.json", "a.b.c.flac", "é.json", "004", "n" * 150)
        files[n] = draw.choice((*new, f"./{files[n][0]}")), files[n][1]
    elif how == "others":
        new = (".DS_Store", "README", "._001.flac", "001.jpg", "001.txt", "__MACOSX/001.json")
        files.insert(draw.randrange(len(files)), (draw.choice(new), draw.randbytes(50)))
    else:
        files[n] = files[n][0].upper(), files[n][1]
    (folder / "0.tar").write_bytes(tar_of(files))


def whole_pairs(data: bytes) -> set[int]:
    """The n of the clips whose members both stand whole, with their headers, in a tar's bytes."""
    clean = tar_of(list(members()))
    found = set()
    with tarfile.open(fileobj=io.BytesIO(clean)) as tar:
        infos = tar.getmembers()
    for n in range(CLIPS):
        parts = [clean[i.offset : i.offset_data + i.size] for i in infos[2 * n : 2 * n + 2]]
        places = [data.find(part) for part in parts]
        if all(at >= 0 and at % BLOCK == 0 for at in places):
            found.add(n)
    return found


def check(draw: Random, folder: Path) -> str:
    shard = folder / "0.tar"
    tar, index, _ = pack(
        (name.partition(".")[0], sound, json.loads(record))
        for (name, sound), (_, record) in zip(members()[::2], members()[1::2], strict=True)
    )
    shard.write_bytes(tar)
    shard.with_suffix(".idx").write_text(index)
    damage = draw.choice((of_tar, of_blocks, of_index, of_header, of_members))
    damage(draw, folder)
    if damage is of_members or (damage is not of_index and draw.random() < 0.7):
        shard.with_suffix(".idx").unlink()
    whole = whole_pairs(shard.read_bytes())
    said, found = io.StringIO(), set()
    name = damage.__name__[3:]
    try:
        with redirect_stderr(said):
            shards = open_shards([folder])
        for clip in range(len(shards)):
            try:
                texts = shards.record(clip)["text"]
                n = sound_of(read_sound(shards.encoded(clip), RATE))
            except Unusable:
                continue
            others = {f"Sound {m}, a tone" for m in range(CLIPS) if m != n}
            assert not others & set(texts), f"sound {n} with {texts}"
            found |= {n} if texts == [f"Sound {n}, a tone"] else set()
    except ShardError as error:
        assert_sentence(error, str(shard), str(shard.with_suffix(".idx")))
        return f"{name} refused"
    named = {n for n in range(CLIPS) if f"{n:03d}" in said.getvalue()}
    lost = whole - found - named
    assert not lost, f"clips {lost} are lost; found {found}, said {said.getvalue()!r}"
    if damage is not of_members:  # no clip is gone without a word
        assert len(shards) + len(named) >= CLIPS, f"{len(shards)} clips, said {said.getvalue()!r}"
    return f"{name} read" + (", with some left out" if len(found) < CLIPS else "")


@sampled(60, 300)
def test_of_a_damaged_tar_each_whole_pair_is_read_or_the_shard_is_named(cases, tmp_path: Path):
    run_cases("tars", cases, check, tmp_path)
