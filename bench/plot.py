"""A small SVG of lines over batch size, both axes logarithmic: no plotting library needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEGEND = 330, 260, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 28, 40
# Okabe and Ito's colours, told apart by colour-blind eyes too; ours comes first and is black.
_COLOURS = ("#000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999")
_DASHES = ("", "5 3", "2 2")


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `lines` by name."""

    title: str
    lines: Mapping[str, Points]


def svg(panels: Sequence[Panel], x_label: str) -> str:
    """The panels side by side, one legend at the right for all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    width = _WIDTH * len(panels) + _LEGEND
    height = max(_HEIGHT, _TOP + 16 * len(names) + 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts.append(
            f'<g transform="translate({i * _WIDTH} 0)">{_panel(panel, names, x_label)}</g>'
        )
    for i, name in enumerate(names):
        x, y = _WIDTH * len(panels), _TOP + 16 * i
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" {_pen(i)}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, names: list[str], x_label: str) -> str:
    points = [point for line in panel.lines.values() for point in line if min(point) > 0]
    title = f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>'
    if not points:
        return title + f'<text x="{_LEFT}" y="{_TOP + 14}">nothing measured</text>'
    x = _Axis.over([p[0] for p in points], _LEFT, _WIDTH - _RIGHT)
    y = _Axis.over([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [title]
    for value in y.ticks():
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#ddd"/><text x="{_LEFT - 5}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    for value in sorted({p[0] for p in points}):
        at = f'x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 14}"'
        parts.append(f'<text {at} text-anchor="middle">{_short(value)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for name, line in panel.lines.items():
        at = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(line) if min(a, b) > 0)
        pen = _pen(names.index(name))
        parts.append(f'<polyline points="{at}" {pen}><title>{escape(name)}</title></polyline>')
        for a, b in line:
            if min(a, b) > 0:
                parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5" {pen}/>')
    return "".join(parts)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    first: float
    last: float

    @classmethod
    def over(cls, values: Sequence[float], first: float, last: float) -> _Axis:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.08 * (high - low), 0.1)
        return cls(low - room, high + room, first, last)

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1,) if self.high - self.low > 2 else (1, 2, 5)
        every = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in every if self.low <= math.log10(value) <= self.high]


def _pen(i: int) -> str:
    dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{_COLOURS[i % len(_COLOURS)]}" fill="none" stroke-width="1.5"{dashed}'


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 8192 and value % 1024 == 0 else f"{value:g}"
