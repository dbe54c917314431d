"""`flap report`: one self-contained HTML page of a run.

run folder -> RunFacts -> a function a section -> templates/SECTION.html.jinja -> one file

Nothing is fetched by the page. A new section is a function here, a line in `SECTIONS` and a
template named by its id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from flap_fast.checks import ConfigError
from flap_fast.config.file import dump_config
from flap_fast.evaluation.tables import sheets
from flap_fast.files import visible, write_atomically
from flap_fast.places import without_secrets
from flap_fast.progress import progress
from flap_fast.report import facts, figures
from flap_fast.report.doctor import doctor_section
from flap_fast.report.examples import retrieval_examples
from flap_fast.report.run import RunFacts, read_run

Contents = dict[str, Any]


class Section(NamedTuple):
    """A part of the page under its heading."""

    id: str
    """The name of its template, and of the link to it."""
    heading: str
    contents: Callable[[RunFacts, Sequence[RunFacts]], Contents | None]
    """Of the run, and of the others beside it: the template's `found`; None leaves it out."""


def report(folder: Path, out: Path | None = None, *, others: Sequence[Path] = ()) -> Path:
    """Write the page of a run; returns the file, by default RUN/report.html.

    Args:
        others: folders of other runs, drawn with it in recall over GFLOPs.

    Raises:
        ConfigError: no run, or matplotlib or Jinja2 is not installed.
    """
    run, beside = read_run(folder), [read_run(other) for other in others]
    file = out or folder / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    with progress("report"):
        found = [(section, section.contents(run, beside)) for section in SECTIONS]
    sections = [
        {"id": section.id, "heading": section.heading, "found": contents}
        for section, contents in found
        if contents is not None
    ]
    write_atomically(file, _rendered(run=run, sections=sections).encode())
    return file


def _run(run: RunFacts, others: Sequence[RunFacts]) -> Contents:
    return {"command": run.environment.get("command", ""), "facts": facts.facts(run)}


def _scores(run: RunFacts, others: Sequence[RunFacts]) -> Contents:
    return {"tables": sheets(run.scores) if run.scores else []}


def _training(run: RunFacts, others: Sequence[RunFacts]) -> Contents:
    return {"curves": figures.curves(run)}


def _compute(run: RunFacts, others: Sequence[RunFacts]) -> Contents | None:
    """A figure for each validation set, and why another run is not in it."""
    if not others:
        return None
    found, missing = [], []
    for name in run.scores.get("retrieval", {}):
        drawn = [run]
        for other in others:
            why = _why_not(run, other, name)
            if why:
                missing.append(f"{other.name} is not drawn over GFLOPs on {name}: {why}.")
            else:
                drawn.append(other)
        if len(drawn) > 1:
            found.append(figures.recall_over_gflops(drawn, name))
    return {"figures": found, "missing": missing}


def _examples(run: RunFacts, others: Sequence[RunFacts]) -> Contents:
    examples, missing = retrieval_examples(run)
    drawn = [{"of": one, "figures": figures.of_examples(one)} for one in examples]
    return {"sets": drawn, "missing": missing}


def _doctor(run: RunFacts, others: Sequence[RunFacts]) -> Contents | None:
    return doctor_section(run.folder)


def _settings(run: RunFacts, others: Sequence[RunFacts]) -> Contents:
    return {
        "sessions": facts.session_rows(run),
        "session_head": facts.SESSION_HEAD,
        "versions": facts.versions(run),
        "config": without_secrets(dump_config(run.config)),
    }


SECTIONS = (
    Section("run", "The run", _run),
    Section("scores", "Scores", _scores),
    Section("training", "During training", _training),
    Section("compute", "Recall against compute", _compute),
    Section("examples", "Examples", _examples),
    Section("doctor", "What flap doctor found", _doctor),
    Section("settings", "Settings and versions", _settings),
)


def _why_not(run: RunFacts, other: RunFacts, name: str) -> str:
    """Why two runs cannot be compared on a set; empty where they can."""
    if other.modality != run.modality:
        return f"its encoder is of another modality, {other.modality}"
    if name not in other.scores.get("retrieval", {}):
        return "it has no scores of that name"
    ours, theirs = (
        (
            Path(r.scores.get("data", {}).get(name, "")).resolve(),
            *(r.scores["retrieval"][name][size] for size in ("clips", "captions")),
        )
        for r in (run, other)
    )
    return "" if ours == theirs else "its scores are of {}, {} clips, {} captions".format(*theirs)


def _shown(value: Any) -> Any:
    """A value of the page; control characters of names are escaped, figures are as they are."""
    named = isinstance(value, (str, Path)) and not hasattr(value, "__html__")
    return visible(value, keep="\n\t", document=True) if named else value


def _rendered(**contents: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ConfigError("reports must have Jinja2; pip install 'flap_fast[report]'") from None
    environment = Environment(
        loader=PackageLoader("flap_fast.report", "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("flap_fast"),
        **contents,
    )
