"""The run directory: its lock, its metrics, its configuration, and the checkpoint from which to resume. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import hub_names, shard_names
from ..config.choices import as_flags
from ..config.hub_names import absolute_path, is_dataset_id, is_model_id, is_pinned
from ..config.loading import (
    BEFORE_THE_FIELD,
    CHANGES,
    CONFIG,
    NOT_STORED,
    ON_PURPOSE,
    as_json,
    checked_values,
    difference,
    differing,
    flatten,
    stored,
    to_json,
)
from ..config.schema.data import DIGITS, EMBEDDED
from ..config.schema.training import TrainConfig
from ..errors import InputError, raise_all
from ..utils import launcher
from ..utils.console import say
from ..utils.files import acquire_lock, has_our_lock, read_json, remove_temporary_files, require_lockable, user_files, write_file
from . import checkpoints
from .checkpoints import Checkpoint
from .metrics_file import METRICS_FILE, MetricsFile

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
SKIPPED = "skipped_images"  # in state.json and metrics.jsonl: samples whose image could not be read and was replaced
REQUIRED_FIELDS = {"dataset", "prediction_type", "weighting", "noise_schedule", "ema_decay", "max_steps"}  # of any config.json
DATA = "data"  # among the changes: the files behind `dataset`, by their fingerprint
MARKER = ".debias_diffusers.json"  # this file marks a folder as a run directory
MARK = {"debias_diffusers": "run"}

Change = dict[str, Any]  # step, name, before, after


class Run:
    """A locked run directory. The lock is held until `close` or the end of the process; `training.start` calls `close`."""

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

    def remove_temporary_files(self) -> None:
        """Removes what a killed process left half written or half removed."""
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            remove_temporary_files(folder)

    def begin(self, config: TrainConfig, changes: Sequence[Change] = ()) -> None:
        """Prepares the directory for training: writes config.json, removes temporary files and the metrics of later steps.

        With the changes in it, a start that is killed before its first checkpoint has still changed the run.
        """
        self.remove_temporary_files()
        write_file(self.folder / CONFIG, to_json(config, changes).encode())
        step = self.resume.step if self.resume else 0
        self.metrics.begin_after(step, goes_on=step < config.optimization.max_steps)


def run_values(folder: str | Path) -> dict[str, Any] | None:
    """The configuration of a run by flat names, with the defaults of its time; None where the folder is no run directory.

    Where config.json is missing or damaged, it is that of the newest checkpoint.

    Without what config.json does not have: the place, pushing, and what a command asks for only once. Local data, whose path may be
    relative to another working directory, are named by the path that the newest checkpoint has.

    Raises:
        InputError: a newer version wrote it.
    """
    state = checkpoints.newest_state(Path(folder) / CHECKPOINTS)
    both = (read_json(Path(folder) / CONFIG), state.get("config"))
    found = next((each for each in both if isinstance(each, dict) and each.keys() >= REQUIRED_FIELDS), None)
    if found is None:
        return None
    found.pop(CHANGES, None)
    values = flatten(TrainConfig()) | BEFORE_THE_FIELD | checked_values(found, f"run {str(folder)!r}")
    for name, path in (state.get("paths") or {}).items():
        if values.get(name) and shard_names.exists(path) and not shard_names.exists(values[name]):
            values[name] = path
    return {name: value for name, value in values.items() if name not in NOT_STORED}


def no_run(field: str, run: str) -> str:
    """What is wrong with a name of which `run_values` has nothing."""
    wrong = f"is no run directory (it has no {CONFIG} of a training)" if os.path.exists(run) else "does not exist"
    return f"{field} {run!r} {wrong}; name the --output_dir of a training that began"


def kept_values(folder: str | None, names: Collection[str]) -> dict[str, Any]:
    """What a run with checkpoints has for these fields, where a command that does not name them continues it."""
    return shown_values(folder, names) if folder and checkpoints.list_checkpoints(Path(folder) / CHECKPOINTS) else {}


def shown_values(run: str, names: Collection[str]) -> dict[str, Any]:
    """What a run has for these fields, which is printed; nothing where it is no run directory."""
    found = {name: value for name, value in (run_values(run) or {}).items() if name in names}
    neutral = flatten(TrainConfig())
    shown = as_flags({name: value for name, value in found.items() if value != neutral[name]})
    steps = {change["name"]: change["step"] for change in recorded_changes(Path(run)) if change["name"] in names}
    changed = [f"{name} (since step {step})" for name, step in steps.items()]
    if shown and launcher.is_first_process():
        say(f"as in {run}: {shown}" + (f"; changed on purpose: {', '.join(changed)}" if changed else ""))
    return found


def sampling_problems(model: str, output_dir: str | None) -> list[str]:
    """What is wrong with the model of a sampling command: it does not exist, or is no run, which alone has a folder for samples."""
    if missing := hub_names.model_problems("model", model):
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

    What --allow_change changes is already in `config` of the checkpoint's state, and in its `changes`, a list of all since the run began:
    step, name, and the values before and after. Those of the checkpoint's own step are still to be applied.

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
        resume = _resumed(config, folder)
    except BaseException:
        lock.close()
        raise
    return Run(folder, lock, resume)


def inspect_run(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint from which `open_run` would resume. Raises what that would raise, and leaves nothing behind."""
    folder = Path(config.run.output_dir or "")
    _refuse_foreign(folder)
    require_lockable(folder)
    return _resumed(config, folder)


