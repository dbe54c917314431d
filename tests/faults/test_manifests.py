"""Damaged manifests: every row that is whole becomes a clip, with its own caption and sound."""

from __future__ import annotations

import csv
import io
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile

from flap_fast.data.shards import open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.prepare import prepare
from tests.faults.cases import assert_sentence, run_cases, sampled
from tests.faults.damage import edited, of_bytes, value
from tests.sounds import encode, tone

RATE, CLIPS = 8000, 8
COLUMNS = ("audio", "caption", "id", "split")
Row = dict[str, Any]


def rows() -> list[Row]:
    """Of clip n: a tone of 400 + 300 n Hz, and what says so."""
    return [
        {"audio": f"{n}.wav", "caption": f"Sound {n}, a tone", "id": f"clip-{n}", "split": "train"}
        for n in range(CLIPS)
    ]


@cache
def sound(n: int) -> bytes:
    return encode(tone(400 + 300 * n, 0.1, RATE), RATE, "WAV")


def sound_of(wave: np.ndarray) -> int:
    """The n of the sound that a waveform is, by its frequency."""
    peak = np.abs(np.fft.rfft(wave[:RATE], RATE)).argmax()
    return round((peak - 400) / 300)


def text_of(table: list[Row], ending: str) -> str:
    if ending == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in table for name in row))
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}
    writer = csv.DictWriter(out, columns, lineterminator="\n", **(tabs if ending == "tsv" else {}))
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def whole_rows(file: Path) -> list[int]:
    """The n of the rows that an independent reader finds as they were."""
    text = file.read_bytes().decode("utf-8-sig")
    known, found = rows(), []
    if file.suffix == ".jsonl":
        parsed = []
        for line in text.splitlines():
            try:
                parsed.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    else:
        tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
        parsed = list(csv.DictReader(io.StringIO(text, newline=""), **tabs))
    for row in parsed:
        if row in known:
            found.append(known.index(row))
    return found


def of_text(draw: Random, folder: Path, ending: str) -> Path:
    data, _ = of_bytes(text_of(rows(), ending).encode(), draw)
    file = folder / f"damaged.{ending}"
    file.write_bytes(data)
    return file


def of_cell(draw: Random, folder: Path, ending: str) -> Path:
    """Another value in one cell, of a column that was there or of a new one."""
    table, n = rows(), draw.randrange(CLIPS)
    names = (*COLUMNS, "captions", "labels", "negatives", "start_s", "duration_s", "image", "more")
    table[n] = edited(table[n], (draw.choice(names),), value(draw))
    file = folder / f"damaged.{ending}"
    try:
        text = text_of(table, ending)
    except csv.Error:  # a TSV has no line ends in cells
        text = text_of(rows(), ending)
    file.write_text(text, errors="surrogatepass")
    return file


def of_column(draw: Random, folder: Path, ending: str) -> Path:
    """A column under another name, empty, or left out."""
    name, new = draw.choice(COLUMNS), draw.choice(("", "x", "Audio", "captions", "path", None))
    table = [{k: v for k, v in row.items() if k != name} for row in rows()]
    if new is not None:
        table = [{**short, new: row[name]} for short, row in zip(table, rows(), strict=True)]
    file = folder / f"damaged.{ending}"
    file.write_text(text_of(table, ending))
    return file


def of_order(draw: Random, folder: Path, ending: str) -> Path:
    """Rows shuffled, repeated, or of two clips mixed."""
    table = rows()
    one, other = draw.sample(range(CLIPS), 2)
    name = draw.choice(COLUMNS)
    table[one] = {**table[one], name: table[other][name]}
    draw.shuffle(table)
    table += table[: draw.randrange(3)]
    file = folder / f"damaged.{ending}"
    file.write_text(text_of(table, ending))
    return file


def check(draw: Random, folder: Path) -> str:
    for n in range(CLIPS):
        (folder / f"{n}.wav").write_bytes(sound(n))
    damage = draw.choice((of_text, of_text, of_cell, of_column, of_order))
    file = damage(draw, folder, draw.choice(("jsonl", "csv", "tsv")))
    out = folder / "out"
    try:
        done = prepare(file, out, sample_rate_hz=RATE, shard_clips=4, threads=1, show=False)
    except ManifestError as error:
        assert_sentence(error, f"{file}:", f"{file} ")
        return f"{damage.__name__[3:]} refused"
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == done.rejected
    assert all(row["reason"] for row in rejected), rejected
    found: dict[int, set[str]] = {}
    for split in sorted(path.parent for path in out.glob("*/0.tar")):
        shards = open_shards([split])
        for clip in range(len(shards)):
            wave, _ = soundfile.read(io.BytesIO(shards.encoded(clip)))
            n, record = sound_of(wave), shards.record(clip, captionless=True)
            found.setdefault(n, set()).update(record["text"])
            assert record["original_data"]["file"] == f"{n}.wav", f"another's sound: {record}"
    # Of the rows that are as they were, all captions; and a caption only where a row has it.
    for n in whole_rows(file):
        assert f"Sound {n}, a tone" in found.get(n, ()), f"row {n} is lost; found {found}"
    text = file.read_bytes().decode("utf-8-sig")
    for n in range(CLIPS):  # a sound that is named is not lost without a word
        refused = any(f"{n}.wav" in row["audio"] for row in rejected)
        assert n in found or refused or f"{n}.wav" not in text, f"sound {n} is lost"
    listed = {text for texts in found.values() for text in texts if text.startswith("['")}
    assert not listed, f"lists in one caption: {listed}"
    if damage is not of_order:
        for n, texts in found.items():
            others = {f"Sound {m}, a tone" for m in range(CLIPS) if m != n}
            mixed = damage is of_text and not texts & others
            assert damage is not of_text or mixed or _moved(file, n, texts & others)
    return f"{damage.__name__[3:]} read" + (", with some rejected" if rejected else "")


def _moved(file: Path, n: int, texts: set[str]) -> bool:
    """Whether a damaged file itself names sound n on a line with these captions."""
    lines = file.read_bytes().decode("utf-8-sig").splitlines()
    return all(any(f"{n}.wav" in line and text in line for line in lines) for text in texts)


@sampled(40, 500)
def test_of_a_damaged_manifest_each_whole_row_becomes_its_own_clip(cases, tmp_path: Path):
    run_cases("manifests", cases, check, tmp_path)
