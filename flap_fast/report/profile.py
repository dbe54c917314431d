"""Figure of a profile: the parts of a step, each step, and memory by micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError


def profile_figure(folder: Path) -> Path:
    """Draw FOLDER/profile.json into FOLDER/profile.png.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures must have matplotlib; pip install 'flap_fast[report]'") from None
    found = json.loads((folder / "profile.json").read_text())
    # Profiles of before this name have the other.
    utilisation = found.get("utilisation", found.get("share_of_ceiling", 0.0))
    parts = [part for part, ms in found["parts_ms"].items() if ms > 0]
    colors = dict(zip(parts, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    trials = [t for t in found["micro_batch"].get("trials", ()) if t["fits"]]

    figure = Figure(figsize=(10, 7 if trials else 4.6), layout="constrained")
    figure.suptitle(
        f"{found['config']} on {found['device']}: {found['clips_per_s']:.1f} clips/s, "
        f"{utilisation:.0%} of the measured ceiling",
        fontsize=11,
        parse_math=False,
    )
    axes: Any = figure.subplots(2 if trials else 1, 2, squeeze=False)
    _draw_parts(axes[0, 0], found, parts, colors)
    _draw_steps(axes[0, 1], found, parts, colors)
    if trials:
        _draw_trials(axes[1, 0], axes[1, 1], trials, found["micro_batch"]["limit_bytes"])
    file = folder / "profile.png"
    figure.savefig(file, dpi=120)
    return file


def _draw_parts(axis: Any, found: dict[str, Any], parts: list[str], colors: Any) -> None:
    ms = [found["parts_ms"][part] for part in parts]
    bars = axis.barh(parts, ms, color=[colors[part] for part in parts])
    labels = [f"{value:.1f} ms, {value / found['step_ms']:.0%}" for value in ms]
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axis.margins(x=0.35)
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()
    axis.set_xlabel("ms of a step")
    axis.set_title(f"a step: {found['step_ms']:.1f} ms", fontsize=10)


def _draw_steps(axis: Any, found: dict[str, Any], parts: list[str], colors: Any) -> None:
    steps = found["steps_ms"]
    at, below = range(1, len(steps) + 1), [0.0] * len(steps)
    for part in parts:
        heights = [step[part] for step in steps]
        axis.bar(at, heights, bottom=below, color=colors[part], label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_xlabel("step")
    axis.set_ylabel("ms")
    axis.set_title("each step", fontsize=10)
    axis.legend(fontsize=7)


def _draw_trials(memory: Any, speed: Any, trials: list[dict[str, Any]], limit: int) -> None:
    trials = sorted(trials, key=lambda t: t["clips"])
    clips = [t["clips"] for t in trials]
    memory.plot(clips, [t["peak_bytes"] / 2**20 for t in trials], marker="o")
    memory.axhline(limit / 2**20, color="0.4", linestyle="--", label="available")
    memory.set_yscale("log")
    memory.set_ylabel("peak MiB")
    memory.legend(fontsize=8)
    speed.plot(clips, [t["clips_per_s"] for t in trials], marker="o")
    speed.set_ylabel("clips/s of a whole step, from a part")
    for axis in (memory, speed):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("clips of a micro-batch")
