"""`flap report`: one self-contained HTML page of a run.

run folder -> RunFacts -> figures and tables -> page.html.jinja -> one file, nothing fetched
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError
from flap_fast.config.file import dump_config
from flap_fast.evaluate.flops import CLIPS
from flap_fast.evaluate.sheet import Sheet
from flap_fast.evaluate.tables import sheets
from flap_fast.files import visible, write_atomically
from flap_fast.report import figures
from flap_fast.report.doctor import doctor_section
from flap_fast.report.examples import retrieval_examples
from flap_fast.report.run import RunFacts, read_run


def report(folder: Path, out: Path | None = None, *, others: Sequence[Path] = ()) -> Path:
    """Write the page of a run; returns the file, by default RUN/report.html.

    Args:
        others: folders of other runs, drawn with it in recall over GFLOPs.

    Raises:
        ConfigError: no run, or matplotlib or Jinja2 is not installed.
    """
    run = read_run(folder)
    file = out or folder / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        file, _rendered(**_contents(run, [read_run(other) for other in others])).encode()
    )
    return file


def _contents(run: RunFacts, others: list[RunFacts]) -> dict[str, Any]:
    examples, missing = retrieval_examples(run)
    gflops, undrawn = _over_gflops(run, others)
    return {
        "run": run,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": version("flap_fast"),
        "summary": _summary(run),
        "curves": figures.curves(run),
        "tables": _tables(run),
        "examples": [
            {
                "of": one,
                "similarity": figures.similarity(one),
                "geometry": figures.alignment_over_uniformity(one) if one.geometry else "",
            }
            for one in examples
        ],
        "missing": [*missing, *undrawn],
        "gflops": gflops,
        "config": dump_config(run.config),
        "doctor": doctor_section(run.folder),
    }


def _summary(run: RunFacts) -> dict[str, str]:
    """The numbers at the top of the page."""
    last, config = run.steps[-1], run.config
    planned = config.train.steps
    _, speed = run.column("clips_per_s")
    _, memory = run.column("peak_mib")
    return {
        "steps": f"{last['step']:,}" + (f" of {planned:,}" if planned else ""),
        "global batch": f"{config.train.global_batch:,}",
        "last loss": f"{last['loss']:.4f}",
        "clips/s, median and range": figures.spread(speed),
        "peak memory of a rank": f"{memory.max():,.0f} MiB",
        f"{run.modality} encoder": f"{figures.gflops(run):.1f} GFLOPs for {CLIPS} clips",
    }


def _tables(run: RunFacts) -> list[Sheet]:
    return sheets(run.scores) if run.scores else []


def _over_gflops(run: RunFacts, others: list[RunFacts]) -> tuple[dict[str, str], list[str]]:
    """A figure (SVG) for each validation set, and why another run is not in it."""
    found, missing = {}, []
    for name in run.scores.get("retrieval", {}):
        drawn = [run]
        for other in others:
            why = _why_not(run, other, name)
            if why:
                missing.append(f"{other.name} is not drawn over GFLOPs on {name}: {why}.")
            else:
                drawn.append(other)
        found[name] = figures.recall_over_gflops(drawn, name)
    return found, missing


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
        loader=PackageLoader("flap_fast.report", "."),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(**contents)
