"""`flap import` and `flap export`: checkpoints of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flap_fast.checks import require
from flap_fast.files import say
from flap_fast.hub import check_repo_name, push_folder
from flap_fast.progress import progress


def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A .pt of LAION-CLAP, OpenAI or CyCLIP, a .pth of AudioMAE, a .ckpt of HTSAT, an "
            ".onnx of YAMNet, or the folder of a ClapModel or a FLAP."
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
    with progress("import"):
        from flap_fast.interchange.convert import import_checkpoint

        use = import_checkpoint(
            checkpoint, out, overrides or [], strip=strip or [], partial=partial, decoder=decoder
        )
    say(f"{out}: {use}")


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="The folder of a run or of a checkpoint, or hf://OWNER/NAME.")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="A folder for transformers, or a .pt for LAION-CLAP or OpenAI's CLIP."),
    ],
    license: Annotated[
        str | None, typer.Option(help="Of the card: the Hub's name of the licence, as apache-2.0.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(help="Of the card, with --license other: the licence's name.")
    ] = None,
    license_link: Annotated[
        str | None, typer.Option(help="Of the card, with --license other: where it stands.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Of the card: the captions' language, as en; may be repeated."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Of the card: a data set of training, by its name; may be repeated."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="Upload OUT to this OWNER/NAME on the Hugging Face Hub (hf auth login)."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: make a new repository private.")
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="A folder that onnxruntime runs, without PyTorch; also int8."),
    ] = False,
) -> None:
    """Convert a model for other projects: a `ClapModel` if possible, a CLIP in OpenAI's names."""
    if push is not None:
        check_repo_name(push)
        file = out.suffix in (".pt", ".pth")
        require(not file, "OUT", "be a folder with --push", out, "name one without .pt")
    require(push is not None or not private, "--private", "come with --push", private)
    other = license == "other" or (license_name or license_link) is None
    require(other, "--license", "be other with --license-name and --license-link", license)
    with progress("export"):
        if onnx:
            from flap_fast.interchange.to_onnx.folder import export_onnx as write
        else:
            from flap_fast.interchange.convert import export_checkpoint as write
        from flap_fast.interchange.layout import CardFields

        fields = CardFields(
            name=push,
            license=license,
            license_name=license_name,
            license_link=license_link,
            languages=tuple(language or ()),
            datasets=tuple(dataset or ()),
        )
        written = write(checkpoint, out, fields)
    say(f"{out}: {written}")
    if push is not None:
        say(
            f"{push_folder(out, push, private=private)}: open it with flap_fast.load('hf://{push}')"
        )
