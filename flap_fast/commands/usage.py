"""Errors in how a command is called: usage errors, and URLs where only a path can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from typer.core import TyperCommand, TyperGroup

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


class Command(TyperCommand):
    """A command whose arguments of type `Path` are files here; text may be a URL."""

    def invoke(self, ctx):
        for parameter in self.params:
            given = ctx.params.get(str(parameter.name))
            for path in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(path, Path):
                    from flap_fast.places import require_on_disk  # for `--help`, without pydantic

                    name = parameter.opts[0] if parameter.opts[0][0] == "-" else parameter.name
                    require_on_disk(name if name[0] == "-" else name.upper(), path)
        return super().invoke(ctx)
