"""The run directory: its lock, its metrics, where to resume, and the signals that ask a run to stop. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from ..config.hub_names import is_hub_id, is_pinned, place_of
from ..config.loading import BEFORE_THE_FIELD, differences, stored, to_json
from ..config.schema import DIGITS, TrainConfig
from ..errors import InputError, raise_all
from ..utils.console import say
from ..utils.files import contents, read_json, remove_drafts, take_lock, was_locked, write_file
from . import checkpoints
from .checkpoints import Checkpoint
from .metrics_file import METRICS, Metrics

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
CONFIG = "config.json"
MARKER = ".debias_diffusers.json"  # says that a folder is a run directory
MARK = {"debias_diffusers": "run"}
USUAL = {"dataset", "prediction_type", "weighting", "noise_schedule", "ema_decay", "max_steps"}  # fields of every run's config.json


class Run:
    """A run directory that this process holds until it is closed, or the process ends. `training.train` closes it."""

    def __init__(self, folder: Path, lock: IO[str], resume: Checkpoint | None) -> None:
        self.folder = folder
        self.resume = resume
        self._lock = lock  # if it is not closed, the kernel gives it back when the process ends, however it ends
        os.register_at_fork(after_in_child=lock.close)  # and not when the last of its loader's workers has ended
        self.metrics = Metrics(folder / METRICS)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the directory back."""
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def begin(self, config: TrainConfig) -> None:
        """Makes the directory ready to train from where it stands: configuration written, leftovers and later metrics gone."""
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            remove_drafts(folder)
        write_file(self.folder / CONFIG, to_json(config).encode())
        step = self.resume.step if self.resume else 0
        self.metrics.begin_after(step, goes_on=step < config.optimization.max_steps)


def open_run(config: TrainConfig) -> Run:
    """Takes the run directory and finds where to resume, without changing anything in it but its lock and its marker.

    Raises:
        RunInUseError: another process holds it.
        CannotWriteError: it cannot be made or written to.
        InputError: it holds other files, or a run with another configuration.
        NoUsableCheckpointError: all its checkpoints are damaged.
    """
    folder = Path(config.run.output_dir or "")
    _refuse_foreign(folder)
    lock = take_lock(folder)
    try:
        if not _is_marked(folder):
            write_file(folder / MARKER, (json.dumps(MARK) + "\n").encode())
        resume, damaged = checkpoints.latest_valid(folder / CHECKPOINTS)
        for sentence in damaged:
            say(f"{sentence}; an older checkpoint is used")
        if resume:
            _check_same(config, resume)
    except BaseException:
        lock.close()
        raise
    return Run(folder, lock, resume)


def _refuse_foreign(folder: Path) -> None:
    """A run writes README.md, unet/ and more into its directory: never into one that holds somebody's other files."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a new or empty folder, such as runs/first")
    names = contents(folder)
    if names and not (_is_marked(folder) or _is_of_an_older_version(folder)):
        raise InputError(
            f"output_dir {folder} is no run directory and holds other files, such as {names[0]}; "
            f"name a new or empty folder, such as {folder / 'run'}"
        )


def _is_marked(folder: Path) -> bool:
    return bool(read_json(folder / MARKER) == MARK)


def _is_of_an_older_version(folder: Path) -> bool:
    """Whether a folder is a run of a version that wrote no marker: our configuration, and a lock or a manifest of ours beside it."""
    values = read_json(folder / CONFIG)
    if not (isinstance(values, dict) and values.keys() >= USUAL):
        return False
    return was_locked(folder) or any(map(checkpoints.has_sound_manifest, checkpoints.checkpoints(folder / CHECKPOINTS)))


def _check_same(config: TrainConfig, resume: Checkpoint) -> None:
    began = resume.state["config"]
    now = {name: value for name, value in stored(config).items() if name in began or name not in BEFORE_THE_FIELD}
    before = {name: value for name, value in stored(TrainConfig()).items() if name in now} | began  # a field may be younger than the run
    changed = differences(before | {name: now[name] for name in _decided_otherwise(before, now, resume.state)}, now)
    if changed:
        changed.append("continue with the old values, or name another --output_dir")
    if config.optimization.max_steps < resume.step:
        changed.append(f"max_steps is {config.optimization.max_steps}, but the run is at step {resume.step}; take at least that")
    raise_all(changed, f"run directory {config.run.output_dir} holds another run")


def _decided_otherwise(before: dict[str, Any], now: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Fields that may be typed in another way, because their text does not decide whether it is the same run."""
    init, began = now["init"], state.get("paths", {}).get("init", before["init"])
    same = {
        # The names and sizes of the files are compared when they are opened.
        "dataset": not is_pinned(before["dataset"]) and not is_hub_id(now["dataset"]) and DIGITS not in (before["dataset"], now["dataset"]),
        # The networks are compared when this one is known.
        "model_config": bool(before["model_config"] and now["model_config"]),
        "init": bool(init and began) and os.path.realpath(place_of(init)) == os.path.realpath(place_of(began)),
        # What was left out was decided by the images.
        "channels": before["channels"] is None and now["channels"] == state["network"]["in_channels"],
    }
    return [name for name, holds in same.items() if holds]
