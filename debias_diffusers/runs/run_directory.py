"""The run directory: its lock, its metrics, its configuration, and the checkpoint from which to resume. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from ..config.hub_names import absolute_path, is_dataset_id, is_pinned, missing_models
from ..config.loading import BEFORE_THE_FIELD, differences, stored, to_json
from ..config.schema import DIGITS, TrainConfig
from ..errors import InputError, raise_all
from ..utils.console import say
from ..utils.files import acquire_lock, has_our_lock, read_json, remove_temporary_files, user_files, write_file
from . import checkpoints
from .checkpoints import Checkpoint
from .metrics_file import METRICS_FILE, MetricsFile

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
CONFIG = "config.json"
MARKER = ".debias_diffusers.json"  # this file marks a folder as a run directory
MARK = {"debias_diffusers": "run"}
REQUIRED_FIELDS = {"dataset", "prediction_type", "weighting", "noise_schedule", "ema_decay", "max_steps"}  # of any config.json


class Run:
    """A locked run directory. The lock is held until `close` or the end of the process; `training.train` calls `close`."""

    def __init__(self, folder: Path, lock: IO[str], resume: Checkpoint | None) -> None:
        self.folder = folder
        self.resume = resume
        self._lock = lock  # the kernel releases it when the process ends, in whatever way
        os.register_at_fork(after_in_child=lock.close)  # else data loader workers would keep the lock after the process has ended
        self.metrics = MetricsFile(folder / METRICS_FILE)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock."""
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def begin(self, config: TrainConfig) -> None:
        """Prepares the directory for training: writes config.json, removes temporary files and the metrics of later steps."""
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            remove_temporary_files(folder)
        write_file(self.folder / CONFIG, to_json(config).encode())
        step = self.resume.step if self.resume else 0
        self.metrics.begin_after(step, goes_on=step < config.optimization.max_steps)


def model_problems(model: str, output_dir: str | None) -> list[str]:
    """What is wrong with the model of a sampling command: it does not exist, or is no run, which alone has a folder for samples."""
    if missing := missing_models("model", model):
        return missing
    if output_dir or (Path(model) / CHECKPOINTS).is_dir():
        return []
    if not Path(model).exists():
        return [
            f"output_dir is missing, and {model} does not exist here; to draw with {model} of the Hub, add --output_dir, such as samples"
        ]
    return [f"output_dir is missing: {model} is not a run directory; add --output_dir, such as samples"]


def open_run(config: TrainConfig) -> Run:
    """Locks the run directory and finds the checkpoint from which to resume. Writes only the lock and the marker.

    Raises:
        RunInUseError: another process uses the directory.
        CannotWriteError: the directory cannot be created or written to.
        InputError: the directory has other files, or a run with another configuration.
        NoUsableCheckpointError: all its checkpoints are damaged.
    """
    folder = Path(config.run.output_dir or "")
    _refuse_foreign(folder)
    lock = acquire_lock(folder)
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
    """Raises InputError for a folder with other files: a run would write README.md, unet/ and more into it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a new or empty folder, such as runs/first")
    names = user_files(folder)
    if names and not (_is_marked(folder) or _is_of_an_older_version(folder)):
        raise InputError(
            f"output_dir {folder} is not a run directory and holds other files, such as {names[0]}; "
            f"name a new or empty folder, such as {folder / 'run'}"
        )


def _is_marked(folder: Path) -> bool:
    return bool(read_json(folder / MARKER) == MARK)


def _is_of_an_older_version(folder: Path) -> bool:
    """Whether a folder is a run of a version without a marker: it has a config.json, and a lock or a manifest, of this package."""
    values = read_json(folder / CONFIG)
    if not (isinstance(values, dict) and values.keys() >= REQUIRED_FIELDS):
        return False
    return has_our_lock(folder) or any(map(checkpoints.has_valid_manifest, checkpoints.list_checkpoints(folder / CHECKPOINTS)))


def _check_same(config: TrainConfig, resume: Checkpoint) -> None:
    began = resume.state["config"]
    now = {name: value for name, value in stored(config).items() if name in began or name not in BEFORE_THE_FIELD}
    defaults = {name: value for name, value in stored(TrainConfig()).items() if name in now}
    before = defaults | began  # a run of an older version lacks newer fields
    changed = differences(before | {name: now[name] for name in _decided_otherwise(before, now, resume.state)}, now)
    if changed:
        changed.append("continue with the old values, or name another --output_dir")
    if config.optimization.max_steps < resume.step:
        changed.append(f"max_steps is {config.optimization.max_steps}, but the run is at step {resume.step}; take at least that")
    raise_all(changed, f"run directory {config.run.output_dir} holds another run")


def _decided_otherwise(before: dict[str, Any], now: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Fields whose text may differ, because something else decides whether it is the same run."""
    init, began = now["init"], state.get("paths", {}).get("init", before["init"])
    same = {
        # The names and sizes of the files are compared later, when the data set is opened.
        "dataset": not (is_pinned(before["dataset"]) or is_dataset_id(now["dataset"]) or DIGITS in (before["dataset"], now["dataset"])),
        # The networks are compared later, when the network is built.
        "model_config": bool(before["model_config"] and now["model_config"]),
        "init": bool(init and began) and os.path.realpath(absolute_path(init)) == os.path.realpath(absolute_path(began)),
        # If channels was left out, the images decided it.
        "channels": before["channels"] is None and now["channels"] == state["network"]["in_channels"],
    }
    return [name for name, holds in same.items() if holds]
