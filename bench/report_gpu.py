"""The sections of RESULTS.md on what bench/gpu.py measures besides its sweep."""

from __future__ import annotations

from typing import Any

from bench.tables import markdown, number

Result = dict[str, Any]


def gpu_sections(result: Result) -> list[str]:
    """Tiles, workspaces, the launches of InfoNCE, training steps and what became of each step."""
    sections = []
    for name, (title, head, cells) in _TABLES.items():
        rows = result.get(name, [])
        if rows:
            sections += [f"### {title}\n", markdown([head, *map(cells, rows)]), ""]
    late = [record for record in result.get("steps", []) if record["status"] != "done"]
    if late:
        lines = [f"- {r['step']}: {r['status']} ({r['reason']})" for r in late]
        sections += ["Steps without a result, or with a part of it:", "", *lines, ""]
    return sections


def _time(row: dict[str, Any]) -> str:
    if row.get("median_ms") is None:
        return row.get("reason", "")
    spread = f"{number(row['low_ms'])}-{number(row['high_ms'])}"
    return f"{number(row['median_ms'])} ({spread})"


def _tile(row: dict[str, Any]) -> list[str]:
    return [
        row["kernel"],
        row["tile"] + (" (in use)" if row["in_use"] else ""),
        _time(row),
        f"{row['error']:.1e}" if row["error"] is not None else "",
        str(row["registers"] or ""),
        number(row["predicted_ms"]),
    ]


def _workspace(row: dict[str, Any]) -> list[str]:
    return [row["workspace"], _time(row), number(row["peak_mib"])]


def _launch(row: dict[str, Any]) -> list[str]:
    counts = [str(row["launches"]), number(row["ms"])]
    return [row["call"], f"`{row['kernel']}`", *counts, number(row["tflops"])]


def _step(row: dict[str, Any]) -> list[str]:
    if row.get("reason"):
        return [row["name"], row["reason"], "", "", "", ""]
    return [
        row["name"],
        number(row["step_ms"]),
        number(row["clips_per_s"]),
        number(row["tflops"]),
        f"{100 * row['utilisation']:.0f} %",
        number(row["peak_mib"]),
    ]


_TABLES = {
    "tiles": (
        "InfoNCE's and the sigmoid loss's tiles, 65,536, side by side",
        ["kernel", "tile", "ms", "error", "registers", "predicted ms, not measured"],
        _tile,
    ),
    "workspaces": (
        "InfoNCE, 65,536 x 512, forward + backward, by workspace",
        ["workspace", "ms", "peak MiB"],
        _workspace,
    ),
    "launches": (
        "What InfoNCE launches at 65,536 x 512, by PyTorch's profiler",
        ["call", "kernel", "launches", "ms", "TFLOP/s of a library product"],
        _launch,
    ),
    "training_steps": (
        "Training steps, `flap profile --synthetic`",
        ["config", "step ms", "clips/s", "TFLOP/s", "of the product", "peak MiB"],
        _step,
    ),
}
"""By their names in the result: title, head and a row's cells."""
