"""`flap train`: on one process, or on the ranks of a launcher."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from flap_fast.commands.errors import print_error
from flap_fast.files import say
from flap_fast.launcher import first_of_its_node, launched
from flap_fast.progress import starting
from flap_fast.training.signals import ends_at_once


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Settings to change, such as mask.kind=1d."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")
    ] = False,
) -> None:
    """Train a model and evaluate it on data.val. Also under `deepspeed --module flap_fast`."""
    try:
        with _ends_at_once(imports=True):
            _train(config, overrides or [], resume=resume)
    except KeyboardInterrupt:  # a second Ctrl-C, which `Stop` has answered
        raise typer.Exit(130) from None


def _train(config: Path, overrides: list[str], *, resume: bool) -> None:
    from flap_fast.config.file import load_config

    if launched().world == 1:
        load_config(config, overrides)  # its errors before PyTorch is imported
    with starting("start"):
        from flap_fast.commands.score import print_scores
        from flap_fast.ranks.agreement import agree
        from flap_fast.ranks.failure import joined
        from flap_fast.training.loop import Stopped
        from flap_fast.training.loop import train as run

    with _ends_at_once(), joined() as ranks:
        settings = agree(ranks, lambda: (load_config(config, overrides), {}))
        try:
            scores, stopped = run(settings, resume=resume), None
        except Stopped as error:
            scores, stopped = None, error
    if stopped:
        if ranks.first:
            print_error(f"{stopped}. Continue with the same command and --resume")
        raise typer.Exit(130)
    if ranks.first:
        if scores is not None:
            print_scores(scores)
        say(f"{settings.run_folder}: the run is complete (flap eval {settings.run_folder} DATA)")


def _ends_at_once(*, imports: bool = False) -> AbstractContextManager[None]:
    line = "stopped before the first step: nothing is lost"
    return ends_at_once(line, says=first_of_its_node(), imports=imports)
