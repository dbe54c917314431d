"""LAION's layout before it is packed: a sound and a JSON for each clip, as in LAION-Audio-630K.

    FOLDER/[DATA SET/]SPLIT/KEY.flac, KEY.json    text (or caption, captions), tag, original_data
    FOLDER/[DATA SET/]SPLIT/KEY.txt               the caption, where the JSON has none

The split is the first folder below FOLDER that is called train, valid or test, or else the clip's
own; FOLDER's clips are of `train`, unless it is called so itself. All that a JSON says besides is
kept. Tars of such pairs are the source `shards`.

Source: data_preprocess/README.md of LAION-AI/audio-dataset; Wu et al., "Large-Scale Contrastive
Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption Augmentation", ICASSP 2023.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from flap_fast.files import ManifestError, files_below
from flap_fast.preparation.manifest import Entry
from flap_fast.preparation.sources.layout import Source
from flap_fast.preparation.sources.tars import described
from flap_fast.progress import progress

_SPLITS = ("train", "valid", "test")
# JSON files read at a time: in a network each takes a while.
_READS = 16


class _Pair(NamedTuple):
    """The files of a clip, of which one of the first two may be absent."""

    sound: Path | None
    json: Path | None
    text: Path | None


def read(folder: Path) -> list[Entry]:
    """The clips of all pairs, in the order of their paths.

    A clip whose sound is missing is one too, if its JSON has a caption. Files that are no clip's
    are counted and named on stderr.

    Raises:
        ManifestError: no pair of a sound and its JSON or text.
    """
    keys, left_out = _pairs(folder)
    with ThreadPoolExecutor(_READS) as pool, progress("read pairs", len(keys)) as advance:
        records = []
        for record in pool.map(_record, keys.values()):
            records.append(record)
            advance()
    clips: list[Entry] = []
    for (key, pair), (record, fault) in zip(keys.items(), records, strict=True):
        if pair.sound or (pair.json and record["text"]):  # a text alone may be a README
            clips.append(_entry(folder, key, pair, record, fault, len(clips) + 1))
        else:
            left_out += [file for file in pair if file]
    if not any(pair.sound and (pair.json or pair.text) for pair in keys.values()):
        tars = any(file.suffix == ".tar" for file in files_below(folder))
        raise ManifestError(
            f"LAION's layout must be KEY.flac and KEY.json, got '{folder}' without"
            + ("; --source shards reads tars" if tars else "")
        )
    if left_out:
        # Here: the names of sources are listed without waiting for NumPy.
        from flap_fast.data.shards import say_left_out

        names = sorted(str(file.relative_to(folder)) for file in left_out)
        say_left_out(str(folder), tuple(names))
    return clips


def _pairs(folder: Path) -> tuple[dict[Path, _Pair], list[Path]]:
    """The files of each clip by their path without ending; files that can be no clip's."""
    # Here: the names of sources are listed without waiting for NumPy.
    from flap_fast.data.preprocess.sound_formats import sounds_among

    files = files_below(folder)
    left_out = [file for file in files if file.name.startswith(".")]  # ._1.flac
    files = [file for file in files if not file.name.startswith(".")]
    found: dict[Path, list[Path | None]] = {}
    places = {".json": 1, ".txt": 2}
    texts = [file for file in files if file.suffix.lower() in places]
    for file in (*sounds_among(files, known=places), *texts):
        pair = found.setdefault(file.with_suffix(""), [None, None, None])
        place = places.get(file.suffix.lower(), 0)
        if pair[place] is None:
            pair[place] = file
        else:
            left_out.append(file)  # KEY.wav beside KEY.flac
    return {key: _Pair(*found[key]) for key in sorted(found)}, left_out


def _record(pair: _Pair) -> tuple[dict[str, Any], str]:
    """A clip's JSON, with `text` as a list of captions; why it cannot be read."""
    from flap_fast.data.shards import parsed_record

    try:
        data = pair.json.read_bytes() if pair.json else None
        return parsed_record(data, pair.text.read_bytes if pair.text else bytes), ""
    except ValueError as error:
        return {"text": []}, f"unreadable: its JSON cannot be read: {error}"


def _entry(
    folder: Path, key: Path, pair: _Pair, record: dict[str, Any], fault: str, line: int
) -> Entry:
    above = list(key.relative_to(folder).parts[:-1])
    own = folder.resolve().name
    split = next((name for name in above if name in _SPLITS), above[-1] if above else None)
    if split is None:
        split = own if own in _SPLITS else "train"
    else:
        above.remove(split)
    return Entry(
        line=line,
        audio=pair.sound or key.parent / f"{key.name}.flac",
        id=str(record.get("id") or "_".join([*above, key.name])),
        split=split,
        fault=fault,
        **described(record),
    )


LAION = Source(
    name="laion",
    kind="sounds",
    folder="[DATA SET/]SPLIT/KEY.flac and KEY.json, as LAION has them before packing",
    splits="train, valid, test, or the folders' names",
    read=read,
)
