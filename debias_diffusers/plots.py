"""The weights of an objective as a picture and as numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .config import ObjectiveConfig, PredictionType, WeightsConfig
from .files import write_file
from .loss import weight_table
from .rules import SPACES_OF_OTHERS
from .run import say
from .schedule import Schedule, make_schedule

SPACES: tuple[PredictionType, ...] = get_args(PredictionType)
DECADES = 7  # of weights that a picture shows

Tables = dict[str, dict[PredictionType, Tensor]]  # weighting: space: (T,) weights


def draw_weights(config: WeightsConfig) -> None:
    """Writes `weights.csv` and `weights.png` into the output directory.

    Raises:
        CannotWriteError: the directory cannot be made or written to.
    """
    schedule = make_schedule(config.objective)
    tables = {name: _table(config.objective, schedule, name) for name in (config.objective.weighting, *config.against)}
    folder = Path(config.output_dir)
    box = io.BytesIO()
    _figure(schedule, tables).savefig(box, format="png", dpi=90)
    write_file(folder / "weights.csv", _csv(schedule, tables).encode())
    write_file(folder / "weights.png", box.getvalue())
    say(f"weights of {len(schedule)} noise levels in {folder / 'weights.csv'}, drawn in {folder / 'weights.png'}")


def _table(objective: ObjectiveConfig, schedule: Schedule, name: str) -> dict[PredictionType, Tensor]:
    """The weights (T,) in each space in which they have a meaning; without a finite mean they cannot be normalized."""
    config = dataclasses.replace(objective, weighting=name)
    table = {space: weight_table(config, schedule, space) for space in SPACES if space in SPACES_OF_OTHERS.get(name, SPACES)}
    return {space: weights for space, weights in table.items() if not weights.isnan().any()}


def _csv(schedule: Schedule, tables: Tables) -> str:
    """One line for each weighting and level: its t, SNR, log SNR, and the weight in each space (empty without a meaning)."""
    box = io.StringIO()
    writer = csv.writer(box)
    writer.writerow(["weighting", "t", "snr", "log_snr", *SPACES])
    for name, table in tables.items():
        columns = [table[space].tolist() if space in table else [""] * len(schedule) for space in SPACES]
        writer.writerows(
            [name, t, snr, log_snr, *weights]
            for t, (snr, log_snr, *weights) in enumerate(zip(schedule.snr.tolist(), schedule.snr.log().tolist(), *columns))
        )
    return box.getvalue()


def _figure(schedule: Schedule, tables: Tables) -> Figure:
    """Spaces from left to right; above over t, below over log SNR."""
    figure = Figure(figsize=(4.2 * len(SPACES), 7), layout="constrained")
    axes = figure.subplots(2, len(SPACES), squeeze=False)
    for column, space in enumerate(SPACES):
        lines = {name: table[space] for name, table in tables.items() if space in table}
        _draw(axes[0][column], torch.arange(len(schedule)), lines, "t")
        _draw(axes[1][column], schedule.snr.log(), lines, "log SNR")
        axes[0][column].set_title(f"weight of the squared error of {space}")
    # Not every weighting has a line in every space.
    lines = {str(line.get_label()): line for panel in axes[0] for line in panel.get_lines()}
    figure.legend(handles=list(lines.values()), labels=list(lines), loc="outside lower center", ncols=len(lines))
    return figure


def _draw(axes: Axes, x: Tensor, lines: dict[str, Tensor], label: str) -> None:
    top = 0.0
    largest = torch.finfo(torch.float32).max  # more would overflow the axis
    for k, (name, weights) in enumerate(lines.items()):
        seen = x.isfinite() & (weights <= largest) & (weights > 0)
        # Thinner and thinner, so that lines on top of each other are all seen.
        axes.plot(x[seen].numpy(), weights[seen].numpy(), label=name, linewidth=1.2 + 0.5 * (len(lines) - 1 - k))
        top = max([top, *weights[seen].tolist()])
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    bottom, _ = axes.get_ylim()
    if top > 0:
        axes.set_ylim(max(bottom, top / 10**DECADES), top * 2)


def curves(lines: dict[str, dict[str, list[tuple[float, float]]]], along: str) -> bytes:
    """A PNG file with a panel for each figure; `lines` has the points (place, value) by figure and label."""
    figure = Figure(figsize=(5 * len(lines), 4), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for panel, (name, labelled) in zip(panels, lines.items()):
        for label, points in labelled.items():
            panel.plot(*zip(*sorted(points)), marker="o", markersize=3, label=label)
        panel.set(title=name, xlabel=along)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    box = io.BytesIO()
    figure.savefig(box, format="png", dpi=90)
    return box.getvalue()
