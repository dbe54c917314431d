"""Scores as tables beside the papers' rows: Markdown, LaTeX (booktabs), and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flap_fast.evaluate import papers

Row = tuple[str, ...]

_DIRECTIONS = (
    "In percent. T-A: a caption finds its sound (the language-encoder paper's audio retrieval); "
    "A-T: a sound finds its captions (its text retrieval)."
)
_OF_PICTURES = "In percent. T-I: a caption finds its picture; I-T: a picture finds its captions."
_CLOTHO = (
    "FLAP's rows are of Clotho's evaluation split, the language-encoder paper's of its validation "
    "split."
)

_COUNTED = (
    "One multiply-add is one FLOP, as fvcore counts. Fused: dropped patches are not embedded."
)


@dataclass(frozen=True)
class Sheet:
    """One table: ours above, the papers' below."""

    title: str
    head: Row
    ours: list[Row]
    papers: list[Row] = field(default_factory=list)
    note: str = ""


def sheets(scores: dict[str, Any]) -> list[Sheet]:
    """Everything that was scored, in a fixed order."""
    paths = scores.get("data", {})
    found: list[Sheet] = []
    for task, sheet in _OF_A_SET.items():
        for name, values in scores.get(task, {}).items():
            seen = values.get("sense") == "image"
            found.append(sheet(name, values, papers.known_as(paths.get(name, name), seen)))
    if "flops" in scores:
        found.append(_flops(scores["flops"]))
    return found


def markdown(scores: dict[str, Any]) -> str:
    """One document."""
    return "\n".join(_markdown(sheet) for sheet in sheets(scores))


def latex(scores: dict[str, Any]) -> str:
    """`table` environments for a document that uses booktabs."""
    return "\n".join(_latex(sheet) for sheet in sheets(scores))


def terminal(scores: dict[str, Any]) -> Iterator[Group]:
    """Ours alone, without retrieval, which has a table of its own."""
    for sheet in sheets({**scores, "retrieval": {}}):
        table = Table(box=box.SIMPLE_HEAD)
        for heading in sheet.head:
            table.add_column(Text(heading), overflow="fold", min_width=len("100.00"))
        for row in sheet.ours:
            table.add_row(*map(Text, row))
        yield Group(Text(sheet.title), table)


def _retrieval(name: str, found: dict[str, Any], known: str | None) -> Sheet:
    seen = found.get("sense") == "image"
    there, back = ("T-I", "I-T") if seen else ("T-A", "A-T")
    head = ("system", *(f"{there} {m}" for m in _METRICS), *(f"{back} {m}" for m in _METRICS))
    a2t, t2a = found["audio_to_text"], found["text_to_audio"]
    ours = [_percent(d[m]) for d in (t2a, a2t) for m in _METRICS]
    by_chance = [
        _percent(found["chance"][d][m]) if m in found["chance"][d] else "-"
        for d in ("text_to_audio", "audio_to_text")
        for m in _METRICS
    ]
    rows: list[Row] = [
        (_called(row), *row.text_to_audio.split(), "-", *row.audio_to_text.split(), "-")
        for row in papers.RETRIEVAL.get(known or "", ())
    ]
    rows += [
        (_called(row), *"---", row.text_to_audio, *"---", row.audio_to_text)
        for row in papers.PRECISION.get(known or "", ())
    ]
    laion = f"{back} mAP@10 as LAION-CLAP computes it: {_percent(a2t['mAP@10_laion'])}"
    there_too = known in papers.PRECISION
    reads = f"{laion}, which is what {papers.LE_4} reports." if there_too else f"{laion}."
    directions = _OF_PICTURES if seen else _DIRECTIONS
    notes = [directions, reads, *([_CLOTHO] if known == "Clotho" else [])]
    title = f"Retrieval, {name}: {found['clips']} clips, {found['captions']} captions"
    chance = ("chance", *by_chance)
    return Sheet(title, head, [("this model", *ours), chance], rows, " ".join(notes))


