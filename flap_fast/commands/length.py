"""`--length` of the commands that open a model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

LengthOption = Annotated[
    Literal["fixed", "variable"] | None,
    typer.Option(help="audio.length, if not as trained: clips cropped and filled, or as they are."),
]
