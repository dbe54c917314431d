"""Any sounds without captions, to pre-train by reconstruction; one split, `train`.

    FOLDER/**/*.wav     in whatever format, also in folders below

A sound's id is its path below FOLDER.
"""

from __future__ import annotations

from pathlib import Path

from flap_fast.files import ManifestError, files_below
from flap_fast.preparation.manifest import Entry, collect
from flap_fast.preparation.sources.layout import BESIDE, Source


def read(folder: Path) -> list[Entry]:
    """All sounds, in the order of their paths.

    Raises:
        ManifestError: there is none.
    """
    # Here: the names of sources are listed without waiting for NumPy.
    from flap_fast.data.preprocess.sound_formats import sounds_among

    files = [file for file in files_below(folder) if not file.name.startswith(".")]  # ._1.wav
    found = [file.relative_to(folder) for file in sounds_among(files, known=BESIDE)]
    if not found:
        raise ManifestError(f"there must be sounds, got none below '{folder}'")
    rows = (
        (folder, n, {"audio": str(path), "id": path.as_posix()}) for n, path in enumerate(found, 1)
    )
    entries = collect(rows, folder, str(folder))
    for entry in entries:
        entry.captionless = True
    return entries


SOUNDS = Source(
    name="sounds",
    kind="sounds",
    folder="sounds without captions, also in folders below",
    splits="train, to pre-train by reconstruction",
    read=read,
)