def _zero_shot(name: str, found: dict[str, Any], known: str | None) -> Sheet:
    columns = ("top_1", "top_5", "mAP@10", "mAP")
    many = found["templates"] > 1
    rows: list[Row] = []
    for row in papers.ZERO_SHOT.get(known or "", ()):
        top_1 = row.many if many else row.one
        if top_1:
            rows.append((_called(row), top_1, "-", "-", "-"))
    ours = ("this model", *(_percent(found[column]) for column in columns))
    chance = ("chance", *(_percent(found["chance"][f"top_{k}"]) for k in (1, 5)), "-", "-")
    title = f"Zero-shot, {name}: {found['clips']} clips, {found['classes']} classes"
    note = f"In percent, {found['templates']} template{'s' if many else ''} a class."
    if found["unlabelled"]:
        note += f" {found['unlabelled']} clips without a label are left out."
    return Sheet(title, ("system", "top-1", "top-5", *columns[2:]), [ours, chance], rows, note)


def _geometry(name: str, found: dict[str, Any], known: str | None) -> Sheet:
    values = ("this model", *(_number(found[key]) for key in _LIES))
    head = ("system", *(key.replace("_", ", ") for key in _LIES))
    note = "Alignment: 0 is best. Uniformity: the lower, the more even."
    return Sheet(f"Geometry, {name}", head, [values], note=note)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sentences(what: str, metric: str) -> Callable[[str, dict[str, Any], str | None], Sheet]:
    """A sheet of one of the two kinds of sentence tasks."""

    def sheet(name: str, found: dict[str, Any], known: str | None) -> Sheet:
        sets = [key for key in found if key != "average"]
        ours = ["this model", *(_percent(found[key][metric]) for key in sets)]
        head, rows = ["system", *sets], []
        if "average" in found:
            head.append("average")
            ours.append(_percent(found["average"]))
            rows = [
                (_called(row), *("-" for _ in sets), getattr(row, what)) for row in papers.SENTEVAL
            ]
        title = f"{what.upper() if what == 'sts' else 'Transfer'}, {name}: {metric} x 100"
        return Sheet(title, tuple(head), [tuple(ours)], rows)

    return sheet


def _flops(rows: Sequence[dict[str, Any]]) -> Sheet:
    head = ("masking", "ratio", "patches kept", "GFLOPs", "GFLOPs fused")
    ours = []
    for row in rows:
        kind = {"none": "none", "1d": f"1-D {row['unit']}", "2d": "2-D"}[row["kind"]]
        values = (f"{row['ratio']:.1f}", str(row["kept"]))
        ours.append((kind, *values, f"{row['gflops']:.1f}", f"{row['gflops_fused']:.1f}"))
    title = f"Audio encoder, forward pass over {rows[0]['clips']} clips"
    return Sheet(title, head, ours, note=_COUNTED)


_LIES = ("alignment", "uniformity_audio", "uniformity_text")
_METRICS = ("R@1", "R@5", "R@10", "mAP@10")
_OF_A_SET: dict[str, Callable[[str, dict[str, Any], str | None], Sheet]] = {
    "retrieval": _retrieval,
    "zero_shot": _zero_shot,
    "geometry": _geometry,
    "sts": _sentences("sts", "spearman"),
    "transfer": _sentences("transfer", "accuracy"),
}


def _called(row: papers.Retrieved | papers.Precision | papers.Classified | papers.Sentences) -> str:
    return f"{row.system} ({row.source})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _markdown(sheet: Sheet) -> str:
    lines = [sheet.head, ("---", *("---:" for _ in sheet.head[1:])), *sheet.ours, *sheet.papers]
    body = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join(
        [f"### {sheet.title}", "", *body, "", *([sheet.note, ""] if sheet.note else [])]
    )


def _latex(sheet: Sheet) -> str:
    def line(row: Row) -> str:
        return " & ".join(_escaped(cell) for cell in row) + r" \\"

    papers_rows = [r"\midrule", *map(line, sheet.papers)] if sheet.papers else []
    caption = f"{sheet.title}. {sheet.note}".strip()
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(sheet.head) - 1)}}}",
            r"\toprule",
            line(sheet.head),
            r"\midrule",
            *map(line, sheet.ours),
            *papers_rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


# Backslash first: the others bring some.
_SPECIAL = {
    "\\": r"\textbackslash ",
    "~": r"\textasciitilde ",
    "^": r"\textasciicircum ",
}
_SPECIAL |= {sign: "\\" + sign for sign in "&%$#_{}"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
