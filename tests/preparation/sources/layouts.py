"""Files in the layouts that data sets are published in, a few clips each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from tests.sounds import encode, tone

RATE = 16_000


def picture(kind: str) -> bytes:
    """A red square's file; bytes may follow it, which its readers leave alone."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, kind)
    return file.getvalue()


JPEG, PNG, WEBP = picture("JPEG"), picture("PNG"), picture("WEBP")


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Files by their paths below a folder; gives the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def sound(hz: float, seconds: float = 0.1, format: str = "WAV") -> bytes:
    """A tone's file."""
    return encode(tone(hz, seconds, RATE), RATE, format)


def table(header: str, *rows: Sequence[object]) -> str:
    """A CSV, quoted where a cell needs it."""
    out = io.StringIO()
    csv.writer(out).writerows([header.split(","), *rows])
    return out.getvalue()
