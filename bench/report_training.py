"""RESULTS.md's sections on training: ablations, micro-batches' memory, README's numbers."""

from __future__ import annotations

from bench.tables import facts, markdown, number
from bench.targets import Result


def ablation(result: Result) -> str:
    """Systems against one another on the demo's sounds."""
    name = result["kind"].removeprefix("ablation_")
    return "\n".join(
        [
            f"## Ablation of {name} on the demo's sounds: {result['machine']['device']}\n",
            facts(result["machine"]) + ".\n",
            f"`python -m bench.ablation {name}`: {result['steps']} steps, seeds "
            f"{', '.join(map(str, result['seeds']))}, scored once at the end on 64 clips, "
            "where one clip is 1.6 points. Mean over seeds and, in brackets, the lowest and the "
            "highest. A difference within that spread says nothing.\n",
            ablation_table(result),
            "",
            *([f"{result['note']}\n"] if "note" in result else []),
        ]
    )


def ablation_table(result: Result) -> str:
    """Scores in percent with their spread over seeds, and the cost of each system."""
    metrics = list(result["rows"][0]["scores"][0])
    rows = [["system", *metrics, "GFLOP a clip", "clips/s, one thread"]]
    for row in result["rows"]:
        cells = []
        for metric in metrics:
            values = [100 * score[metric] for score in row["scores"]]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f} ({min(values):.1f}-{max(values):.1f})")
        rows.append([row["system"], *cells, f"{row['gflops']:.3f}", number(row["clips_per_s"])])
    return markdown(rows)


def lengths_mix(result: Result) -> str:
    """Packed clips and captions against padded ones."""
    head = "clips, layout, GFLOP a clip, s of sound a clip, GFLOP a s of sound, ms a step"
    rows = [[*head.split(", "), "packed FLOP / its", "packed time / its"]]
    for row in result["rows"]:
        for layout, found in row["layouts"].items():
            spread = f" ({number(found['least_ms'])}-{number(found['most_ms'])})"
            rows.append(
                [
                    row["mix"],
                    layout.replace(",", " and"),
                    number(found["gflop_per_clip"]),
                    f"{found['sound_s']:.1f}",
                    number(found["gflop_per_clip"] / found["sound_s"]),
                    number(found["step_ms"]) + spread,
                    f"{found['packed_flop']:.2f}",
                    f"{found['packed_time']:.2f}",
                ]
            )
    tokens = result["rows"][0]["tokens_per_caption"]
    return "\n".join(
        [
            f"## Lengths of clips and captions: {result['machine']['device']}\n",
            facts(result["machine"]) + ".\n",
            f"`python -m bench.lengths_mix`: training steps on {result['batch']} clips, captions "
            f"of {result['captions']} ({tokens:.1f} tokens on average). FLOP of ViT-B and "
            f"RoBERTa-base, over {result['counted']} batches; {result['clock']} time of small "
            f"towers, median of {result['rounds']} rounds, in brackets the least and the most. "
            "`10 s and 77` crops longer clips and repeats shorter ones.\n",
            markdown(rows),
            "",
            *([f"{result['note']}\n"] if "note" in result else []),
        ]
    )


def microbatch_memory(result: Result) -> str:
    """Peak memory of micro-batches over batch sizes and ranks."""
    rows = [["ranks", "global batch", "train.replay", "peak MiB above what was loaded"]]
    for row in result["rows"]:
        cells = row["ranks"], row["global_batch"], row["replay"], number(row["peak_mib"])
        rows.append([str(cell) for cell in cells])
    figures = "; ".join(f"{name}: {value:.3f}" for name, value in result["figures"].items())
    return "\n".join(
        [
            f"## Memory of micro-batches: {result['machine']['device']}\n",
            facts(result["machine"]) + ".\n",
            "`python -m bench.microbatch_memory`: training steps of tiny towers in micro-batches "
            f"of {result['micro_batch']}, the rank that took most.\n",
            markdown(rows),
            "",
            f"Peak memory of {figures}.\n",
        ]
    )


def reproduced(result: Result) -> str:
    """Numbers that a command of README.md printed."""
    name = result["kind"].removeprefix("reproduce_")
    by = result.get("by", f"bench.reproduce {name}")
    return "\n".join(
        [
            f"## README, {name}: {result['machine']['device']}\n",
            facts(result["machine"]) + ".\n",
            f"`{result['command']}`, by `python -m {by}`:\n",
            markdown(result["table"]),
            "",
        ]
    )
