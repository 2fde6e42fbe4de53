"""Starting a training: configuration checked, run directory taken, signals caught, all before torch is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

from ..config.loading import resolved
from ..config.schema import TrainConfig
from ..config.validation import train_problems
from ..errors import raise_all
from ..utils import launcher
from ..utils.console import say

if TYPE_CHECKING:
    from ..runs.run_directory import Run
    from ..utils.signals import SignalHandler


def train(config: TrainConfig) -> None:
    """Trains to `max_steps` in the run directory of a configuration, or resumes there; in each process of a launcher.

    Raises:
        InputError: the configuration, data or launcher's environment cannot be used.
        StoppedError: after SIGTERM or SIGINT, saved.
        DebiasError: of the kind that tells what else ended the training.
    """
    config = resolved(config, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    raise_all(launcher.environment_problems(os.environ), "launcher")
    raise_all(train_problems(config, num_processes))
    if config.run.dry_run:
        from .dry_run import dry_run

        dry_run(config)
        return

    from ..runs.run_directory import open_run
    from ..utils.signals import SignalHandler, stop_with_launcher

    stop_with_launcher()
    # The signals before torch, which takes seconds to import.
    with open_run(config) if launcher.is_first_process() else contextlib.nullcontext() as run, SignalHandler() as stop:
        _train_in(config, run, stop, num_processes)


def _train_in(config: TrainConfig, run: Run | None, stop: SignalHandler, num_processes: int) -> None:
    from ..hub import client
    from ..hub.publish import Publisher

    to = dataclasses.replace(config.hub, hub_model_id=client.preflight(config.hub)) if run and config.hub.push_to_hub else None
    if run and run.resume and run.resume.step == config.optimization.max_steps and num_processes == 1:
        say(f"{run.folder} is finished at step {run.resume.step}; raise --max_steps to go on")
        if to:
            Publisher(run.folder, to, run.resume.step).finish(run.resume.step, stop)
        return

    from . import setup

    setup.run_training(config, run, stop, to)
