"""Logging of a training: progress bar, metrics.jsonl, and the tracker (TensorBoard, wandb)."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..config.loading import stored
from ..config.schema import TrainConfig
from ..runs.metrics_file import LAST
from ..runs.run_directory import SKIPPED, Run
from ..utils.files import write_file
from .loss_statistics import BINS, LossStatistics

SHOWN_STEPS = 100  # over which the progress bar averages the loss; fewer at the beginning
PROJECT = "debias_diffusers"  # of wandb, where WANDB_PROJECT names no other


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; an interval of 0 is never."""
    return every > 0 and step % every == 0


class Logger:
    """Logs each step. In all processes but the first, `run` is None and nothing is shown or written."""

    def __init__(self, config: TrainConfig, run: Run | None, accelerator: Accelerator, step: int) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.losses: deque[float] = deque(maxlen=SHOWN_STEPS)
        self.quality = ""  # as last measured
        self.began, self.images = time.monotonic(), 0
        self.bar = tqdm(
            total=config.optimization.max_steps,
            initial=step,
            unit="step",
            disable=run is None or sys.stderr is None,  # None: its descriptor is closed
            mininterval=0.5 if sys.stderr is not None and sys.stderr.isatty() else 10,
        )
        if config.run.report_to != "none":
            values = stored(config).items()
            own = {"wandb": _of_wandb(run)} if run and config.run.report_to == "wandb" else {}
            project = os.environ.get("WANDB_PROJECT", PROJECT) if config.run.report_to == "wandb" else ""
            accelerator.init_trackers(project, {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values}, own)

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
        self.bar.set_postfix_str(f"loss {mean:.4g} (mean of {len(self.losses)} steps), {rate:.0f} images/s{self.quality}", refresh=False)
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
        self.accelerator.log({**_scalars(values), "images_per_second": rate}, step=step)
        self.began, self.images = time.monotonic(), 0

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of what the EMA weights draw at a step, and shows the first; nothing where there are none."""
        if not metrics:
            return
        if self.run:
            name, value = next(iter(metrics.items()))
            self.quality = f", {name} {value:.4g}"
        self.log_values(step, {f"eval_{name}": value for name, value in metrics.items()})

    def log_values(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of values that were measured at a step."""
        if self.run:
            self.run.metrics.append({"step": step, **values})
        self.accelerator.log(values, step=step)


def _of_wandb(run: Run) -> dict[str, Any]:
    """Arguments of wandb.init: an id that the run directory keeps, so that a resume is the same run there."""
    path = run.folder / "logs" / "wandb-id"
    if not path.is_file():
        write_file(path, secrets.token_hex(8).encode())
    return {"name": run.folder.name, "id": os.environ.get("WANDB_RUN_ID") or path.read_text(), "resume": "allow"}


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """One number per name, as trackers want it: item k of a list under its range of timesteps, as shares of T."""
    scalars = {}
    for name, value in values.items():
        parts = {f"{name}/{k / BINS}-{(k + 1) / BINS}": part for k, part in enumerate(value)} if isinstance(value, list) else {name: value}
        scalars.update({part: number for part, number in parts.items() if number is not None})
    return scalars
