"""What a training tells while it runs: the progress bar, metrics.jsonl, and the tracker."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..config.loading import stored
from ..config.schema import TrainConfig
from ..runs.metrics_file import LAST
from ..runs.run_directory import Run
from ..utils.files import write_file
from .loss_statistics import BINS, Window

PROJECT = "debias_diffusers"  # of wandb, where WANDB_PROJECT names no other


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; an interval of 0 is never."""
    return every > 0 and step % every == 0


class Progress:
    """Tells of each step. In all processes but the first, `run` is None and nothing is shown."""

    def __init__(self, config: TrainConfig, run: Run | None, accelerator: Accelerator, step: int) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.smooth = math.nan
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
    def apart(self) -> Iterator[None]:
        """For what is no training step: its time does not count for images_per_second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.began += time.monotonic() - began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def record(self, step: int, loss: float, learning_rate: float, grad_norm: float, window: Window) -> None:
        """Tells of the step that was just made: its mean weighted loss over the global batch, and the rest."""
        self.images += self.config.optimization.batch_size
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        self.bar.set_postfix_str(f"loss {self.smooth:.3f}, {rate:.0f} images/s{self.quality}", refresh=False)
        self.bar.update()
        every = self.config.run.log_every
        # A line that is only due because the run ends leaves the window open: of a run that goes on, the next has all steps since the last.
        last = {} if due(step, every) else {LAST: True}
        if last and not (every and step == self.config.optimization.max_steps):
            return
        close = window.values if last else window.close
        values = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, **close(self.accelerator.gather)}
        if self.run:
            self.run.metrics.append({"step": step, **values, **last, "images_per_second": rate})
        self.accelerator.log({**_scalars(values), "images_per_second": rate}, step=step)
        self.began, self.images = time.monotonic(), 0

    def record_figures(self, step: int, figures: dict[str, float]) -> None:
        """Tells how good the averaged weights are at a step."""
        if not figures:
            return
        values = {f"eval_{name}": value for name, value in figures.items()}
        if self.run:
            self.run.metrics.append({"step": step, **values})
            name, value = next(iter(figures.items()))
            self.quality = f", {name} {value:.4g}"
        self.accelerator.log(values, step=step)


def _of_wandb(run: Run) -> dict[str, Any]:
    """What makes a resume the same run there: an id, which the run directory keeps."""
    path = run.folder / "logs" / "wandb-id"
    if not path.is_file():
        write_file(path, secrets.token_hex(8).encode())
    return {"name": run.folder.name, "id": os.environ.get("WANDB_RUN_ID") or path.read_text(), "resume": "allow"}


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """One number a name, as trackers want it: the parts of a list under their share of the noise levels."""
    scalars = {}
    for name, value in values.items():
        parts = {f"{name}/{k / BINS}-{(k + 1) / BINS}": part for k, part in enumerate(value)} if isinstance(value, list) else {name: value}
        scalars.update({part: number for part, number in parts.items() if number is not None})
    return scalars
