"""Figures of an analysis: curves with intervals, and mosaics of images, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from ..evaluation.plots import as_shown, png_of

Scale = Literal["linear", "log"]
CELL = 0.62  # inches of a picture in a mosaic


@dataclass(frozen=True)
class Curve:
    """Points of a line, with intervals where both ends are given."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def curves(
    panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, x_scale: Scale = "linear", y_scale: Scale = "linear"
) -> bytes:
    """Panels below each other, by title, with the curves of the same labels in the same colours."""
    figure = Figure(figsize=(6, 0.6 + 2.7 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (title, labelled) in zip(axes, panels.items()):
        for k, (label, curve) in enumerate(labelled.items()):
            panel.plot(curve.x, curve.y, marker="o", markersize=3, linewidth=1.4, color=f"C{k}", label=as_shown(label))
            if curve.low:
                panel.fill_between(curve.x, curve.low, curve.high, color=f"C{k}", alpha=0.2, linewidth=0)
        panel.set(title=title, ylabel=y_label, xscale=x_scale, yscale=y_scale)
        panel.grid(alpha=0.3)
        if y_scale == "linear" and _both_signs(labelled):
            panel.axhline(0, color="black", linewidth=0.8)
    if x_scale == "log":
        _show_as_numbers(axes[-1], sorted({x for labelled in panels.values() for curve in labelled.values() for x in curve.x}))
    axes[-1].set_xlabel(x_label)
    axes[0].legend(fontsize=9)
    return png_of(figure)


def _both_signs(labelled: Mapping[str, Curve]) -> bool:
    values = [y for curve in labelled.values() for y in curve.y]
    return min(values) < 0 < max(values)


def _show_as_numbers(axes: Axes, places: Sequence[float]) -> None:
    """Ticks at the measured places, in digits: 2, 3, 5, 10 and not powers of ten; of those close to each other the first."""
    shown: list[float] = []
    for place in places:
        if not shown or place >= 1.3 * shown[-1]:
            shown.append(place)
    axes.set_xticks(shown)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def mosaic(rows: Sequence[tuple[str, Sequence[Tensor]]], columns: Sequence[str], x_label: str) -> bytes:
    """Images in labelled rows and columns.

    Args:
        rows: a label and the images of the row, each (C, H, W) uint8 with one or three channels, all of one size.
        columns: the label of each column.
        x_label: what the columns are.
    """
    cells = [[_with_margin(image) for image in images] for _, images in rows]
    sheet = np.concatenate([np.concatenate(line, axis=1) for line in cells], axis=0)
    height, width = cells[0][0].shape[:2]
    figure = Figure(figsize=(1.6 + CELL * len(columns), 0.7 + CELL * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([(k + 0.5) * width - 0.5 for k in range(len(columns))], columns, fontsize=8)
    axes.set_yticks([(k + 0.5) * height - 0.5 for k in range(len(rows))], [as_shown(label) for label, _ in rows], fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(as_shown(x_label), fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    return png_of(figure)


def _with_margin(image: Tensor) -> np.ndarray:
    """(H, W, 3) with a white margin of a sixteenth of its size, at least one pixel."""
    array = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    margin = max(1, len(array) // 16)
    return np.pad(array, ((0, margin), (0, margin), (0, 0)), constant_values=255)
