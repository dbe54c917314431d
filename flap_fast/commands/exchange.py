"""`flap import` and `flap export`: checkpoints of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flap_fast.files import say


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A .pt of LAION-CLAP, OpenAI or CyCLIP, a .pth of AudioMAE, a .ckpt of HTSAT, or "
            "the folder of a ClapModel or a FLAP."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...", help="Settings, such as text.folder=models/roberta-base."
        ),
    ] = None,
    strip: Annotated[
        list[str] | None, typer.Option(help="A prefix to remove from names; may be repeated.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take the tensors that fit; the rest are random.")
    ] = False,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="Import AudioMAE's decoder too, if it is a plain ViT.")
    ] = False,
) -> None:
    """Convert another project's checkpoint to a folder that `flap` opens and trains from."""
    from flap_fast.interchange.convert import import_checkpoint

    use = import_checkpoint(
        checkpoint, out, overrides or [], strip=strip or [], partial=partial, decoder=decoder
    )
    say(f"{out}: {use}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a run or of a checkpoint.")],
    out: Annotated[
        Path,
        typer.Argument(help="A folder for transformers, or a .pt for LAION-CLAP or OpenAI's CLIP."),
    ],
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="A folder that onnxruntime runs, without PyTorch; also int8."),
    ] = False,
) -> None:
    """Convert a model for other projects: a `ClapModel` if possible, a CLIP in OpenAI's names."""
    if onnx:
        from flap_fast.interchange.to_onnx.folder import export_onnx as write
    else:
        from flap_fast.interchange.convert import export_checkpoint as write

    say(f"{out}: {write(checkpoint, out)}")
