"""Errors in how a command is called, whose arguments may hold control characters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from typer.core import TyperGroup

from flap_fast.files import visible


@contextmanager
def visible_errors() -> Iterator[None]:
    """Escape control characters in the message of a usage error."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # a ClickException; typer may bring its own click
            error.message = visible(error.message, keep="\n")  # type: ignore[attr-defined]
        raise


class Commands(TyperGroup):
    """The commands, with their usage errors made visible."""

    def parse_args(self, ctx, args):
        with visible_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx):
        with visible_errors():
            return super().invoke(ctx)
