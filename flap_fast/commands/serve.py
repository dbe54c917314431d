"""`flap serve`: a model and a folder of sounds over HTTP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from flap_fast.checks import require
from flap_fast.commands.length import LengthOption
from flap_fast.commands.use import Crop, Windows, index_file, named_model, updated_index
from flap_fast.files import say


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="The folder of a run, a checkpoint or a ClapModel, or hf://OWNER/NAME; by default "
            "the newest run in runs/.",
        ),
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="A folder of sounds to search.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    windows: Windows = None,
    crop: Crop = None,
    index: Annotated[
        Path | None, typer.Option(help="File of the embeddings, as of flap search.")
    ] = None,
    length: LengthOption = None,
    max_mib: Annotated[int, typer.Option(help="Largest request, in MiB.")] = 64,
    max_seconds: Annotated[float, typer.Option(help="Longest sound of a request.")] = 600.0,
) -> None:
    """Serve a model over HTTP: a page to search a folder of sounds, and an API."""
    for package in ("fastapi", "uvicorn", "python_multipart"):
        found = importlib.util.find_spec(package) is not None
        require(found, "flap serve", "have its packages", package, "pip install 'flap_fast[serve]'")
    require(max_mib >= 1, "--max-mib", "be at least 1", max_mib)
    require(0 < max_seconds <= 86400, "--max-seconds", "be in (0, 86400]", max_seconds)
    folder = audio is None or audio.is_dir()
    require(folder, "--audio", "be a folder", audio)
    for name, value in (("--windows", windows), ("--crop", crop), ("--index", index)):
        needless = audio is None and value is not None
        require(not needless, name, "be left out without --audio", value)
    from flap_fast.tools.serve import run

    with run.listening(host, port) as listener:  # its errors before the model is opened
        from flap_fast.tools.embedder import load
        from flap_fast.tools.serve.app import make_app
        from flap_fast.tools.serve.gate import Limits
        from flap_fast.tools.windows import chosen_crop

        embedder = load(named_model(model), length=length)
        modality = embedder.config.encoder.modality
        require(modality == "audio", "the model", "have an audio encoder", f"an {modality} encoder")
        sounds = None
        if audio is not None:
            policy = chosen_crop(embedder.config, crop, windows)
            sounds = updated_index(
                index or index_file(audio, windows), [audio], embedder, policy, 64
            )
        limits = Limits(body_bytes=max_mib * 2**20, sound_s=max_seconds)
        app = make_app(embedder, sounds, audio, limits, run.allowed_hosts(host))
        if not run.is_loopback(host):
            say(
                f"warning: {host} can be reached by others, and flap serve has no authentication",
                error=True,
            )
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{listener.getsockname()[1]}  (API: /docs; Ctrl-C ends it)", error=True)
        run.serve(app, listener)