def _resumed(config: TrainConfig, folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint, as the run goes on from it."""
    found, damaged = checkpoints.latest_valid(folder / CHECKPOINTS)
    for sentence in damaged:
        say(f"{sentence}; an older checkpoint is used")
    return _continued(config, found, recorded_changes(folder)) if found else None


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


def recorded_changes(folder: Path) -> list[Change]:
    """The changes in config.json, which the last start has written."""
    values = read_json(folder / CONFIG)
    found = values.get(CHANGES) if isinstance(values, dict) else None
    parts = found if isinstance(found, list) else []
    whole = (c for c in parts if isinstance(c, dict) and c.keys() == {"step", "name", "before", "after"})
    return [c for c in whole if isinstance(c["step"], int) and isinstance(c["name"], str)]


def _continued(config: TrainConfig, found: Checkpoint, recorded: list[Change]) -> Checkpoint:
    """The checkpoint with the configuration and changes with which the run goes on.

    Raises:
        InputError: names what differs and is not allowed to.
    """
    done: list[Change] = found.state.get(CHANGES, [])
    changes = done + _pending(done, recorded, found.step)
    began = found.state["config"] | {c["name"]: c["after"] for c in changes[len(done) :] if c["name"] != DATA}
    allowed = config.run.allow_change
    now = {name: value for name, value in stored(config).items() if name in began or name not in BEFORE_THE_FIELD or name in allowed}
    defaults = {name: value for name, value in (as_json(flatten(TrainConfig())) | BEFORE_THE_FIELD).items() if name in now}
    before = defaults | began  # a run of an older version lacks newer fields
    names = differing(before | {name: now[name] for name in _decided_otherwise(before, now, found.state)}, now)
    _refuse_differences(config, found.step, [name for name in names if name not in allowed], before, now, changes)
    if names and found.step == config.optimization.max_steps:
        where = f"run directory {config.run.output_dir} is finished at step {found.step}"
        raise InputError(f"{where}, so that nothing would be trained with another {', '.join(names)}; raise --max_steps, too")
    changes += [{"step": found.step, "name": name, "before": before[name], "after": now[name]} for name in names]
    for change in changes:
        if change["step"] == found.step and change["name"] != DATA:
            say(f"{change['name']} was {change['before']}, from step {found.step} on it is {change['after']}")
    config_now = began | {name: now[name] for name in names}
    return dataclasses.replace(found, state={**found.state, "config": config_now, CHANGES: changes})


def _pending(done: list[Change], recorded: list[Change], step: int) -> list[Change]:
    """The changes that a start has written down, and that no checkpoint up to `step` has seen: they apply at this step."""
    if recorded[: len(done)] != done:
        return []
    pending = [change for change in recorded[len(done) :] if change["step"] >= step]
    for change in pending:
        if change["step"] > step:
            say(f"warning: {change['name']} was changed at step {change['step']}, which is lost; it now changes at step {step}")
    return [change | {"step": step} for change in pending]


def _refuse_differences(
    config: TrainConfig, step: int, names: list[str], before: dict[str, Any], now: dict[str, Any], changes: list[Change]
) -> None:
    """Raises InputError with a problem for each name, and the ways to go on."""
    last = {change["name"]: change for change in changes}
    since = {name: f" (changed from {change['before']} at step {change['step']})" for name, change in last.items()}
    problems = [difference(name, before, now) + since.get(name, "") for name in names]
    ways = [f"go on with the values of the run: --resume {shlex.quote(str(config.run.output_dir))}", "name another --output_dir"]
    if ON_PURPOSE.issuperset(names):
        ways.insert(1, f"change them on purpose with --allow_change {' '.join([*config.run.allow_change, *names])}")
    if config.optimization.num_epochs is None and config.optimization.max_steps < step:
        problems.append(f"max_steps is {config.optimization.max_steps}, but the run is at step {step}; take at least that")
    raise_all(problems, f"run directory {config.run.output_dir} holds another run", ", or ".join(ways) if names else "")


def _decided_otherwise(before: dict[str, Any], now: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """Fields whose text may differ, because something else decides whether it is the same run."""
    paths = state.get("paths", {})
    init, began = now.get("init") or "", paths.get("init", before.get("init")) or ""
    same = {
        "init": bool(init and began) and os.path.realpath(absolute_path(init)) == os.path.realpath(absolute_path(began)),
        # Of models on this disk, which may have moved, the files are compared later, when they are loaded.
        **{name: name in paths and _on_this_disk(now.get(name)) for name in ("base_model", "vae")},
        # The names and sizes of the files are compared later, when the data set is opened.
        "dataset": not (is_pinned(before["dataset"]) or is_dataset_id(now["dataset"]) or {before["dataset"], now["dataset"]} & {*EMBEDDED}),
        # The networks are compared later, when the network is built.
        "model_config": bool(before.get("model_config") and now.get("model_config")),
        # If channels was left out, the images decided it.
        "channels": before.get("channels") is None and now.get("channels") == state["network"]["in_channels"],
    }
    return [name for name, holds in same.items() if holds]


def _on_this_disk(model: str | None) -> bool:
    """Whether a model is a folder of this disk, there or not, and neither the packaged one nor one of the Hub."""
    return bool(model) and model != DIGITS and not is_pinned(str(model)) and not is_model_id(str(model))
