"""Logging of a training: progress, metrics.jsonl, and the trackers of accelerate (TensorBoard, trackio, wandb and others)."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tqdm import tqdm

from ..config.loading import stored
from ..config.schema.training import TrainConfig
from ..errors import InputError, reason
from ..runs.metrics_file import LAST
from ..runs.run_directory import SKIPPED, Run
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from ..utils.files import write_file
from .loss_statistics import BINS, LossStatistics

SHOWN_STEPS = 100  # over which the shown loss is averaged; fewer at the beginning
LINE_SECONDS = 10.0  # between lines of progress, where there is no terminal
PROJECT = "debias_diffusers"  # of trackers, where their environment variables name no other
FAILURES = 3  # in a row, after which a tracker is given up: each may have waited minutes for its server


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; an interval of 0 is never."""
    return every > 0 and step % every == 0


class Logger:
    """Logs each step. In all processes but the first, `run` is None and nothing is shown or written."""

    def __init__(self, config: TrainConfig, run: Run | None, accelerator: Accelerator, step: int) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.losses: deque[float] = deque(maxlen=SHOWN_STEPS)
        self.measured: dict[str, float] = {}  # the last value of each metric that is shown
        self.trackers = Trackers()
        if config.run.report_to:
            problem = broadcast_from_first(lambda: self.trackers.start(config, run) if run else None, accelerator)
            if problem:
                raise InputError(problem)
        self.began, self.images = time.monotonic(), 0
        self.bar = ProgressBar(config.optimization.max_steps, step, shown=run is not None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training step: its time does not count in images_per_second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - began

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.trackers.finish()

    def log_step(
        self, step: int, loss: float, learning_rate: float, grad_norm: float, statistics: LossStatistics, skipped_images: int = 0
    ) -> None:
        """Shows an optimizer step, and writes its line where one is due.

        Args:
            step: the number of steps that are done with it.
            loss: mean weighted loss over the global batch.
            learning_rate: of the step.
            grad_norm: before clipping.
            statistics: over the steps since the last line.
            skipped_images: since the run began; written where there are any.
        """
        self.images += self.config.optimization.batch_size
        self.losses.append(loss)
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        mean = sum(self.losses) / len(self.losses)
        measured = "".join(f", {name} {value:.4g}" for name, value in self.measured.items())
        self.bar.set_postfix_str(f"loss {mean:.4g} (mean of {len(self.losses)} steps), {rate:.0f} images/s{measured}", refresh=False)
        self.bar.update()
        every = self.config.run.log_every
        # A line that is only written because the run ends does not reset the statistics: after a resume the next one has all steps.
        last = {} if due(step, every) else {LAST: True}
        if last and not (every and step == self.config.optimization.max_steps):
            return
        since_last = statistics.values if last else statistics.reset
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, **since_last(self.accelerator.gather)}
        values |= {SKIPPED: skipped_images} if skipped_images else {}
        if self.run:
            self.run.metrics.append({"step": step, **values, **last, "images_per_second": rate})
        self.trackers.log({**_scalars(values), "images_per_second": rate}, step)
        self.began, self.images = time.monotonic(), 0

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of what the EMA weights draw at a step, and shows the first; nothing where there are none."""
        if not metrics:
            return
        self.measured |= dict([next(iter(metrics.items()))])
        self.log_values(step, {f"eval_{name}": value for name, value in metrics.items()})

    def log_values(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of values that were measured at a step; a validation loss is shown, too."""
        self.measured |= {name: value for name, value in values.items() if name == "validation_loss"}
        if self.run:
            self.run.metrics.append({"step": step, **values})
        self.trackers.log(values, step)

    def log_picture(self, step: int, path: Path, picture: Any) -> None:
        """Gives the trackers a grid of samples: its file in the run directory, and the image of Pillow."""
        self.trackers.log_picture(step, path, picture)


