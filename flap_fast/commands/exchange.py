"""`flap import`, `flap export`: checkpoints of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="LAION-CLAP's, OpenAI's or CyCLIP's .pt, AudioMAE's .pth, HTSAT's .ckpt, a "
            "ClapModel's or a FLAP's folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="As in text.folder=models/roberta-base."),
    ] = None,
    strip: Annotated[
        list[str] | None, typer.Option(help="A prefix that names are to lose; may be repeated.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what fits; the rest begins at random.")
    ] = False,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="AudioMAE's decoder too, if it is a plain ViT.")
    ] = False,
) -> None:
    """Write another project's checkpoint as a folder that `flap` opens and trains from."""
    from flap_fast.interchange.convert import import_checkpoint

    use = import_checkpoint(
        checkpoint, out, overrides or [], strip=strip or [], partial=partial, decoder=decoder
    )
    print(f"{out}: {use}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint's.")],
    out: Annotated[
        Path, typer.Argument(help="A folder, for transformers; or a .pt, LAION-CLAP's or OpenAI's.")
    ],
) -> None:
    """Write a model for others: a `ClapModel` where it is one, a CLIP in OpenAI's names."""
    from flap_fast.interchange.convert import export_checkpoint

    print(f"{out}: {export_checkpoint(checkpoint, out)}")
