"""The report's figures as SVG whose colors follow the page: light or dark.

matplotlib draws with a few marker colors; in the SVG they become CSS variables of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flap_fast.checks import ConfigError
from flap_fast.evaluate.flops import CLIPS, encoder_flops
from flap_fast.evaluate.retrieval import directions
from flap_fast.files import visible
from flap_fast.report.examples import RetrievalExamples
from flap_fast.report.run import RunFacts

# Marker colors and the page's variables that replace them.
_THEME = {"#0a0b0c": "var(--ink)", "#0a0b0d": "var(--faint)"}
_LINES = ("#0a1b01", "#0a1b02", "#0a1b03", "#0a1b04", "#0a1b05", "#0a1b06")
_THEME |= {color: f"var(--line-{number})" for number, color in enumerate(_LINES)}
_INK, _FAINT = list(_THEME)[:2]
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may have a $
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}

_NOUNS = {"audio": "sound"}


def _label(name: str) -> str:
    return visible(name.replace("_", " "), document=True)


def curves(run: RunFacts) -> dict[str, str]:
    """Curves over the steps, {title: SVG}."""
    terms = _terms(run)
    both = {"Loss and its terms": ["loss", *terms]} if len(terms) > 1 else {"Loss": ["loss"]}
    found = {title: _lines(run, names) for title, names in both.items()}
    scores = sorted({name for row in run.scored for name in row if name != "step"})
    for metric in ("R@10", "mAP@10"):
        names = [name for name in scores if name.endswith(f"/{metric}")]
        if names:
            found[f"Validation {metric}"] = _lines(run, names, within=(0, 1))
    found |= {
        "R@1 within the batch": _lines(run, ["in_batch_R@1"], within=(0, 1)),
        "Gradient norm": _lines(run, ["grad_norm"]),
        "Logit scale": _lines(run, ["scale"]),
        **({"Logit bias": _lines(run, ["bias"])} if "bias" in run.steps[-1] else {}),
        "Learning rate": _lines(run, ["lr"], within=(0, None)),
        "Throughput": _lines(run, ["clips_per_s"], "clips/s", within=(0, None)),
        "Fraction of a step that waits for data": _lines(run, ["data_wait"], within=(0, 1)),
        "Peak memory": _lines(run, ["peak_mib"], "MiB", within=(0, None)),
    }
    return found


def _terms(run: RunFacts) -> list[str]:
    """The terms of the run's loss: the columns between `loss` and `grad_norm`."""
    names = list(run.steps[-1])
    return names[names.index("loss") + 1 : names.index("grad_norm")]


def _lines(
    run: RunFacts,
    names: Sequence[str],
    unit: str = "",
    within: tuple[float | None, float | None] = (None, None),
) -> str:
    def draw(axis: Any) -> None:
        for number, name in enumerate(names):
            steps, values = run.column(name)
            few = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
            color = _LINES[number % len(_LINES)]
            axis.plot(steps, values, color=color, label=_label(name), **few)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.set_xlim(0, 1.03 * run.steps[-1]["step"])
        axis.set_ylim(*within)
        if len(names) > 1:
            axis.legend()

    return _svg("-".join(names), draw)


def similarity(examples: RetrievalExamples) -> str:
    """Cosines of clips (rows) with captions (columns), each clip's own on the diagonal."""

    def draw(axis: Any) -> None:
        image = axis.imshow(examples.similarity, cmap="viridis", interpolation="nearest")
        axis.grid(visible=False)
        axis.set_xlabel("caption of clip")
        axis.set_ylabel(f"{_NOUNS.get(examples.modality, examples.modality)} of clip")
        axis.figure.colorbar(image, ax=axis, label="cosine").outline.set_edgecolor(_FAINT)

    return _svg(f"similarity-{examples.name}", draw, size=(5.2, 4.4))


def alignment_over_uniformity(examples: RetrievalExamples) -> str:
    """A point for each side of each kept checkpoint; the last is filled."""

    def draw(axis: Any) -> None:
        for number, side in enumerate((examples.modality, "text")):
            found = sorted(examples.geometry.items())
            steps = [step for step, g in found if g[f"uniformity_{side}"] is not None]
            x = [examples.geometry[step][f"uniformity_{side}"] for step in steps]
            y = [examples.geometry[step]["alignment"] for step in steps]
            faces = ["none"] * (len(steps) - 1) + [_LINES[number]]
            axis.plot(x, y, color=_LINES[number], linewidth=0.8)
            axis.scatter(x, y, edgecolors=_LINES[number], facecolors=faces, label=side, zorder=3)
            for step, at, high in zip(steps, x, y, strict=True):
                offset = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(f"step {step}", (at, high), **offset)
        axis.margins(0.2)
        axis.set_xlabel("uniformity (lower: more even)")
        axis.set_ylabel("alignment (lower: pairs closer)")
        axis.legend()

    return _svg(f"geometry-{examples.name}", draw)


def recall_over_gflops(runs: Sequence[RunFacts], name: str) -> str:
    """R@1 on one validation set over the encoder's GFLOPs in training, as in FLAP's Figure 3.

    Args:
        runs: those of one modality that have scores of `name`; the report's own run first.
    """
    modality = runs[0].modality
    costs = {(run.name, run.folder): gflops(run) for run in runs}

    def draw(axis: Any) -> None:
        for number, direction in enumerate(reversed(directions(modality))):
            for run in runs:
                recall = run.scores["retrieval"][name][direction]["R@1"]
                label = {"label": direction.replace("_", " ")} if run is runs[0] else {}
                face = _LINES[number] if run is runs[0] else "none"
                at = (costs[run.name, run.folder], 100 * recall)
                axis.scatter(*at, edgecolors=_LINES[number], facecolors=face, zorder=3, **label)
                offset = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(run.name, at, **offset)
        axis.margins(0.25)
        axis.set_xlabel(f"GFLOPs of the {modality} encoder, {CLIPS} clips, as trained")
        axis.set_ylabel("R@1, %")
        axis.legend()

    return _svg(f"gflops-{name}", draw)


def gflops(run: RunFacts) -> float:
    """GFLOPs of the encoder's forward pass over 8 clips, masked as in training."""
    return encoder_flops(run.config, clips=CLIPS) / 1e9


def _svg(name: str, draw: Callable[[Any], None], size: tuple[float, float] = (4.4, 2.9)) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("reports must have matplotlib; pip install 'flap_fast[report]'") from None
    name = visible(name, document=True)
    with rc_context({**_STYLE, "svg.hashsalt": name}):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for marker, variable in _THEME.items():
        svg = svg.replace(marker, variable)
    # Several SVGs share one page: an id belongs to its figure.
    prefix = re.sub(r"\W", lambda sign: f"-{ord(sign[0]):x}-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # The page gives the width; the view box keeps the shape.
    return re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)


def spread(values: np.ndarray) -> str:
    """Median and range as a text."""
    return f"{np.median(values):,.1f} ({values.min():,.1f} to {values.max():,.1f})"
