"""The report's figures as SVG whose colors follow the page: light or dark.

matplotlib draws with a few marker colors; in the SVG they become CSS variables of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from flap_fast.checks import ConfigError
from flap_fast.evaluation.flops import CLIPS, encoder_flops
from flap_fast.evaluation.retrieval import directions
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
    "font.size": 10,
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
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}

# Scores on data.val whose curves resemble others'.
_LEFT_OUT = ("R@1", "R@5", "mAP@16", "top_5")

_NOUNS = {"audio": "sound"}


class Figure(NamedTuple):
    """A figure under its title, or the numbers where there is no curve to draw."""

    title: str
    svg: str = ""
    numbers: Sequence[tuple[str, str]] = ()
    note: str = ""


class Curve(NamedTuple):
    """What one figure draws over the steps."""

    title: str
    unit: str
    names: Sequence[str]
    """Columns of metrics.jsonl."""
    within: tuple[float | None, float | None] = (None, None)
    """Limits of the axis of values."""

    @property
    def factor(self) -> float:
        """Fractions are shown in percent, on the whole page."""
        return 100 if self.unit == "%" else 1


def curves(run: RunFacts) -> list[Figure]:
    """Curves over the steps."""
    terms = _terms(run)
    both = Curve("Loss and its terms", "", ["loss", *terms])
    wanted = [both if len(terms) > 1 else Curve("Loss", "", ["loss"])]
    scores = [name for row in run.scored for name in row if "/" in name]
    for metric in dict.fromkeys(name.rpartition("/")[2] for name in scores):
        names = sorted({name for name in scores if name.endswith(f"/{metric}")})
        title = f"{metric.replace('_', ' ')} on data.val"
        if metric.startswith(("R@", "mAP", "top_")):
            wanted += [] if metric in _LEFT_OUT else [Curve(title, "%", names, (0, 100))]
        else:
            wanted.append(Curve(title, "", names))
    recall = Curve("R@1 within a batch", "%", ["in_batch_R@1"], (0, 100))
    wanted += [
        *([recall] if "in_batch_R@1" in run.steps[-1] else []),  # not without captions
        Curve("Gradient norm", "", ["grad_norm"]),
        Curve("Logit scale", "", ["scale"]),
        *([Curve("Logit bias", "", ["bias"])] if "bias" in run.steps[-1] else []),
        Curve("Learning rate", "", ["lr"], (0, None)),
        Curve("Throughput", "clips/s", ["clips_per_s"], (0, None)),
        Curve("Time that waits for data", "%", ["data_wait"], (0, 100)),
        Curve("Peak memory of a rank", "MiB", ["peak_mib"], (0, None)),
    ]
    return [_figure(run, curve) for curve in wanted]


def _terms(run: RunFacts) -> list[str]:
    """The terms of the run's loss: the columns between `loss` and `grad_norm`."""
    names = list(run.steps[-1])
    return names[names.index("loss") + 1 : names.index("grad_norm")]


def _figure(run: RunFacts, curve: Curve) -> Figure:
    series = {_series(name): run.column(name) for name in curve.names}
    series = {name: (steps, curve.factor * y) for name, (steps, y) in series.items() if len(steps)}
    title = curve.title + (f", {curve.unit}" if curve.unit else "")
    if all(len(steps) == 1 for steps, _ in series.values()):
        numbers = [(name, _number(y[0], curve.unit)) for name, (_, y) in series.items()]
        at = sorted({int(steps[0]) for steps, _ in series.values()})
        return Figure(curve.title, "", numbers, f"At step {', '.join(map(str, at))}.")
    last = ", ".join(
        f"{name} from {_number(y[0], curve.unit)} to {_number(y[-1], curve.unit)}"
        for name, (_, y) in series.items()
    )

    def draw(axis: Any) -> None:
        for number, (name, (steps, values)) in enumerate(series.items()):
            few = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
            axis.plot(steps, values, color=_LINES[number % len(_LINES)], label=name, **few)
        axis.set_xlabel("step")
        axis.set_xlim(0, 1.03 * run.steps[-1]["step"])
        axis.set_ylim(*curve.within)
        if len(series) > 1:
            axis.legend()

    return Figure(title, _svg("-".join(curve.names), f"{title} by step: {last}", draw))


