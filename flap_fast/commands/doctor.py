"""`flap doctor`: what is in data or in a run, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flap_fast.checks import require
from flap_fast.files import as_utf8, say

_PATHS = (
    "Folders of shards or of splits, .tar files, patterns, URLs, manifests; or a run's or a "
    "model's folder, then other data."
)
_CONFIG = "For data alone: the config they are for, for its sample rate and its tokenizer."


def doctor(
    paths: Annotated[list[str], typer.Argument(metavar="DATA|RUN...", help=_PATHS)],
    config: Annotated[Path | None, typer.Option(help=_CONFIG)] = None,
    sample: Annotated[
        int | None, typer.Option(help="Clips of each split, drawn by chance; all when not given.")
    ] = None,
    embed: Annotated[
        int, typer.Option(help="Clips that a run's model embeds, of a split for evaluation.")
    ] = 256,
    threads: Annotated[int, typer.Option(help="Decoding threads; 0 takes all cores.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write it as JSON; of a run RUN/doctor.json by default."),
    ] = None,
) -> None:
    """Say what is in data or a run and what is wrong; exit code 1 if there are errors."""
    from rich.console import Console

    from flap_fast.files import write_atomically
    from flap_fast.places import place_of
    from flap_fast.tools.doctor import tables
    from flap_fast.tools.doctor.examine import examine, findings

    require(sample is None or sample >= 2, "--sample", "be at least 2", sample)
    require(embed >= 0, "--embed", "be at least 0", embed)
    require(threads >= 0, "--threads", "be at least 0", threads)
    places = [place_of("DATA", path) for path in paths]
    examined = examine(places, config=config, sample=sample, embedded=embed, threads=threads)
    found = findings(examined)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe does not wrap lines
    if examined.splits:
        console.print(tables.contents_table(examined))
    if found:
        console.print(tables.findings_table(found))
    for sentence in tables.sentences(found):
        say(sentence)
    if missing := tables.not_looked_at(examined):
        say(f"not looked at: {missing}")
    answer = tables.as_json(examined, found)
    run = examined.run
    # Nothing is written into a model's folder.
    file = json_file or (run.folder / "doctor.json" if run and run.rows else None)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(answer, indent=1, ensure_ascii=False) + "\n"
        write_atomically(file, as_utf8(text))
        say(f"written to {file}")
    counts = answer["counts"]
    say(", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()))
    if counts["error"]:
        raise typer.Exit(1)
