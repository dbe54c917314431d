"""One table of scores, formatted as Markdown, LaTeX (booktabs) or for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flap_fast.files import visible

Row = tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """One table: our rows above, the papers' below.

    Raises:
        ValueError: a row that has not a cell for every heading, or no row of ours.
    """

    title: str
    head: Row
    ours: list[Row]
    papers: list[Row] = field(default_factory=list)
    note: str = ""
    groups: tuple[tuple[str, int], ...] = ()
    """Headings over the columns for pages, and how many each is over; "" is over a column that is
    in none. The columns of a group begin with its abbreviation."""

    @property
    def plain_head(self) -> Row:
        """The headings for a place that shows the groups over them."""
        if not self.groups:
            return self.head
        grouped = [bool(name) for name, columns in self.groups for _ in range(columns)]
        both = zip(self.head, grouped, strict=True)
        return tuple(cell.partition(" ")[2] if inside else cell for cell, inside in both)

    def __post_init__(self):
        if not self.ours:
            raise ValueError(f"the table '{self.title}' must have a row, got none")
        over = sum(columns for _, columns in self.groups)
        if over not in (0, len(self.head)):
            raise ValueError(f"groups of '{self.title}' must be over all columns, got {over}")
        for row in (*self.ours, *self.papers):
            if len(row) != len(self.head):
                raise ValueError(
                    f"a row of '{self.title}' must have {len(self.head)} cells, got {row}"
                )


def percent(fraction: float) -> str:
    """A fraction in percent, with two digits."""
    return f"{100 * fraction:.2f}"


def averaged(
    title: str, found: dict[str, Any], metric: str, reported: Sequence[tuple[str, str]]
) -> Sheet:
    """A table with a column for each set and, where there is one, for their average.

    Args:
        found: {set: {metric: ..}}, and "average" if all sets were scored.
        reported: systems of the papers and their averages.
    """
    sets = [key for key in found if key != "average"]
    ours: Row = ("this model", *(percent(found[key][metric]) for key in sets))
    if "average" not in found:
        return Sheet(title, ("system", *sets), [ours])
    rows: list[Row] = [(system, *("-" for _ in sets), average) for system, average in reported]
    return Sheet(title, ("system", *sets, "average"), [(*ours, percent(found["average"]))], rows)


def markdown(sheet: Sheet) -> str:
    """The table under its title, its note below."""
    lines = [sheet.head, ("---", *("---:" for _ in sheet.head[1:])), *sheet.ours, *sheet.papers]
    body = ["| " + " | ".join(_shown(c).replace("|", r"\|") for c in line) + " |" for line in lines]
    note = [_shown(sheet.note), ""] if sheet.note else []
    return "\n".join([f"### {_shown(sheet.title)}", "", *body, "", *note])


def latex(sheet: Sheet) -> str:
    """A `table` environment for a document that uses booktabs."""

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


def terminal(sheet: Sheet) -> Group:
    """Our rows under the title."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in sheet.head:
        table.add_column(Text(visible(heading)), overflow="fold", min_width=len("100.00"))
    for row in sheet.ours:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return Group(Text(visible(sheet.title)), table)


# Backslash first: the others bring some.
_SPECIAL = {
    "\\": r"\textbackslash ",
    "~": r"\textasciitilde ",
    "^": r"\textasciicircum ",
}
_SPECIAL |= {"<": r"\textless ", ">": r"\textgreater "}
_SPECIAL |= {sign: "\\" + sign for sign in "&%$#_{}"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in _shown(text))


def _shown(text: str) -> str:
    return visible(text, document=True)
