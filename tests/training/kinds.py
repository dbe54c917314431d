"""A set of each kind that training reads."""

from __future__ import annotations

from pathlib import Path

from flap_fast.preparation.prepare import prepare
from tests.pictures import write_pictures
from tests.triples import write_triples


def sets_of_each_kind(prepared: Path, folder: Path) -> dict[str, Path]:
    """Folders of sounds and of images, and a file of sentences."""
    prepare(write_pictures(folder / "files", 16), folder / "images", show=False)
    triples = write_triples(folder, 20)
    return {"sounds": prepared / "train", "images": folder / "images" / "train", "nli": triples}
