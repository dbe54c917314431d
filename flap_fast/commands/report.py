"""`flap report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flap_fast.files import say
from flap_fast.progress import starting


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.")],
    others: Annotated[
        list[Path] | None, typer.Argument(help="Other runs, for recall over GFLOPs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; RUN/report.html when not given.")
    ] = None,
) -> None:
    """Write one HTML page of a run: curves, scores, similarities, retrieval examples."""
    with starting("start"):
        from flap_fast.report.page import report as write

    file = write(run, out, others=others or [])
    say(f"{file}: {file.stat().st_size / 1e6:.2f} MB, one file that fetches nothing")
