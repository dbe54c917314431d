"""`flap embed`, `flap search` and `flap classify`: use a trained model on sound files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flap_fast.checks import read_text, require
from flap_fast.commands.length import LengthOption
from flap_fast.commands.shard_range import DistributorOption, ShardRangeOption, work_division
from flap_fast.files import say, visible
from flap_fast.progress import progress, starting

if TYPE_CHECKING:
    from flap_fast.tools.embedder import Embedder
    from flap_fast.tools.search import Index

Model = Annotated[
    str | None,
    typer.Option(
        envvar="FLAP_MODEL",
        help="The folder of a run, of a checkpoint or of a ClapModel, or hf://OWNER/NAME; by "
        "default the newest run in runs/.",
    ),
]
Sounds = Annotated[list[Path], typer.Argument(help="Sound files, and folders of sound files.")]
Crop = Annotated[
    str | None,
    typer.Option(
        help="Crop of long sounds: center, multi:K (mean of K) or whole; center, or whole with "
        "audio.length = variable, when not given."
    ),
]
Windows = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS[:HOP]",
        help="Windows of so many seconds, one every HOP seconds (half of them by default), each "
        "with its time; `auto` is audio.duration_s.",
    ),
]
Format = Annotated[
    Literal["text", "json", "csv"], typer.Option(help="Output: text, JSON lines or CSV.")
]
Batch = Annotated[int, typer.Option(help="Crops in a batch of the model.")]


def embed(
    sounds: Sounds,
    out: Annotated[Path, typer.Option(help="Output folder of embeddings.npy and sounds.jsonl.")],
    model: Model = None,
    crop: Crop = None,
    windows: Windows = None,
    length: LengthOption = None,
    batch: Batch = 64,
    shard_range: ShardRangeOption = None,
    distributor: DistributorOption = "threads",
) -> None:
    """Embed sound files into a NumPy array; a second call resumes."""
    with starting("start"):
        from flap_fast.tools.embed_files import embed_files
        from flap_fast.tools.search import find_sounds

    require(batch >= 1, "--batch", "be at least 1", batch)
    chosen, distribution = work_division(shard_range, distributor)
    done = embed_files(
        named_model(model),
        find_sounds(sounds),
        out,
        crop=crop,
        windows=windows,
        length=length,
        batch=batch,
        shard_range=chosen,
        distributor=distribution,
        progress=progress,
    )
    if done.unfinished:
        say(
            f"{out}: shard range {chosen} is done, {done.unfinished} chunks of the others are not: "
            "the last to finish writes embeddings.npy"
        )
        return
    sounds_done = done.windowed or done.rows
    rows = f"{done.rows} windows of " if done.windowed else ""
    say(f"{out}: {rows}{sounds_done} sounds in embeddings.npy, their names in sounds.jsonl")
    if done.rejected:
        count = f"{done.rejected} of {sounds_done + done.rejected} sounds"
        say(f"{count} cannot be read, see {out / 'rejected.jsonl'}", error=True)
        if not done.rows:
            raise typer.Exit(1)


def search(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Texts to search for.")],
    audio: Annotated[
        list[Path] | None, typer.Option(help="A file or folder to search; may be repeated.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="File of the embeddings; by default AUDIO/.flap-index, .flap-index-windows."
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="Sounds per query.")] = 10,
    model: Model = None,
    crop: Crop = None,
    windows: Windows = None,
    length: LengthOption = None,
    batch: Batch = 64,
    format: Format = "text",
) -> None:
    """Print the sounds nearest to a text, best first; embeddings are cached in an index."""
    with starting("start"):
        from flap_fast.tools.search import open_index
        from flap_fast.tools.windows import chosen_crop, time_text

    require(top >= 1, "--top", "be at least 1", top)
    for query in queries:
        require(bool(query.strip()), "QUERY", "be the words to search for", query)
    embedder = _open(model, length)
    if audio:
        policy = chosen_crop(embedder.config, crop, windows)
        found = updated_index(
            index or index_file(audio[0], windows), audio, embedder, policy, batch
        )
    else:
        require(index is not None, "--audio or --index", "be given", "neither")
        remedy = "the index has its own"
        for name, value in (("--windows", windows), ("--crop", crop)):
            require(value is None, name, "be left out without --audio", value, remedy)
        found = open_index(index)  # type: ignore[arg-type] - checked above
        rule = "be made with this model"
        require(
            found.model == embedder.identity,
            str(index),
            rule,
            "another model's",
            "give --audio too",
        )
    answers = found.nearest(embedder.embed_text(queries), top)
    write = rows_writer(format, ("query", "file", "start_s", "end_s", "cosine"))
    for query, nearest in zip(queries, answers, strict=True):
        if format == "text" and len(queries) > 1:
            say(visible(query))
        for path, cosine, span_s, _ in nearest:
            when = f"  {time_text(span_s)}" if span_s else ""
            start_s, end_s = span_s or (None, None)
            text = f"{cosine:6.3f}  {visible(path)}{when}"
            write(text, (query, str(path), start_s, end_s, cosine))


def classify(
    sounds: Sounds,
    labels: Annotated[
        str, typer.Option(help="Class names separated by commas, or a file with one per line.")
    ],
    template: Annotated[
        str, typer.Option(help="A prompt with {label}, audio29, imagenet80, or a file of prompts.")
    ] = "This is a sound of {label}.",
    top: Annotated[int, typer.Option(help="Classes per sound.")] = 1,
    model: Model = None,
    crop: Crop = None,
    windows: Windows = None,
    length: LengthOption = None,
    batch: Batch = 64,
    format: Format = "text",
) -> None:
    """Print the most likely class of each sound: file, class, probability, separated by tabs.

    With --windows the class of each window: file, time, class, probability.
    """
    with starting("start"):
        from flap_fast.data.preprocess.waveform import BadSound
        from flap_fast.tools.inputs import distinct
        from flap_fast.tools.search import find_sounds
        from flap_fast.tools.windows import WindowRows, chosen_crop, embed_cropped, time_text

    require(top >= 1, "--top", "be at least 1", top)
    from_file = "," not in labels and os.path.isfile(labels)
    text = read_text("--labels", labels) if from_file else labels.replace(",", "\n")
    names = distinct(name.strip() for name in text.splitlines() if name.strip())
    require(len(names) > 1, "--labels", "name at least two classes", labels)
    files = find_sounds(sounds)
    embedder = _open(model, length)
    vectors = embedder.embed_labels(names, template)
    bad = 0
    write = rows_writer(format, ("file", "start_s", "end_s", "class", "probability"))
    policy = chosen_crop(embedder.config, crop, windows)
    embedded = embed_cropped(embedder, files, batch, policy)
    # On a terminal the lines themselves show how far it is.
    with progress("classify", len(files), shown=not sys.stdout.isatty()) as advance:
        for file, found in zip(files, embedded, strict=True):
            advance()
            if isinstance(found, BadSound):
                bad += 1
                say(found, error=True)
                continue
            windowed = isinstance(found, WindowRows)
            spans_s = found.spans_s.tolist() if windowed else [None]
            rows = found.rows if windowed else found[None]
            best = embedder.probabilities(rows, vectors).topk(min(top, len(names)), dim=1)
            parts = (part.tolist() for part in best)
            for span_s, values, numbers in zip(spans_s, *parts, strict=True):
                when = f"{time_text(span_s)}\t" if span_s else ""
                for probability, n in zip(values, numbers, strict=True):
                    text = f"{visible(file)}\t{when}{visible(names[n])}\t{probability:.3f}"
                    write(text, (str(file), *(span_s or (None, None)), names[n], probability))
    if bad:
        say(f"{bad} of {len(files)} sounds cannot be read", error=True)
        raise typer.Exit(1)


def named_model(model: str | None) -> str | Path:
    """Return the given model, or the last trained run."""
    if model is not None:
        return model
    states = list(Path("runs").glob("*/checkpoints/step-*/state.json"))
    remedy = "name one with --model, or train one with: flap train CONFIG"
    require(bool(states), "runs/", "hold a trained model", "none", remedy)
    newest = max(states, key=lambda state: state.stat().st_mtime).parents[2]
    say(f"model: {newest}, the newest in runs/", error=True)
    return newest


def _open(model: str | None, length: str | None) -> Embedder:
    folder = named_model(model)
    with starting("open the model"):
        from flap_fast.tools.embedder import load

        return load(folder, length=length)


def rows_writer(format: str, columns: tuple[str, ...]) -> Callable[[str, tuple], None]:
    """Return a function that prints a row, given as text and as values: the one or the others."""
    if format == "text":
        return lambda text, _: say(text)
    if format == "csv":
        # Lines end as other commands' do; a name that is not UTF-8 is printed as its bytes.
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        return lambda _, values: writer.writerow(values)

    def line(_: str, values: tuple) -> None:
        row = {name: v for name, v in zip(columns, values, strict=True) if v is not None}
        say(json.dumps(row, ensure_ascii=True))

    return line


def index_file(audio: Path, windows: str | None) -> Path:
    """Return the default file of the index of a folder, or of a file's folder."""
    from flap_fast.tools.search import INDEX

    folder = audio if audio.is_dir() else audio.parent
    return folder / (INDEX if windows is None else f"{INDEX}-windows")


def updated_index(
    file: Path, audio: list[Path], embedder: Embedder, crop: str, batch: int
) -> Index:
    """Update the index of these sounds; prints progress and rejected sounds to stderr."""
    from flap_fast.tools.search import find_sounds, plan_update, update_index

    sounds = find_sounds(audio)
    file.parent.mkdir(parents=True, exist_ok=True)
    writable = os.access(file.parent, os.W_OK)
    rule = "be in a folder that can be written"
    require(writable, "the index", rule, file, "name another file with --index")
    update = plan_update(file, embedder, sounds, crop)
    if update.rebuild_reason:
        say(f"{file}: {update.rebuild_reason}; all sounds are embedded again", error=True)
    with progress("embed", len(update.new)) as advance:
        index = update_index(file, embedder, update, crop=crop, batch=batch, advance=advance)
    for rejected in index.rejected:
        say(rejected.error, error=True)
    if index.rejected:
        say(f"{len(index.rejected)} of {len(sounds)} sounds cannot be read", error=True)
        if len(index.rejected) == len(sounds):
            raise typer.Exit(1)
    return index
