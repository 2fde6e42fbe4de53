"""The run directory: its lock, its metrics, where to resume, and the signals that ask a run to stop. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import IO, Any

from . import checkpoint
from .checkpoint import Checkpoint
from .config import BEFORE_THE_FIELD, DIGITS, TrainConfig, differences, is_hub_id, is_pinned, place_of, stored, to_json
from .errors import CannotWriteError, InputError, raise_all
from .files import contents, read_json, remove_drafts, said_if_not_writable, take_lock, was_locked, write_file

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
CONFIG = "config.json"
MARKER = ".debias_diffusers.json"  # says that a folder is a run directory
MARK = {"debias_diffusers": "run"}
USUAL = {"dataset", "prediction_type", "weighting", "noise_schedule", "ema_decay", "max_steps"}  # fields of every run's config.json
METRICS = "metrics.jsonl"
LAST = "last"  # marks a line of metrics that is there because the run ended, not because it was due


def say(message: str) -> None:
    """A line for the person in front of the screen; stderr, as the progress bar. Where nobody can be told, the work goes on."""
    if sys.stderr is not None:  # as it is where the descriptor was closed; print would take stdout
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)


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
        resume, damaged = checkpoint.latest_valid(folder / CHECKPOINTS)
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
    return was_locked(folder) or any(map(checkpoint.has_sound_manifest, checkpoint.checkpoints(folder / CHECKPOINTS)))


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


class Metrics:
    """metrics.jsonl: one JSON object a line, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._writing = threading.Lock()  # a save beside the training syncs what the training appends to

    def begin_after(self, step: int, goes_on: bool = True) -> None:
        """Drops the lines of later steps, which will be trained again, a last line that was cut off, and that of an end that is none."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if step_of(line) <= step and not (goes_on and LAST in json.loads(line))]
        if kept != lines:
            write_file(self.path, b"".join(kept))

    def append(self, values: dict[str, Any]) -> None:
        """Writes a line. One that cannot be written is kept and written with the next, or refused by `sync`."""
        with self._writing, contextlib.suppress(CannotWriteError):
            self._unwritten += (json.dumps(values) + "\n").encode()
            self._write()

    def _write(self) -> None:
        with said_if_not_writable(self.path), open(self.path, "ab") as file:
            end = file.tell()
            try:
                file.write(self._unwritten)
                file.flush()
                self._unwritten = b""
            except OSError:
                file.truncate(end)  # half a line
                raise

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint must not outlive the metrics of its steps."""
        with self._writing:
            self._write()
        with said_if_not_writable(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def step_of(line: bytes) -> float:
    """The step of a line of metrics; infinite where the line was cut off or torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


class StopSignal:
    """Remembers that SIGTERM or SIGINT asked the run to stop, so that it stops after the step at hand, saved.

    A second SIGINT ends the process at once; the last checkpoint is whole, as always. `close`, which `training.train` calls, gives the
    signals back. In a thread that is not the main one there is nothing to take: Python delivers signals to the main one.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts back the handlers that were there before, unless others have been installed since."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not installed from Python
        self._before = {}

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopped at once; the last checkpoint is untouched\n")
            os._exit(128 + signum)
        self.signum = signum


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def stop_with_launcher() -> None:
    """Under `accelerate launch` or torchrun: when the launcher dies, be told as by SIGTERM (Linux).

    A launcher that is terminated does not pass the signal on, and its training would go on unseen. Not without a launcher:
    a shell that ends must not end the training that was started from it.
    """
    if launched() and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)
