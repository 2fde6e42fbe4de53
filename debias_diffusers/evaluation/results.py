"""Results of eval.py: tables, JSON, and curves."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.registry import FIGURES
from ..utils.files import read_json, write_file
from .metrics import as_loss
from .plots import plot_curves


def has_fields(path: Path, *names: str) -> bool:
    """Whether a file is a JSON object with these fields, by which a result of this package is recognised."""
    found = read_json(path)
    return isinstance(found, dict) and found.keys() >= set(names)


def as_json(result: Mapping[str, Any]) -> bytes:
    """The text of a file of figures. JSON knows neither NaN nor infinity: null stands for them."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return (json.dumps(finite, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Row:
    """A target, as it was drawn, and its figures."""

    target: str
    images: int
    figures: dict[str, float]
    total_images: int | None = None  # of a folder or an .npz, of which `images` were taken
    resolution: int | None = None  # of square images, in pixels
    weights: str | None = None  # of models, as of --weights
    training_step: int | None = None  # of these weights, where it is known
    scheduler: str | None = None
    steps: int | None = None
    network_evaluations: int | None = None  # of one image; with guidance each is of two inputs
    guidance_scale: float | None = None  # of text-to-image models
    checkpoint: int | None = None
    sigma_rel: float | None = None  # of averaged weights that were reconstructed
    sampling_seed: int | None = None  # where there are several
    intervals: dict[str, tuple[float, float]] | None = None


def as_row(row: Row) -> dict[str, Any]:
    """What the JSON says of a target."""
    about = {name: value for name, value in dataclasses.asdict(row).items() if value is not None and name != "figures"}
    return about | row.figures


