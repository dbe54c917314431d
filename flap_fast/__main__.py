"""The command `flap`; what it can do is in `flap --help`.

`python -m flap_fast` is the same, so that `deepspeed --module flap_fast train CONFIG` works.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flap_fast.checks import ConfigError
from flap_fast.commands import enrich, exchange, prepare, report, score, use

app = typer.Typer(
    name="flap",
    help="Contrastive language-audio pre-training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="As in mask.kind=1d.")
]


@app.callback()
def launched(
    local_rank: Annotated[
        int, typer.Option("--local_rank", hidden=True, help="From the deepspeed launcher.")
    ] = 0,
) -> None:
    """Contrastive language-audio pre-training."""
    # The launcher's environment says the same; its option only has to be accepted.


app.command()(prepare.prepare)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
) -> None:
    """Train, and score the result on data.val. Also under `deepspeed --module flap_fast`."""
    from flap_fast.config.file import load_config

    settings = load_config(config, overrides or [])
    from flap_fast.train.loop import Stopped
    from flap_fast.train.loop import train as run

    first = os.environ.get("RANK", "0") == "0"
    try:
        scores = run(settings, resume=resume)
    except Stopped as stopped:
        if first:
            tell(f"{stopped}. Go on with the same command and --resume")
        raise typer.Exit(130) from None
    if first:
        if scores is not None:
            score.print_scores(scores)
        print(f"{settings.run_folder}: the run is complete (flap eval {settings.run_folder} DATA)")


app.command("eval")(score.evaluate)
app.command()(enrich.enrich)
app.command()(use.embed)
app.command()(use.search)
app.command()(use.classify)
app.command()(report.report)
app.command("import")(exchange.import_)
app.command()(exchange.export)


@app.command()
def rank(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint's.")],
    sound: Annotated[Path, typer.Argument(help="A sound file.")],
    captions: Annotated[list[str], typer.Argument(help="What it may be.")],
) -> None:
    """Print captions by their cosine to a sound, best first."""
    from flap_fast.tools.embedder import load

    for caption, cosine in load(checkpoint).rank(sound, captions):
        print(f"{cosine:6.3f}  {caption}")


@app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("masking.png"),
    sound: Annotated[Path | None, typer.Option(help="A sound; else a clip of data.train.")] = None,
    clip: Annotated[int, typer.Option(help="Which clip of data.train.")] = 0,
) -> None:
    """Draw a log-mel and the patches of it that masking keeps."""
    from flap_fast.config.file import load_config
    from flap_fast.report.masking import masking_figure

    print(masking_figure(load_config(config, overrides or []), out, sound=sound, clip=clip))


@app.command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps measured, after a warm-up.")] = 10,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Random batches: needs no shards, no text.folder.")
    ] = False,
    search: Annotated[
        bool, typer.Option(help="Look for the largest micro-batch that fits (30 s).")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="RUN/profile when not given.")] = None,
) -> None:
    """Measure where a training step goes: parts, memory, FLOP/s; a trace and a picture."""
    # PyTorch's profiler would tell of the devices that are not here, on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from flap_fast.config.file import load_config
    from flap_fast.report.profile import profile_figure
    from flap_fast.tools.profile.measure import profile as measure
    from flap_fast.tools.profile.tables import profile_table

    settings = load_config(config, overrides or [])
    found = measure(settings, steps=steps, synthetic=synthetic, search=search, out=out)
    if found is None:
        return
    Console().print(profile_table(found), highlight=False)
    folder = out or settings.run_folder / "profile"
    try:
        profile_figure(folder)
    except ConfigError as error:
        tell(f"no profile.png: {error}")
    print(f"written to {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Ranks, over all nodes: 8 when not given, with train.engine=plain 1."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    link: Annotated[str, typer.Option(help="What a rank sends between nodes.")] = "50GB/s",
    local_link: Annotated[str, typer.Option(help="The same inside of a node.")] = "400GB/s",
    tflops: Annotated[float, typer.Option(help="The most a rank does, in 10^12 FLOP/s.")] = 790,
    mfu: Annotated[float, typer.Option(help="Utilisation: the fraction a step sustains.")] = 0.5,
    share: Annotated[float | None, typer.Option(hidden=True, help="Old name of --mfu.")] = None,
    memory_gib: Annotated[float, typer.Option(help="Of a GPU.")] = 80,
    memory_rate: Annotated[str, typer.Option(help="Read and written.")] = "3000GB/s",
    host_rate: Annotated[str, typer.Option(help="CPU memory of a rank (offload).")] = "25GB/s",
    host_link: Annotated[str, typer.Option(help="From a GPU to it (offload).")] = "50GB/s",
    caption_tokens: Annotated[int, typer.Option(help="Computed for each, padding included.")] = 24,
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON, too.")] = None,
) -> None:
    """Predict memory, communication and time of a step on GPUs that are not here."""
    from flap_fast.config.file import load_config
    from flap_fast.tools.profile.plan import Machine, as_json, default_gpus, parse_rate
    from flap_fast.tools.profile.plan import plan as predict
    from flap_fast.tools.profile.tables import plan_table

    settings = load_config(config, overrides or [])
    machine = Machine(
        gpus=default_gpus(settings) if gpus is None else gpus,
        nodes=nodes,
        tflops=tflops,
        mfu=mfu if share is None else share,
        link_bytes_per_s=parse_rate("--link", link),
        local_bytes_per_s=parse_rate("--local-link", local_link),
        memory_gib=memory_gib,
        memory_bytes_per_s=parse_rate("--memory-rate", memory_rate),
        host_bytes_per_s=parse_rate("--host-rate", host_rate),
        host_link_bytes_per_s=parse_rate("--host-link", host_link),
        caption_tokens=caption_tokens,
    )
    planned = predict(settings, machine)
    Console().print(plan_table(planned), highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(as_json(planned), indent=1) + "\n")
        print(f"written to {out}")
    if not planned.fits:
        tell(planned.remedy())
        raise typer.Exit(1)


@config_app.command("show")
def config_show(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; the defaults without.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print every setting in force."""
    from flap_fast.config.file import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


def tell(message: str) -> None:
    """A line for a person, on stderr; which rank says it, if there are several."""
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    print(message if world == "1" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command; what a user can mend is told in a sentence, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files, whatever bytes they are
    try:
        app()
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # a node may lack what the others have
            tell(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        tell(f"error: {error}; what was complete before it is still there")
        sys.exit(1)
    except (ValueError, ArithmeticError) as error:
        from flap_fast.data.preprocess.waveform import Unusable
        from flap_fast.data.shards import ShardError
        from flap_fast.files import ManifestError

        known = (ManifestError, ShardError, Unusable, ArithmeticError)
        if not isinstance(error, known):
            raise  # a fault of ours: with its traceback
        tell(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
