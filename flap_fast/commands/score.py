"""`flap eval`: a model and data -> tables and JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flap_fast.checks import ConfigError, read_text, require
from flap_fast.commands.length import LengthOption
from flap_fast.evaluation import TASKS
from flap_fast.files import parsed_json, say
from flap_fast.hub import on_hub
from flap_fast.progress import starting

if TYPE_CHECKING:
    from flap_fast.evaluation.evaluated_model import EvaluatedModel

_MODEL = (
    "The folder of a run, a checkpoint or a ClapModel, or hf://OWNER/NAME; for sentences also a "
    "text encoder's, or package:NAME/FOLDER."
)
_DATA = "Shards, as in data.train; for sentences STS files or SentEval's folder."
_TASKS = f"Some of {','.join(TASKS)}; by the data when not given."
_OUT = "JSON of this call's scores; without it they are added to MODEL/eval.json."
_CROP = "Of long clips: random, center, multi:K or whole; eval.crop of the model when not given."
_TEMPLATES = (
    "Zero-shot prompt with {label}, a set (audio29, imagenet80), or a file with one a line."
)
_EQUAL = "Other clips' equal captions count as right; eval.equal_captions when not given."
_RELEVANCE = "Of the task relevance: a table of queries and their right files."
_CLASSES = "Zero-shot classes, one a line or LAION's JSON; the labels of the data when not given."


def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    data: Annotated[list[str] | None, typer.Argument(help=_DATA)] = None,
    tasks: Annotated[str, typer.Option(help=_TASKS)] = "",
    out: Annotated[Path | None, typer.Option(help=_OUT)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Tables with the papers' rows.")] = None,
    latex: Annotated[Path | None, typer.Option(help="The same for LaTeX with booktabs.")] = None,
    batch: Annotated[int, typer.Option(help="Clips or texts embedded at a time.")] = 64,
    crop: Annotated[str | None, typer.Option(help=_CROP)] = None,
    length: LengthOption = None,
    templates: Annotated[str | None, typer.Option(help=_TEMPLATES)] = None,
    classes: Annotated[Path | None, typer.Option(help=_CLASSES)] = None,
    equal_captions: Annotated[bool | None, typer.Option(help=_EQUAL)] = None,
    relevance: Annotated[str | None, typer.Option(help=_RELEVANCE)] = None,
    pool: Annotated[
        str, typer.Option(help="Pooling of a text encoder without a model: mean, cls, pooler.")
    ] = "mean",
) -> None:
    """Score a model: retrieval, zero-shot, probes, geometry, sentences, FLOPs; also by torchrun."""
    with starting("start"):
        from flap_fast.evaluation.run import score
        from flap_fast.evaluation.scores_file import merged, read_scores, write_scores
        from flap_fast.interchange.opened import opened
        from flap_fast.places import place_of
        from flap_fast.ranks.agreement import Facts, agree
        from flap_fast.ranks.failure import joined
        from flap_fast.tools.scoring import is_text_encoder, open_model

    asked = tuple(task for task in tasks.replace(",", " ").split() if task)
    settings = {"batch": batch, "crop": crop, "templates": templates}
    settings |= {"equal_captions": equal_captions, "relevance": relevance}
    for name, file in (("--out", out), ("--markdown", markdown), ("--latex", latex)):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _require_writable(name, file)
    ours = None
    if out is None and not on_hub(model) and not is_text_encoder(model) and Path(model).is_dir():
        ours = Path(model) / "eval.json"
        _require_writable("eval.json", ours)
        read_scores(ours)
    places = [place_of("DATA", text) for text in data or []]
    options = {"--tasks": asked, "data": [*(data or [])], **settings}
    with joined() as ranks:

        def evaluated_model() -> tuple[EvaluatedModel, Facts]:
            named = read_classes(classes)
            with opened(model) as folder:
                found = open_model(str(folder), settings, pool, ranks, named, length=length)
                weights = {f.name: f.stat().st_size for f in folder.rglob("*.safetensors")}
            return found, {"": options, "the classes": named, "bytes in the model of": weights}

        with starting("open the model"):
            evaluated = agree(ranks, evaluated_model)
        scores = score(evaluated, places, asked)
        if not ranks.first:
            return
        if out is not None:
            write_scores(out, scores)
        elif ours is not None:
            write_scores(ours, merged(read_scores(ours), scores))
        print_scores(scores)
        if out or ours:
            say(f"written to {out or ours}")
        _write_tables(scores, markdown, latex)


def read_classes(file: Path | None) -> tuple[str, ...]:
    """Class names from a text file, one a line, or from LAION's {"dog": 0, ...}."""
    if file is None:
        return ()
    from flap_fast.tools.inputs import texts

    text = read_text("--classes", file)
    if file.suffix == ".json":
        try:
            found = parsed_json(text)
            names = sorted(found, key=found.__getitem__) if isinstance(found, dict) else found
            names = texts(names, "a JSON file of classes")
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} must hold class names: {error}") from None
    else:
        names = text.splitlines()
    classes = tuple(" ".join(name.replace("_", " ").split()) for name in names)
    classes = tuple(name for name in classes if name)
    require(bool(classes), str(file), "name classes", "none")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    require(not twice, str(file), "name each class once", ", ".join(twice[:3]))
    return classes


def _require_writable(name: str, file: Path) -> None:
    holds = not file.is_dir() and os.access(file.parent, os.W_OK)
    remedy = "name another file" if name.startswith("--") else "name a file with --out"
    require(holds, name, "be a file in a folder that can be written", file, remedy)


def print_scores(scores: dict[str, Any]) -> None:
    """Print the tables, in whole lines also into a log."""
    from rich.console import Console

    from flap_fast.evaluation.tables import terminal

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe does not wrap lines
    for table in terminal(scores):
        console.print(table)


def _write_tables(scores: dict[str, Any], markdown: Path | None, latex: Path | None) -> None:
    from flap_fast.evaluation import tables
    from flap_fast.files import write_atomically

    for file, write in ((markdown, tables.markdown), (latex, tables.latex)):
        if file is not None:
            write_atomically(file, write(scores).encode())
            say(f"written to {file}")
