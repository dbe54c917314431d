"""The command `flap`; see `flap --help`.

`python -m flap_fast` is the same, so that `deepspeed --module flap_fast train CONFIG` works.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flap_fast import __version__
from flap_fast.checks import ConfigError, require
from flap_fast.commands import doctor, enrich, exchange, prepare, report, score, serve, train, use
from flap_fast.commands.errors import print_and_status, print_error
from flap_fast.commands.length import LengthOption
from flap_fast.commands.usage import Command, Commands
from flap_fast.files import say, visible
from flap_fast.progress import starting

app = typer.Typer(
    name="flap",
    cls=Commands,
    help="Contrastive language-audio pre-training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Print settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
command = partial(app.command, cls=Command)

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=VALUE]...", help="Settings to change, such as mask.kind=1d."),
]
Lengths = Annotated[
    Path | None,
    typer.Option(
        help="With audio.length=variable: a file of clips' seconds, one a line, or a manifest of "
        "JSON lines with duration_s; without, those of data.train, or WavCaps-like ones."
    ),
]


def print_version(wanted: bool) -> None:
    """Print the version and exit, if wanted."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=print_version, help="Print the version and exit."
        ),
    ] = False,
    local_rank: Annotated[
        int, typer.Option("--local_rank", hidden=True, help="Set by the deepspeed launcher.")
    ] = 0,
) -> None:
    """Contrastive language-audio pre-training."""
    # The launcher sets LOCAL_RANK too; its option only has to be accepted.


command()(prepare.prepare)
command()(doctor.doctor)


command()(train.train)
command("eval")(score.evaluate)
command()(enrich.enrich)
command()(use.embed)
command()(use.search)
command()(use.classify)
command()(serve.serve)
command()(report.report)
command("import")(exchange.import_)
command()(exchange.export)


@command()
def rank(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="The folder of a run, a checkpoint or a ClapModel, or hf://OWNER/NAME."
        ),
    ],
    sound: Annotated[Path, typer.Argument(help="A sound file.")],
    captions: Annotated[list[str], typer.Argument(help="Captions to rank.")],
    length: LengthOption = None,
) -> None:
    """Rank captions by their cosine similarity to a sound, best first."""
    with starting("open the model"):
        from flap_fast.tools.embedder import load

        embedder = load(checkpoint, length=length)
    for caption, cosine in embedder.rank(sound, captions):
        say(f"{cosine:6.3f}  {visible(caption)}")


@command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("masking.png"),
    sound: Annotated[
        Path | None, typer.Option(help="A sound file; a clip of data.train by default.")
    ] = None,
    clip: Annotated[int, typer.Option(help="Number of the clip in data.train.")] = 0,
) -> None:
    """Plot a log-mel spectrogram and the patches that masking keeps."""
    from flap_fast.config.file import load_config
    from flap_fast.report.masking import masking_figure

    say(masking_figure(load_config(config, overrides or []), out, sound=sound, clip=clip))


@command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps to measure, after a warm-up.")] = 10,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic", help="Use random batches: no shards and no text.folder needed."
        ),
    ] = False,
    search: Annotated[
        bool, typer.Option(help="Search for the largest micro-batch that fits (30 s).")
    ] = True,
    lengths: Lengths = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; RUN/profile by default.")] = None,
) -> None:
    """Profile a training step: time per part, memory, FLOP/s, a trace and a figure."""
    # Without these, PyTorch's profiler warns about absent devices on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from flap_fast.config.file import load_config
    from flap_fast.report.profile import profile_figure
    from flap_fast.tools.profile.lengths import length_mix
    from flap_fast.tools.profile.measure import profile as measure
    from flap_fast.tools.profile.tables import profile_table

    settings = load_config(config, overrides or [])
    rule, remedy = "be left out without --synthetic", "the clips of data.train have their own"
    require(synthetic or lengths is None, "--lengths", rule, lengths, remedy)
    mix = length_mix(settings, lengths)
    found = measure(settings, steps=steps, synthetic=synthetic, mix=mix, search=search, out=out)
    if found is None:
        return
    Console().print(profile_table(found), highlight=False)
    folder = out or settings.run_folder / "profile"
    try:
        profile_figure(folder)
    except ConfigError as error:
        print_error(f"no profile.png: {error}")
    say(f"written to {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


@command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="GPUs (ranks) of all nodes; without: 8, or 1 with train.engine=plain."),
    ] = None,
    nodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
    link: Annotated[str, typer.Option(help="Bandwidth of a rank between nodes.")] = "50GB/s",
    local_link: Annotated[str, typer.Option(help="Bandwidth of a rank inside a node.")] = "400GB/s",
    tflops: Annotated[float, typer.Option(help="Peak of a GPU, in TFLOP/s.")] = 790,
    mfu: Annotated[
        float, typer.Option(help="Fraction of the peak that a step sustains (utilisation).")
    ] = 0.5,
    share: Annotated[float | None, typer.Option(hidden=True, help="Old name of --mfu.")] = None,
    memory_gib: Annotated[float, typer.Option(help="Memory of a GPU, in GiB.")] = 80,
    memory_rate: Annotated[str, typer.Option(help="Memory bandwidth of a GPU.")] = "3000GB/s",
    host_rate: Annotated[
        str, typer.Option(help="CPU memory bandwidth of a rank (offload).")
    ] = "25GB/s",
    host_link: Annotated[
        str, typer.Option(help="Bandwidth between GPU and CPU (offload).")
    ] = "50GB/s",
    caption_tokens: Annotated[
        int, typer.Option(help="Tokens of a caption, padding included.")
    ] = 24,
    lengths: Lengths = None,
    out: Annotated[Path | None, typer.Option(help="Also write the plan as JSON.")] = None,
) -> None:
    """Predict memory, communication and time of a step on GPUs you do not have yet."""
    from flap_fast.config.file import load_config
    from flap_fast.tools.profile.lengths import length_mix
    from flap_fast.tools.profile.plan import Machine, as_json, default_gpus, parse_rate
    from flap_fast.tools.profile.plan import plan as predict
    from flap_fast.tools.profile.tables import plan_table

    if share is not None:
        print_error("--share is now called --mfu")
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
    planned = predict(settings, machine, length_mix(settings, lengths))
    Console().print(plan_table(planned), highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(as_json(planned), indent=1) + "\n")
        say(f"written to {out}")
    if not planned.fits:
        print_error(planned.remedy())
        raise typer.Exit(1)


@config_app.command("show", cls=Command)
def config_show(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; the defaults if not given.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print every setting and its value."""
    from flap_fast.config.file import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


def main() -> None:
    """Run the command; errors that a user can fix are printed without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names may be any bytes
    # At its end Python would look several times for garbage among all objects.
    atexit.register(gc.freeze)
    try:
        app()
    except Exception as error:
        sys.exit(print_and_status(error))


if __name__ == "__main__":
    main()
