"""Tables of retrieval's scores, and what its directions are called."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flap_fast.evaluation import papers
from flap_fast.evaluation.sheet import Row, Sheet, percent
from flap_fast.files import visible

_COLUMNS = ("R@1", "R@5", "R@10", "mAP@10", "mAP@16")


def directions(modality: str) -> tuple[str, str]:
    """The names of both directions: ("audio_to_text", "text_to_audio")."""
    return f"{modality}_to_text", f"text_to_{modality}"


def directions_of(scores: dict[str, Any]) -> tuple[str, str]:
    """The names of both directions in the scores of a data set."""
    (modality,) = (key.removesuffix("_to_text") for key in scores if key.endswith("_to_text"))
    return directions(modality)


def terminal(sets: dict[str, Any]) -> Table:
    """One table with a row for each direction, and chance."""
    caption = Text("\n".join(f"{visible(n)}: {_sizes(s)}{_equal(s)}" for n, s in sets.items()))
    out = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    out.add_column("data", overflow="fold")  # a name may fold, a number must stay whole
    for heading in ("query to answer", *_COLUMNS, "chance R@10"):
        out.add_column(heading, no_wrap=True, min_width=len("0.000"))
    for name, found in sets.items():
        for direction in directions_of(found):
            values = (f"{v:.3f}" if v is not None else "-" for v in _values(found[direction]))
            by_chance = f"{found['chance'][direction]['R@10']:.3f}"
            out.add_row(Text(visible(name)), direction.replace("_", " "), *values, by_chance)
    return out


_NOUNS = {"audio": "sound"}
_NOTES = {
    "audio": "In percent. T-A: a caption finds its sound (the language-encoder paper's audio "
    "retrieval); A-T: a sound finds its captions (its text retrieval).",
    "image": "In percent. T-I: a caption finds its image; I-T: an image finds its captions.",
}
_CLOTHO = (
    "FLAP's rows are of Clotho's evaluation split, the language-encoder paper's of its validation "
    "split."
)


def sheet(name: str, found: dict[str, Any], path: str) -> Sheet:
    """One data set's table, with the papers' rows of both directions."""
    to_text, to_media = directions_of(found)
    modality = to_text.removesuffix("_to_text")
    known = papers.data_set(path, modality) or ""
    letter = modality[0].upper()
    head = ("system", *(f"{way} {m}" for way in (f"T-{letter}", f"{letter}-T") for m in _COLUMNS))
    ours, by_chance = (
        ["-" if v is None else percent(v) for d in (to_media, to_text) for v in _values(some[d])]
        for some in (found, found["chance"])
    )
    rows: list[Row] = [
        (papers.cited(row), *row.text_to_media.split(), *"--", *row.media_to_text.split(), *"--")
        for row in papers.RETRIEVAL.get(known, ())
    ]
    rows += [
        (papers.cited(row), *"---", row.text_to_media, *"----", row.media_to_text, "-")
        for row in papers.PRECISION.get(known, ())
    ]
    laion = percent(found[to_text]["mAP@10_laion"])
    note = f"{letter}-T mAP@10 as LAION-CLAP computes it: {laion}"
    note += f", which is what {papers.LE_4} reports." if known in papers.PRECISION else "."
    ways = f"In percent. T-{letter}: from text to {modality}; {letter}-T: from {modality} to text."
    notes = [_NOTES.get(modality, ways), note, *([_CLOTHO] if known == "Clotho" else [])]
    notes += [f"Captions: {equal[2:]}."] if (equal := _equal(found)) else []
    title = f"Retrieval, {name}: {_sizes(found)}"
    both = [("this model", *ours), ("chance", *by_chance)]
    noun = _NOUNS.get(modality, modality)
    ways = (f"a caption finds its {noun}", f"a {noun} finds its captions")
    groups = (("", 1), *((f"{way}, %", len(_COLUMNS)) for way in ways))
    return Sheet(title, head, both, rows, " ".join(notes), groups)


def _values(scores: dict[str, float]) -> list[float | None]:
    """The columns' values; None for one that scores of an older version or chance lack."""
    return [scores.get(column) for column in _COLUMNS]


def _sizes(found: dict[str, Any]) -> str:
    return f"{found['clips']} clips, {found['captions']} captions"


def _equal(found: dict[str, Any]) -> str:
    """How many captions are equal to another clip's, and whether these count as right."""
    if "equal_captions" not in found:  # scores of an older version
        return ""
    right = "counted as right" if found["equal_captions_are_right"] else "not counted as right"
    count = found["equal_captions"]
    return f", {count} equal to another clip's" + (f" ({right})" if count else "")