def _series(name: str) -> str:
    """A column as a legend says it; of scores, without the metric, which the title has."""
    *data, direction, _ = name.split("/") if name.count("/") > 1 else (name, "")
    data_set = f"{'/'.join(data)}: " if data else ""
    return visible(data_set + direction.replace("_", " "), document=True)


def _number(value: float, unit: str) -> str:
    digits = {"%": ".2f", "MiB": ",.0f", "clips/s": ",.0f"}.get(unit, ".4g")
    return f"{value:{digits}}" + (f" {unit}" if unit else "")


def of_examples(examples: RetrievalExamples) -> list[Figure]:
    """Similarities of a validation set, and alignment and uniformity of the kept checkpoints."""
    found = [similarity(examples)]
    if len(examples.geometry) > 1:
        found.append(alignment_over_uniformity(examples))
    elif examples.geometry:
        (one,) = examples.geometry.values()
        numbers = [(n.replace("_", " "), f"{v:.3f}") for n, v in one.items() if v is not None]
        found.append(Figure("Alignment and uniformity", "", numbers, _GEOMETRY))
    return found


def similarity(examples: RetrievalExamples) -> Figure:
    """Cosines of clips (rows) with captions (columns), each clip's own on the diagonal."""
    noun = _NOUNS.get(examples.modality, examples.modality)
    title = f"Similarity of {len(examples.similarity)} {noun}s and captions"
    note = (
        f"Each {noun}'s own caption lies on the diagonal, which is bright where the model is right."
    )

    def draw(axis: Any) -> None:
        image = axis.imshow(examples.similarity, cmap="viridis", interpolation="nearest")
        axis.grid(visible=False)
        axis.set_xlabel("caption of clip")
        axis.set_ylabel(f"{noun} of clip")
        axis.figure.colorbar(image, ax=axis, label="cosine").outline.set_edgecolor(_FAINT)

    diagonal = examples.similarity.diagonal().mean()
    alt = f"{title}: mean cosine {examples.similarity.mean():.3f}, on the diagonal {diagonal:.3f}"
    svg = _svg(f"similarity-{examples.name}", alt, draw, size=(4.4, 3.7))
    return Figure(title, svg, note=note)


_GEOMETRY = (
    "Of embeddings on the unit sphere. Lower alignment: pairs lie closer. Lower uniformity: all of "
    "them are spread more evenly."
)


def alignment_over_uniformity(examples: RetrievalExamples) -> Figure:
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
                offset = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 9}
                axis.annotate(f"step {step}", (at, high), **offset)
        axis.margins(0.2)
        axis.set_xlabel("uniformity")
        axis.set_ylabel("alignment")
        axis.legend()

    title = "Alignment and uniformity of the kept checkpoints"
    steps = ", ".join(str(step) for step in sorted(examples.geometry))
    svg = _svg(f"geometry-{examples.name}", f"{title}, of steps {steps}", draw, size=(4.4, 3.7))
    return Figure(title, svg, note=_GEOMETRY)


def recall_over_gflops(runs: Sequence[RunFacts], name: str) -> Figure:
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
                offset = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 9}
                axis.annotate(run.name, at, **offset)
        axis.margins(0.25)
        axis.set_xlabel(f"GFLOPs of the {modality} encoder, {CLIPS} clips, as trained")
        axis.set_ylabel("R@1, %")
        axis.legend()

    title = f"R@1 on {name} over the {modality} encoder's GFLOPs"
    alt = f"{title}: {', '.join(run.name for run in runs)}"
    return Figure(title, _svg(f"gflops-{name}", alt, draw))


def gflops(run: RunFacts) -> float:
    """GFLOPs of the encoder's forward pass over 8 clips, masked as in training."""
    return encoder_flops(run.config, clips=CLIPS) / 1e9


def _svg(
    name: str, alt: str, draw: Callable[[Any], None], size: tuple[float, float] = (4.4, 2.8)
) -> str:
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
    label = escape(visible(alt, document=True))
    start = re.search(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", svg)
    assert start
    return f'<svg {start[1]} role="img" aria-label="{label}">{svg[start.end() :]}'
