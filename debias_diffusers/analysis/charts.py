"""Charts as inline SVG whose colours follow the page, dark or light, with their numbers beside them for the page's script."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from .figures import Curve, Scale

WIDTH, HEIGHT = 400, 236  # of the SVG's own units, about its size in pixels: columns of charts are some 400 pixels wide
LEFT, RIGHT, TOP, BOTTOM = 54, 382, 10, 200  # of the area within the axes
MARGIN = 0.04  # of the y axis, below and above the lines
COLOURS = 8  # of lines of runs, in the style sheet of the page; further runs repeat them with another dash pattern
LOG_FROM = 8.0  # the ratio of largest to smallest value from which a scale is logarithmic

Palette = Literal["run", "part"]  # a colour for each run, or a sequence of colours for parts of the timesteps


def scale_of(lines: Mapping[str, Curve]) -> Scale:
    """Logarithmic where all values are above 0, as their bands are, and differ by more than `LOG_FROM`."""
    values = [value for line in lines.values() for value in line.y]
    bands = [value for line in lines.values() for value in line.low]
    return "log" if values and min(values + bands) > 0 and max(values) / min(values) > LOG_FROM else "linear"


def colour_class(place: int, palette: Palette = "run") -> str:
    """The classes of the style sheet for line number `place`."""
    dash = f" dash{place // COLOURS % 4}" if palette == "run" else ""
    return f"{palette}{place % COLOURS if palette == 'run' else place}{dash}"


def swatch(place: int, palette: Palette = "run") -> str:
    """A short piece of the line, for a legend."""
    return (
        f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="line {colour_class(place, palette)}" d="M0 4H24"/></svg>'
    )


def chart(
    title: str, lines: Mapping[str, Curve], places: Mapping[str, int], x_label: str, scale: Scale, note: str = "", palette: Palette = "run"
) -> str:
    """A figure of HTML.

    Args:
        title: above it.
        lines: by label, of finite values, which on a logarithmic scale are above 0; at least one has a point.
        places: the number of the colour of each label, which is that of other charts of the page, too.
        x_label: what the x axis has.
        scale: of the y axis.
        note: text below it.
        palette: of the colours.
    """
    shown = {label: line for label, line in lines.items() if line.x}
    x_axis = _Axis([x for line in shown.values() for x in line.x], "linear", LEFT, RIGHT)
    y_axis = _Axis([y for line in shown.values() for y in (*line.y, *line.low, *line.high)], scale, BOTTOM, TOP)
    drawn = [*_frame(x_axis, y_axis, x_label)]
    drawn += [_band(line, x_axis, y_axis, colour_class(places[label], palette)) for label, line in shown.items() if line.low]
    drawn += [_line(line, x_axis, y_axis, colour_class(places[label], palette)) for label, line in shown.items()]
    data = {
        "x": x_label,
        "axes": [[*x_axis.ends, LEFT, RIGHT], [*y_axis.ends, BOTTOM, TOP]],
        "log": scale == "log",
        "lines": [
            {"label": label, "colour": colour_class(places[label], palette), "x": list(line.x), "y": [_rounded(y) for y in line.y]}
            for label, line in shown.items()
        ],
    }
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    said = html.escape(f"{title}. {'. '.join(_summary(label, line, x_label) for label, line in shown.items())}")
    log = ' <span class="faint">(log scale)</span>' if scale == "log" else ""
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return (
        f'<figure class="chart"><h3>{html.escape(title)}{log}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{said}">{"".join(drawn)}<g class="cursor"></g></svg>'
        f'<p class="readout" aria-live="polite"></p><figcaption>{below}</figcaption>'
        f'<script type="application/json">{numbers}</script></figure>'
    )


class _Axis:
    """From values to units of the SVG."""

    def __init__(self, values: Sequence[float], scale: Scale, begin: float, end: float) -> None:
        low, high, whole = min(values), max(values), all(value == int(value) for value in values)
        if scale == "log":
            margin = max((high / low) ** MARGIN, 1.02)
            low, high = low / margin, high * margin
            found = LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=12).tick_values(low, high)
        else:
            margin = (MARGIN * (high - low) if begin > end else 0.0) or (0.0 if high > low else abs(low) / 10 or 1.0)
            low, high = low - margin, high + margin
            found = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
        self.scale, self.begin, self.end = scale, begin, end
        self.ends = (float(low), float(high))
        self.ticks = [float(tick) for tick in found if low <= tick <= high]

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (math.log(each) if self.scale == "log" else each for each in (*self.ends, value))
        return round(self.begin + (value - low) / (high - low) * (self.end - self.begin), 1)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    """Grid lines, numbers at the axes, and the label of the x axis."""
    return [
        *(f'<path class="rule" d="M{LEFT} {y_axis.at(tick)}H{RIGHT}"/>' for tick in y_axis.ticks),
        *(f'<text x="{LEFT - 6}" y="{y_axis.at(tick) + 4:.1f}" class="end">{_tick(tick)}</text>' for tick in y_axis.ticks),
        *(f'<text x="{x_axis.at(tick)}" y="{BOTTOM + 16}" class="middle">{_tick(tick)}</text>' for tick in x_axis.ticks),
        f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>',
        f'<text x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 6}" class="middle">{html.escape(x_label)}</text>',
    ]


def _tick(value: float) -> str:
    """A number in at most seven characters."""
    if 0 < abs(value) < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        text = f"{float(digits):g}e{int(exponent)}"
    else:
        text = f"{value:.6g}"
    return text.replace("-", "−")


def _line(line: Curve, x_axis: _Axis, y_axis: _Axis, colour: str) -> str:
    points = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(line.x, line.y)]
    if len(points) == 1:
        return f'<circle class="dot {colour}" cx="{points[0][0]}" cy="{points[0][1]}" r="3"/>'
    return f'<polyline class="line {colour}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def _band(line: Curve, x_axis: _Axis, y_axis: _Axis, colour: str) -> str:
    edge = [*zip(line.x, line.high), *reversed([*zip(line.x, line.low)])]
    return f'<polygon class="band {colour}" points="{" ".join(f"{x_axis.at(x)},{y_axis.at(y)}" for x, y in edge)}"/>'


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _summary(label: str, line: Curve, x_label: str) -> str:
    """A line in words, for those who do not see it."""
    return f"{label}: {line.y[0]:.4g} at {x_label} {line.x[0]:g}, {line.y[-1]:.4g} at {line.x[-1]:g}"