def table(result: Mapping[str, Any]) -> str:
    """The figures as an aligned table in Markdown, the distance between two halves of the reference as the last row."""
    targets = result["targets"]
    names = [name for name in FIGURES if any(name in row for row in targets)]
    how = [
        name
        for name in ("checkpoint", "sigma_rel", "sampling_seed", "scheduler", "steps", "network_evaluations", "guidance_scale")
        if any(name in row for row in targets)
    ]
    rows = [["target", *(name.replace("_", " ") for name in how), "images", *names]]
    for row in targets:
        cells = [row["target"], *(str(row.get(name, "")) for name in how), str(row["images"])]
        rows.append([*cells, *(_cell(row, name) for name in names)])
    if yardstick := result["halves_of_the_reference"]:
        cells = ["two halves of the reference", *("" for _ in how), str(result["reference"]["images"] // 2)]
        rows.append([*cells, *(_cell(yardstick, name) for name in names)])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    """A table in Markdown, whose first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows)


def unequal(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each way in which the targets were sampled differently, which their figures depend on."""
    found = []
    for name in ("training_step", "resolution", "scheduler", "network_evaluations", "guidance_scale", "images"):
        values: dict[str, dict[Any, None]] = {}  # each a set in the order of the rows
        for row in targets:
            if name in row:
                values.setdefault(row["target"], {})[row[name]] = None
        if len({tuple(each) for each in values.values()}) > 1:
            listed = ", ".join(f"{target} {'/'.join(map(str, each))}" for target, each in values.items())
            found.append(f"the targets differ in {name.replace('_', ' ')}: {listed}")
    if found and found[-1].startswith("the targets differ in images"):
        found[-1] += f"; --num_images {min(row['images'] for row in targets)} takes as many of each"
    return found


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low_high = (row.get("intervals") or {}).get(name)
    return f"{row[name]:.4g}" + (f" ({low_high[0]:.4g} to {low_high[1]:.4g})" if low_high else "")


# 97.5% quantile of Student's t by degrees of freedom from 1 on; of more, that of 30, which is a little too large.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_SAME = ("training_step", "checkpoint", "sigma_rel", "scheduler", "steps", "network_evaluations", "guidance_scale", "images")


def over_training_seeds(rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means and 95% intervals over runs that differ in their seed alone, for each way in which they were drawn.

    The intervals are those of Student's t over the seeds of the training; the figures of a run are means over the seeds of the sampling.

    Args:
        rows: of the result.
        runs: by target, the configuration of those that are runs, with `seed`, without what does not shape the training.
    """
    groups: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if (config := runs.get(row["target"])) is not None:
            key = json.dumps([{**config, "seed": None}, [row.get(name) for name in _SAME]], sort_keys=True)
            groups.setdefault(key, {}).setdefault(config["seed"], []).append(row)
    several = [seeds for seeds in groups.values() if len(seeds) > 1]
    configs = [runs[next(iter(seeds.values()))[0]["target"]] for seeds in several]
    differing = [
        name for name in sorted(set[str]().union(*configs) - {"seed"}) if len({json.dumps(each.get(name)) for each in configs}) > 1
    ]
    return [
        {
            "group": ", ".join(f"{name} {config.get(name)}" for name in differing) or "all",
            "targets": sorted({row["target"] for found in seeds.values() for row in found}),
            "training_seeds": sorted(seeds),
            "sampling_seeds": max(len(found) for found in seeds.values()),
            **{name: first[name] for name in _SAME if name in (first := next(iter(seeds.values()))[0])},
            "figures": {
                name: _mean_of_seeds([sum(row[name] for row in found) / len(found) for found in seeds.values()])
                for name, better in FIGURES.items()
                if better != "neither" and all(name in row for found in seeds.values() for row in found)
            },
        }
        for seeds, config in zip(several, configs)
    ]


def _mean_of_seeds(values: Sequence[float]) -> dict[str, float]:
    mean, count = statistics.fmean(values), len(values)
    half = STUDENT[min(count - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table_of_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """The means over training seeds as an aligned table in Markdown."""
    names = [name for name in FIGURES if any(name in group["figures"] for group in groups)]
    how = [name for name in _SAME if len({group.get(name) for group in groups}) > 1]
    rows = [["runs that differ in their seed", *(name.replace("_", " ") for name in how), "training seeds", *names]]
    for group in groups:
        cells = ["{mean:.4g} ({low:.4g} to {high:.4g})".format(**group["figures"][name]) for name in names]
        rows.append([group["group"], *(str(group.get(name, "")) for name in how), str(len(group["training_seeds"])), *cells])
    return _aligned(rows)


LABELS = {"checkpoint": "training step", "sigma_rel": "sigma_rel of the average", "steps": "steps of the solver"}  # of the x axis


def best_width(rows: Sequence[Mapping[str, Any]], figure: str) -> list[dict[str, Any]]:
    """Of each target with averages of several widths, the one that is best by a figure."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row.get("sigma_rel") is not None and math.isfinite(value := as_loss(figure, row[figure])):
            best = found.get(row["target"])
            if best is None or value < as_loss(figure, best[figure]):
                found[row["target"]] = row
    return [{"target": target, "sigma_rel": row["sigma_rel"], figure: row[figure]} for target, row in found.items()]


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of each figure over steps, over checkpoints, or over the widths of averages, where there are several."""
    along = next((name for name in ("checkpoint", "sigma_rel") if len({row[name] for row in rows if name in row}) > 1), "steps")
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if (place := row.get(along)) is None:
            continue
        parts = [row["target"], row["scheduler"], row.get("checkpoint" if along == "steps" else "steps")]
        parts += [f"seed {row['sampling_seed']}"] if "sampling_seed" in row else []
        label = " ".join(str(part) for part in parts if part is not None)
        for name, better in FIGURES.items():
            if name in row and better != "neither":
                lines.setdefault(name, {}).setdefault(label, []).append((place, row[name]))
    if any(len(points) > 1 for labelled in lines.values() for points in labelled.values()):
        write_file(path, plot_curves(lines, LABELS[along]))
