"""A run as its directory tells it, finished or not: configuration, metrics, grids, scores, model card. Reads only. No torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runs import checkpoints
from ..runs.metrics_file import METRICS_FILE, step_of_line
from ..runs.run_directory import CHECKPOINTS, SAMPLES, no_run, recorded_changes, run_values
from ..utils.files import is_held_here, read_file, read_json

GRID = re.compile(r"step-([0-9]{8,})\.png")
SCORE_FIELDS = {"reference", "extractor", "targets"}  # of what `eval.py score --output` writes

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class RunFiles:
    """What a run directory has."""

    folder: Path
    label: str  # in figures and tables
    values: dict[str, Any]  # the configuration by flat names
    lines: list[dict[str, Any]]  # of metrics.jsonl
    state: dict[str, Any]  # of the newest checkpoint; {} where there is none
    changes: list[dict[str, Any]]  # what --allow_change changed
    card: str | None
    grids: dict[int, Path]  # by step
    running: bool

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([int(self.state.get("step", 0)), *(int(line["step"]) for line in self.lines)], default=0)

    @property
    def max_steps(self) -> int:
        """The steps that the run is to have."""
        return int(self.values["max_steps"])

    @property
    def status(self) -> str:
        """How far it is, in words."""
        if self.state.get("step") == self.max_steps:
            return f"finished at step {self.max_steps}"
        how = "training now" if self.running else "not training now"
        return f"step {self.step} of {self.max_steps}, {how}" if self.step else f"not begun, {how}"

    def points(self, name: str) -> Points:
        """The finite values of a name in metrics.jsonl, and their steps."""
        return [(int(line["step"]), float(line[name])) for line in self.lines if is_number(line.get(name))]

    def names(self, *prefixes: str) -> list[str]:
        """The names in metrics.jsonl that begin with one of these, in the order in which they came."""
        return [name for name in dict.fromkeys(name for line in self.lines for name in line) if name.startswith(prefixes)]

    def parts(self, name: str) -> list[Points]:
        """As `points`, for each part of the timesteps of a list in metrics.jsonl, such as loss_by_t; [] where it is not there."""
        lists = [(int(line["step"]), line[name]) for line in self.lines if isinstance(line.get(name), list)]
        count = max((len(values) for _, values in lists), default=0)
        return [[(step, float(values[k])) for step, values in lists if k < len(values) and is_number(values[k])] for k in range(count)]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def run_problems(runs: Sequence[str]) -> list[str]:
    """Names that are no run directories."""
    return [no_run("run", run) for run in runs if run_values(run) is None]


def read_runs(runs: Sequence[str]) -> list[RunFiles]:
    """Reads run directories. Raises InputError as `run_values`."""
    return [_read(Path(run), label) for run, label in zip(runs, labels_of(runs))]


def labels_of(runs: Sequence[str]) -> Sequence[str]:
    """The last parts of the names of runs, for figures and tables; the whole names where two have the same."""
    names = [Path(os.path.abspath(run)).name for run in runs]
    return names if len(set(names)) == len(names) else runs


def _read(folder: Path, label: str) -> RunFiles:
    card = folder / "README.md"
    found = ((GRID.fullmatch(path.name), path) for path in sorted((folder / SAMPLES).glob("step-*.png")))
    return RunFiles(
        folder=folder,
        label=label,
        values=run_values(folder) or {},
        lines=_lines(folder / METRICS_FILE),
        state=checkpoints.newest_state(folder / CHECKPOINTS),
        changes=recorded_changes(folder),
        card=read_file(card).decode(errors="replace") if card.is_file() else None,
        grids={int(match[1]): path for match, path in found if match},
        running=is_held_here(folder),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last may be half written, in a run that is training."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in read_file(path).splitlines(keepends=True) if math.isfinite(step_of_line(line))]


@dataclass(frozen=True)
class Scores:
    """A file of `eval.py score` or `compare`."""

    path: Path
    found: dict[str, Any]
    rows: list[tuple[str, Mapping[str, Any]]]  # the label of the run, and its row among the targets


def read_scores(runs: Sequence[RunFiles], files: Sequence[str]) -> list[Scores]:
    """The scores of the runs in these files, and in those directly in the run directories.

    Raises:
        InputError: a named file is none of `eval.py score`, or has none of the runs.
    """
    found = []
    for name in files:
        scores = _scores(Path(name), runs)
        if scores is None:
            raise InputError(f"scores {name} is no file of eval.py score; name what its --output FILE.json wrote")
        if not scores.rows:
            raise InputError(f"scores {name} has none of these runs among its targets; name the runs as they were scored")
        found.append(scores)
    named = {os.path.realpath(name) for name in files}
    for run in runs:
        inside = (path for path in sorted(run.folder.glob("*.json")) if os.path.realpath(path) not in named)
        found += [scores for path in inside if (scores := _scores(path, [run], inside=True)) and scores.rows]
    return found


def _scores(path: Path, runs: Sequence[RunFiles], inside: bool = False) -> Scores | None:
    found = read_json(path)
    if not isinstance(found, dict) or not found.keys() >= SCORE_FIELDS or not isinstance(found["targets"], list):
        return None
    rows = [row for row in found["targets"] if isinstance(row, dict) and isinstance(row.get("target"), str)]
    return Scores(path, found, [(run.label, row) for row in rows for run in runs if _is_of(row["target"], run, inside)])


def _is_of(target: str, run: RunFiles, inside: bool) -> bool:
    """Whether a target is a run, or images in its directory. The scores in a run directory that was moved name where it was."""
    folder, place = Path(os.path.realpath(run.folder)), Path(os.path.realpath(target))
    return place == folder or folder in place.parents or (inside and Path(target).name == folder.name)