class ProgressBar(tqdm):
    """A bar in a terminal; elsewhere, as in a file, whole lines, of which the first comes after `LINE_SECONDS`."""

    def __init__(self, max_steps: int, step: int, shown: bool) -> None:
        self.shown = shown and sys.stderr is not None  # None: its descriptor is closed
        in_terminal = self.shown and sys.stderr.isatty()
        super().__init__(
            total=max_steps,
            initial=step,
            disable=not in_terminal,
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )
        self.lines = self.shown and not in_terminal
        self.first, self.done, self.max_steps = step, step, max_steps  # a disabled bar does not count
        self.started = self.said = time.monotonic()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts steps, and writes a line where one is due."""
        self.done += int(n or 0)
        now = time.monotonic()
        if self.lines and (now - self.said >= LINE_SECONDS or self.done == self.max_steps):
            left = (now - self.started) / (self.done - self.first) * (self.max_steps - self.done)
            say(f"step {self.done} of {self.max_steps}, {tqdm.format_interval(left)} left, {self.postfix}")
            self.said = now
        return super().update(n)


class Trackers:
    """The trackers of a run, in its first process. None can end a training: what it raises is said, and metrics.jsonl has every number."""

    def __init__(self) -> None:
        self._failures: dict[GeneralTracker, int] = {}  # in a row, of each that is not given up

    def start(self, config: TrainConfig, run: Run) -> str | None:
        """Starts the trackers of a configuration; returns why one cannot start, and has then started none."""
        values = {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in stored(config).items()}
        for name in config.run.report_to:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](*_places(name, run), **_options(name, run))
                tracker.start()
                self._failures[tracker] = 0
                tracker.store_init_configuration(values)
            except Exception as error:  # each has its own kinds
                self.finish()
                return f"report_to has {name}, but it cannot start: {reason(error)}"
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Gives numbers of a step to all."""
        self._each(lambda tracker: tracker.log(dict(values), step=step), f"step {step}")

    def log_picture(self, step: int, path: Path, picture: Any) -> None:
        """Gives a grid to all that take pictures; arguments as of `Logger.log_picture`."""
        self._each(lambda tracker: _log_picture(tracker, step, path, picture), f"the grid of step {step}")

    def finish(self) -> None:
        """Ends all."""
        self._each(lambda tracker: tracker.finish(), "its end")
        self._failures.clear()

    def _each(self, call: Callable[[Any], None], what: str) -> None:
        for tracker, failures in list(self._failures.items()):
            try:
                call(tracker)
                self._failures[tracker] = 0
            except Exception as error:  # each has its own kinds
                self._failures[tracker] = failures + 1
                given_up = failures + 1 == FAILURES
                if given_up:
                    del self._failures[tracker]
                if failures == 0 or given_up:
                    goes_on = "it is given up" if given_up else "it is tried again"
                    say(f"warning: {tracker.name} failed at {what}: {reason(error)}; {goes_on}, and the training goes on")


def _places(name: str, run: Run) -> tuple[str, ...]:
    """The first arguments of a tracker: its project, and where its files lie, if it asks for that."""
    if name == "tensorboard":
        return "", str(run.folder / "logs")  # in which the first argument is a folder
    if name == "aim":
        return run.folder.name, str(run.folder / "logs")
    return (os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT,)


def _options(name: str, run: Run) -> dict[str, Any]:
    """Further arguments: the name of the run, and where there is a way to it, that a resume is the same run."""
    folder = run.folder
    if name == "wandb":
        return {"name": folder.name, "id": os.environ.get("WANDB_RUN_ID") or _kept_id(run, name), "resume": "allow"}
    if name == "trackio":
        return {"name": f"{folder.name}-{_kept_id(run, name)[:6]}", "resume": "allow"}
    if name == "dvclive":
        return {"dir": str(folder / "logs" / name), "resume": True}
    names = {"mlflow": "run_name", "swanlab": "experiment_name", "clearml": "task_name"}
    return {names[name]: folder.name} if name in names else {}


def _kept_id(run: Run, tracker: str) -> str:
    """A random id that the run directory keeps."""
    path = run.folder / "logs" / f"{tracker}-id"
    if not path.is_file():
        write_file(path, secrets.token_hex(8).encode())
    return path.read_text()


def _log_picture(tracker: Any, step: int, path: Path, picture: Any) -> None:
    """Trackers take pictures in their own ways, those of accelerate through its `log_images`; others get none."""
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": np.asarray(picture.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({"samples": [picture]}, step=step)
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({"samples": picture}, step=step)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({"samples": trackio.Image(picture)}, step=step)
    elif tracker.name == "mlflow":
        tracker.log_artifact(str(path), "samples")
    elif tracker.name == "comet_ml":
        tracker.tracker.log_image(picture, name="samples", step=step)
    elif tracker.name == "dvclive":
        tracker.tracker.log_image(path.name, picture)


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """One number per name, as trackers want it: item k of a list under its range of timesteps, as shares of T."""
    scalars = {}
    for name, value in values.items():
        parts = {f"{name}/{k / BINS}-{(k + 1) / BINS}": part for k, part in enumerate(value)} if isinstance(value, list) else {name: value}
        scalars.update({part: number for part, number in parts.items() if number is not None})
    return scalars
