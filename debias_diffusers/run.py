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
from .config import BEFORE_THE_FIELD, TrainConfig, differences, stored, to_json
from .errors import CannotWriteError, InputError, raise_all
from .files import LOCK, remove_drafts, said_if_not_writable, take_lock, write_file

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LAST = "last"  # marks a line of metrics that is there because the run ended, not because it was due


def say(message: str) -> None:
    """A line for the person in front of the screen; stderr, as the progress bar."""
    print(message, file=sys.stderr, flush=True)


class Run:
    """A run directory that this process holds until it ends."""

    def __init__(self, folder: Path, lock: IO[str], resume: Checkpoint | None) -> None:
        self.folder = folder
        self.resume = resume
        self._lock = lock  # the kernel gives it back when the process ends, however it ends
        os.register_at_fork(after_in_child=lock.close)  # and not when the last of its loader's workers has ended
        self.metrics = Metrics(folder / METRICS)

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
    """Takes the run directory and finds where to resume, without changing anything in it but its lock.

    Raises:
        RunInUseError: another process holds it.
        CannotWriteError: it cannot be made or written to.
        InputError: it holds other files, or a run with another configuration.
        NoUsableCheckpointError: all its checkpoints are damaged.
    """
    folder = Path(config.run.output_dir or "")
    _refuse_foreign(folder)
    lock = take_lock(folder)
    resume, damaged = checkpoint.latest_valid(folder / CHECKPOINTS)
    for sentence in damaged:
        say(f"{sentence}; an older checkpoint is used")
    if resume:
        _check_same(config, resume)
    return Run(folder, lock, resume)


def _refuse_foreign(folder: Path) -> None:
    """A run writes README.md, unet/ and more into its directory: never into one that holds somebody's other files."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a new or empty folder, such as runs/first")
    ours = {LOCK, CHECKPOINTS}
    if folder.is_dir() and (names := set(os.listdir(folder))) and not names & ours:
        raise InputError(
            f"output_dir {folder} is no run directory and holds other files, such as {min(names)}; "
            f"name a new or empty folder, such as {folder / 'run'}"
        )


def _check_same(config: TrainConfig, resume: Checkpoint) -> None:
    before = resume.state["config"]
    now = {name: value for name, value in stored(config).items() if name in before or name not in BEFORE_THE_FIELD}
    changed = differences({name: value for name, value in stored(TrainConfig()).items() if name in now} | before, now)
    if changed:
        changed.append("continue with the old values, or name another --output_dir")
    if config.optimization.max_steps < resume.step:
        changed.append(f"max_steps is {config.optimization.max_steps}, but the run is at step {resume.step}; take at least that")
    raise_all(changed, f"run directory {config.run.output_dir} holds another run")


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

    A second SIGINT ends the process at once; the last checkpoint is whole, as always. So does any signal once the run has `ended`:
    nobody asks any more whether there was one, and a thread or process of a library may keep the process from ending.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.ended = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if self.ended:
            os._exit(128 + signum)
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
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
