"""Starting a training: configuration checked, run directory taken, signals caught, all before torch is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.choices import choose
from ..config.loading import checked_values, flatten, layered, read_config, resolved
from ..config.schema import TrainConfig
from ..config.validation import train_problems
from ..errors import raise_all
from ..utils import launcher
from ..utils.console import say

if TYPE_CHECKING:
    from ..pipelines.pixel_pipeline import PixelPipeline
    from ..runs.run_directory import Run
    from ..utils.signals import SignalHandler
    from .trainer import Callback


def train(config: TrainConfig | str | Path | None = None, callback: Callback | None = None, **values: Any) -> PixelPipeline | None:
    """Trains to `max_steps` in the run directory of a configuration, or resumes there; in each process of a launcher.

    `train("digits", output_dir="runs/digits", max_steps=500)`

    Args:
        config: a configuration, or what `--config` takes: the name of a packaged one, or a file. The field defaults if left out.
        callback: called after each optimizer step in the first process, with the number of steps and the numbers `loss`,
            `learning_rate` and `grad_norm`; on a GPU while the next step is computed. What it raises ends the training.
        **values: fields by the names of the flags, in place of those of the configuration.

    Returns:
        The pipeline with the EMA weights, on the CPU, as it is in the run directory; None in all processes but the first, and of a dry run.

    Raises:
        InputError: the configuration, data or launcher's environment cannot be used.
        StoppedError: after SIGTERM or SIGINT, saved.
        DebiasError: of the kind that tells what else ended the training.
    """
    if not isinstance(config, TrainConfig):
        config = layered(read_config(str(config)) if config else {})
    config = layered(flatten(config), checked_values(values, "train"))
    train_run(config, callback=callback)
    if config.run.dry_run or not launcher.is_first_process():
        return None
    from ..pipelines.pixel_pipeline import load_pipeline

    return load_pipeline(str(config.run.output_dir))


def train_run(config: TrainConfig, chosen: Collection[str] = (), callback: Callback | None = None) -> None:
    """`train` without loading the result. `chosen`: fields whose values `config.choices` decides in a new run."""
    config = resolved(config, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    raise_all(launcher.environment_problems(os.environ), "launcher")
    raise_all(train_problems(choose(config, chosen, images=1, gpu=True)[0] if chosen else config, num_processes))
    if config.run.dry_run:
        from .dry_run import dry_run

        dry_run(config, chosen)
        return

    from ..runs.run_directory import open_run
    from ..utils.signals import SignalHandler, stop_with_launcher

    stop_with_launcher()
    # The signals before torch, which takes seconds to import.
    with open_run(config) if launcher.is_first_process() else contextlib.nullcontext() as run, SignalHandler() as stop:
        _train_in(config, run, stop, num_processes, chosen, callback)


def _train_in(
    config: TrainConfig,
    run: Run | None,
    stop: SignalHandler,
    num_processes: int,
    chosen: Collection[str],
    callback: Callback | None,
) -> None:
    from ..hub import client
    from ..hub.publish import Publisher

    to = dataclasses.replace(config.hub, hub_model_id=client.preflight(config.hub)) if run and config.hub.push_to_hub else None
    if run and run.resume and run.resume.step == config.optimization.max_steps and num_processes == 1:
        say(f"{run.folder} is finished at step {run.resume.step}; raise --max_steps to go on")
        if to:
            Publisher(run.folder, to, run.resume.step).finish(run.resume.step, stop)
        return

    from . import setup

    setup.run_training(config, run, stop, to, chosen, callback)
