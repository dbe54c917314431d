"""Pictures of shapes with captions that say what is in them, as a manifest of PNGs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 30), "blue": (30, 60, 220)}
SHAPES = ("square", "disc", "cross")


def draw(colour: str, shape: str, seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A shape somewhere on a grey ground, at most half as high as the picture."""
    rng = np.random.default_rng(seed)
    width, height = size
    radius = min(size) * rng.uniform(0.2, 0.3)
    # Where the middle square of the picture shows it.
    x, y = (side / 2 + min(size) * rng.uniform(-0.15, 0.15) for side in size)
    across, down = np.abs(np.mgrid[0:height, 0:width] - np.array([y, x])[:, None, None])
    inside = {
        "square": np.maximum(across, down) < radius,
        "disc": across**2 + down**2 < radius**2,
        "cross": (np.minimum(across, down) < radius / 3) & (np.maximum(across, down) < radius),
    }[shape]
    pixels = np.full((height, width, 3), rng.integers(90, 160), np.uint8)
    pixels[inside] = COLOURS[colour]
    return Image.fromarray(pixels)


def write_pictures(folder: Path, count: int, val: int = 0) -> Path:
    """The manifest of `count` PNGs, the last `val` of them for validation; of all kinds in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rows = []
    for n in range(count):
        colour, shape = kinds[n % len(kinds)]
        draw(colour, shape, n).save(folder / f"{n}.png")
        row = {"image": f"{n}.png", "captions": [f"a {colour} {shape}"], "labels": [shape]}
        rows.append({**row, "split": "val" if n >= count - val else "train"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def encoded(picture: Image.Image, kind: str = "PNG", **settings: int) -> bytes:
    """A file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()
