"""Plots: the weights of an objective (weights.png, weights.csv), and curves of metrics."""

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

from ..config.registry import WEIGHTINGS
from ..config.schema.objective import ObjectiveConfig, WeightsConfig
from ..config.schema.types import PredictionType
from ..data import images
from ..diffusion.loss import weight_table
from ..diffusion.noise_schedule import Schedule, make_schedule
from ..errors import InputError
from ..utils.console import say
from ..utils.files import read_file, require_replaceable, write_file

PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
DECADES = 7  # of the weight axis
COLUMNS = ("weighting", "t", "snr", "log_snr")

Tables = dict[str, dict[PredictionType, Tensor]]  # weighting: prediction type: (T,) weights


def plot_weights(config: WeightsConfig) -> None:
    """Writes `weights.csv` and `weights.png` into the output directory.

    Raises:
        CannotWriteError: the directory cannot be created or written to.
        InputError: it has files of these names that this command did not write.
    """
    folder = Path(config.output_dir)
    numbers, picture = folder / "weights.csv", folder / "weights.png"
    before = _is_our_csv(numbers)
    require_replaceable("output_dir has", numbers, lambda _: before)
    require_replaceable("output_dir has", picture, lambda path: is_our_picture(path, before))
    schedule = make_schedule(config.objective)
    tables = {name: _table(config.objective, schedule, name) for name in (config.objective.weighting, *config.against)}
    drawn = png_of(_figure(schedule, tables))
    write_file(numbers, _csv(schedule, tables).encode())
    write_file(picture, drawn)
    say(f"weights of {len(schedule)} timesteps in {numbers}, drawn in {picture}")


def png_of(figure: Figure) -> bytes:
    """A figure as a PNG file with the Software tag of this package."""
    box = io.BytesIO()
    figure.savefig(box, format="png", dpi=90, metadata={"Software": images.SOFTWARE})
    return box.getvalue()


def is_our_picture(path: Path, beside_ours: bool) -> bool:
    """Whether this package wrote a PNG file, according to its Software tag.

    The tag of the first versions is that of matplotlib; for it `beside_ours` decides: whether the csv or json next to it is ours.
    """
    software = images.software(path)
    return software == images.SOFTWARE or (beside_ours and software is not None and software.startswith("Matplotlib"))


def _is_our_csv(path: Path) -> bool:
    try:
        return read_file(path).startswith(",".join(COLUMNS).encode())
    except InputError:
        return False


def _table(objective: ObjectiveConfig, schedule: Schedule, name: str) -> dict[PredictionType, Tensor]:
    """The weights (T,) by prediction type, where they are defined: without a finite mean they cannot be normalized."""
    config = dataclasses.replace(objective, weighting=name)
    table = {
        prediction_type: weight_table(config, schedule, prediction_type)
        for prediction_type in PREDICTION_TYPES
        if prediction_type in (WEIGHTINGS[name].repeats or PREDICTION_TYPES)
    }
    return {prediction_type: weights for prediction_type, weights in table.items() if not weights.isnan().any()}


def _csv(schedule: Schedule, tables: Tables) -> str:
    """One line for each weighting and timestep: t, SNR, log SNR, and the weight by prediction type (empty if undefined)."""
    box = io.StringIO()
    writer = csv.writer(box)
    writer.writerow([*COLUMNS, *PREDICTION_TYPES])
    for name, table in tables.items():
        columns = [
            table[prediction_type].tolist() if prediction_type in table else [""] * len(schedule) for prediction_type in PREDICTION_TYPES
        ]
        writer.writerows(
            [name, t, snr, log_snr, *weights]
            for t, (snr, log_snr, *weights) in enumerate(zip(schedule.snr.tolist(), schedule.snr.log().tolist(), *columns))
        )
    return box.getvalue()


def _figure(schedule: Schedule, tables: Tables) -> Figure:
    """One column of axes for each prediction type; top row over t, bottom row over log SNR."""
    figure = Figure(figsize=(4.2 * len(PREDICTION_TYPES), 7), layout="constrained")
    axes = figure.subplots(2, len(PREDICTION_TYPES), squeeze=False)
    for column, prediction_type in enumerate(PREDICTION_TYPES):
        lines = {name: table[prediction_type] for name, table in tables.items() if prediction_type in table}
        _draw(axes[0][column], torch.arange(len(schedule)), lines, "t")
        _draw(axes[1][column], schedule.snr.log(), lines, "log SNR")
        axes[0][column].set_title(f"weight of the squared error of {prediction_type}")
    # Not every weighting is defined for every prediction type.
    lines = {str(line.get_label()): line for panel in axes[0] for line in panel.get_lines()}
    figure.legend(handles=list(lines.values()), labels=list(lines), loc="outside lower center", ncols=len(lines))
    return figure


def _draw(axes: Axes, x: Tensor, lines: dict[str, Tensor], label: str) -> None:
    top = 0.0
    largest = torch.finfo(torch.float32).max  # larger values overflow the axis
    for k, (name, weights) in enumerate(lines.items()):
        seen = x.isfinite() & (weights <= largest) & (weights > 0)
        # Decreasing widths, so that coinciding lines are all visible.
        axes.plot(x[seen].numpy(), weights[seen].numpy(), label=as_shown(name), linewidth=1.2 + 0.5 * (len(lines) - 1 - k))
        top = max([top, *weights[seen].tolist()])
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    bottom, _ = axes.get_ylim()
    if top > 0:
        axes.set_ylim(max(bottom, top / 10**DECADES), top * 2)


def as_shown(label: str) -> str:
    """A name for matplotlib, in which two `$` enclose a formula, and a `_` at the beginning keeps a line out of the legend."""
    return f"{' ' * label.startswith('_')}{label}".replace("$", r"\$")


def plot_curves(lines: dict[str, dict[str, list[tuple[float, float]]]], along: str) -> bytes:
    """A PNG with a panel for each metric. `lines` has the points (x, value) by metric and label; `along` is the label of the x axis."""
    figure = Figure(figsize=(5 * len(lines), 4), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for panel, (name, labelled) in zip(panels, lines.items()):
        for label, points in labelled.items():
            panel.plot(*zip(*sorted(points)), marker="o", markersize=3, label=as_shown(label))
        panel.set(title=name, xlabel=along)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return png_of(figure)
