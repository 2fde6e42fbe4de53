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

from ..config.registry import WEIGHTINGS
from ..config.schema import ObjectiveConfig, PredictionType, WeightsConfig
from ..data import images
from ..diffusion.loss import weight_table
from ..diffusion.noise_schedule import Schedule, make_schedule
from ..errors import InputError
from ..utils.console import say
from ..utils.files import read_file, require_replaceable, write_file

SPACES: tuple[PredictionType, ...] = get_args(PredictionType)
DECADES = 7  # of weights that a picture shows
COLUMNS = ("weighting", "t", "snr", "log_snr")

Tables = dict[str, dict[PredictionType, Tensor]]  # weighting: space: (T,) weights


def draw_weights(config: WeightsConfig) -> None:
    """Writes `weights.csv` and `weights.png` into the output directory.

    Raises:
        CannotWriteError: the directory cannot be made or written to.
        InputError: it has files of these names that this command did not write.
    """
    folder = Path(config.output_dir)
    numbers, picture = folder / "weights.csv", folder / "weights.png"
    before = _is_our_csv(numbers)
    require_replaceable("output_dir has", numbers, lambda _: before)
    require_replaceable("output_dir has", picture, lambda path: is_our_picture(path, before))
    schedule = make_schedule(config.objective)
    tables = {name: _table(config.objective, schedule, name) for name in (config.objective.weighting, *config.against)}
    drawn = _png(_figure(schedule, tables))
    write_file(numbers, _csv(schedule, tables).encode())
    write_file(picture, drawn)
    say(f"weights of {len(schedule)} noise levels in {numbers}, drawn in {picture}")


def _png(figure: Figure) -> bytes:
    box = io.BytesIO()
    figure.savefig(box, format="png", dpi=90, metadata={"Software": images.SOFTWARE})
    return box.getvalue()


def is_our_picture(path: Path, beside_ours: bool) -> bool:
    """Whether a PNG file says that this package drew it.

    Those of the first versions say matplotlib, so that `beside_ours` decides: whether the file of numbers beside it is ours.
    """
    software = images.software(path)
    return software == images.SOFTWARE or (beside_ours and software is not None and software.startswith("Matplotlib"))


def _is_our_csv(path: Path) -> bool:
    try:
        return read_file(path).startswith(",".join(COLUMNS).encode())
    except InputError:
        return False


def _table(objective: ObjectiveConfig, schedule: Schedule, name: str) -> dict[PredictionType, Tensor]:
    """The weights (T,) in each space in which they have a meaning; without a finite mean they cannot be normalized."""
    config = dataclasses.replace(objective, weighting=name)
    table = {space: weight_table(config, schedule, space) for space in SPACES if space in (WEIGHTINGS[name].repeats or SPACES)}
    return {space: weights for space, weights in table.items() if not weights.isnan().any()}


def _csv(schedule: Schedule, tables: Tables) -> str:
    """One line for each weighting and level: its t, SNR, log SNR, and the weight in each space (empty without a meaning)."""
    box = io.StringIO()
    writer = csv.writer(box)
    writer.writerow([*COLUMNS, *SPACES])
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
    return _png(figure)
