"""WavCaps: 403,050 clips of four origins, one caption each; one split, `train`.

    FOLDER/**/AudioSet_SL/as_final.json, BBC_Sound_Effects/bbc_final.json,
              FreeSound/fsd_final.json, SoundBible/sb_final.json     {"data": [{id, caption, ...}]}
    FOLDER/**/blacklist/*.json           {"AudioSet": [id, ...], "FreeSound": [id, ...]}
    FOLDER/**/ORIGIN*/**/*.flac          called by id; of AudioSet Y and YouTube's id

Any of the four may be absent. `wavcaps-clean` leaves out what a blacklist names, as the authors'
training does with one of them: clips that AudioCaps, Clotho, ESC-50, UrbanSound8K or VGGSound have.

Source: Mei et al., "WavCaps", arXiv 2303.17395; read were the blacklists and
retrieval/data_handling/pretrain_dataset.py of the authors' repository, and the listing of their
files on the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from flap_fast.files import ManifestError, files_below
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.karpathy import read_json
from flap_fast.preparation.sources.layout import Source, tables_below

_FILES = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
# Origins by the names that blacklists have for them.
_LISTED = {"AudioSet": "AudioSet_SL", "FreeSound": "FreeSound"}


def read(folder: Path) -> list[Entry]:
    """The clips of all origins whose JSON exists; raises `ManifestError` without any."""
    return _entries(folder, set())


def read_clean(folder: Path) -> list[Entry]:
    """The same without those on a blacklist; raises `ManifestError` where there is none."""
    files = [file for file in files_below(folder) if file.match("blacklist/*.json")]
    if not files:
        raise ManifestError(
            f"wavcaps-clean must have blacklist/*.json, got '{folder}' without; fetch WavCaps' own"
        )
    named: set[tuple[str, str]] = set()
    for file in files:
        for listed, ids in read_json(file, *_LISTED).items():
            named |= {(_LISTED.get(listed, listed), Path(str(one)).stem) for one in ids}
    return _entries(folder, named)


def _entries(folder: Path, left_out: set[tuple[str, str]]) -> list[Entry]:
    names = [f"{origin}/{name}" for origin, name in _FILES.items()]
    tables = tables_below(folder, names, "WavCaps")
    found = {name.partition("/")[0]: file for name, file in tables.items()}
    return collect(_rows(found, _sounds(folder), folder, left_out), folder, str(folder))


def _rows(
    tables: dict[str, Path],
    sounds: dict[tuple[str, str], Path],
    folder: Path,
    left_out: set[tuple[str, str]],
) -> Iterator[Row]:
    numbers = count(1)  # not lines: the files are JSON
    for origin, file in tables.items():
        for clip in read_json(file, "data")["data"]:
            if not isinstance(clip, dict) or not {"id", "caption"} <= set(clip):
                raise ManifestError(f"{file}: a clip must have id and caption, got {clip!r:.200}")
            stem = Path(str(clip["id"])).stem if origin == "AudioSet_SL" else str(clip["id"])
            if (origin, stem) in left_out:
                continue
            sound = sounds.get((origin, stem), folder / origin / f"{stem}.flac")
            yield file, next(numbers), _clip(clip, f"{origin}_{stem}", sound.relative_to(folder))


def _clip(clip: dict[str, Any], name: str, sound: Path) -> dict[str, Any]:
    """A manifest's row; `description` and the like travel along, but not the recording's length."""
    own = {key: value for key, value in clip.items() if key not in ("audio", "duration", "id")}
    return {**own, "audio": str(sound), "id": name}


def _sounds(folder: Path) -> dict[tuple[str, str], Path]:
    """The files of each origin by their stems: two origins have the same ids."""
    # Here: the names of sources are listed without waiting for NumPy.
    from flap_fast.data.preprocess.sound_formats import sounds_among

    found: dict[tuple[str, str], Path] = {}
    for file in sounds_among(files_below(folder), known=(".json", ".csv", ".md", ".txt", ".zip")):
        parts = file.relative_to(folder).parts[:-1]
        for origin in _FILES:
            if any(part.startswith(origin) for part in parts):
                found.setdefault((origin, file.stem), file)
    return found


WAVCAPS = Source(
    name="wavcaps",
    kind="sounds",
    folder="json_files/ORIGIN/*_final.json; sounds anywhere below folders called as the origins",
    splits="train",
    read=read,
)


WAVCAPS_CLEAN = Source(
    name="wavcaps-clean",
    kind="sounds",
    folder="the same, and json_files/blacklist/*.json",
    splits="train without the clips that a blacklist names",
    read=read_clean,
)
