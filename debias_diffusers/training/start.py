"""Starting a training: configuration checked, run directory taken, signals caught, all before torch is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.choices import choose, of_base
from ..config.hub_names import is_model_id
from ..config.loading import checked_values, flatten, is_text, layered, read_config, resolved, update
from ..config.registry import TRACKERS
from ..config.schema.training import TrainConfig
from ..config.validation.objective import named_problems
from ..config.validation.optimization import sharding_problems
from ..config.validation.training import train_problems
from ..errors import InputError, raise_all
from ..runs.lora_folder import lora_problems
from ..runs.run_directory import kept_values, open_run
from ..tasks.base_model import open_base, with_objective
from ..utils import launcher, text_libraries
from ..utils.console import say

if TYPE_CHECKING:
    from ..runs.run_directory import Run
    from ..utils.signals import SignalHandler
    from .trainer import Callback


def train(config: TrainConfig | str | Path | None = None, callback: Callback | None = None, **values: Any) -> Any:
    """Trains to `max_steps` in the run directory of a configuration, or resumes there; in each process of a launcher.

    `train("digits", output_dir="runs/digits", max_steps=500)`

    Args:
        config: a configuration, or what `--config` takes: the name of a packaged one, or a file. The field defaults if left out.
        callback: called after each optimizer step in the first process, with the number of steps and the numbers `loss`,
            `learning_rate` and `grad_norm`; on a GPU while the next step is computed. What it raises ends the training.
        **values: fields by the names of the flags, in place of those of the configuration.

    Returns:
        The pipeline with the EMA weights, on the CPU, as it is in the run directory. It is a `PixelPipeline`, or the stock pipeline of a
        text-to-image model; None in all processes but the first, and of a dry run.

    Raises:
        InputError: the configuration, data or launcher's environment cannot be used.
        StoppedError: after SIGTERM or SIGINT, saved.
        DebiasError: of the kind that tells what else ended the training.
    """
    chosen: Collection[str] = ()
    given = checked_values(values, "train")
    if not isinstance(config, TrainConfig):
        found = read_config(str(config)) if config else {}
        named = found | given
        chosen = of_base(named.keys()) if named.get("base_model") else ()
        config = layered(found, kept_values(named.get("output_dir"), chosen))
    config = layered(checked_values(flatten(config), "train"), given)  # of a TrainConfig, which nothing has looked at
    raise_all(named_problems(config.objective, given))
    train_run(config, chosen, callback)
    if config.run.dry_run or not launcher.is_first_process():
        return None
    if is_text(config):
        from ..pipelines.lora import load_text_model

        return load_text_model(str(config.run.output_dir))
    from ..pipelines.pixel_pipeline import load_pipeline

    return load_pipeline(str(config.run.output_dir))


def train_run(config: TrainConfig, chosen: Collection[str] = (), callback: Callback | None = None) -> None:
    """`train` without loading the result. `chosen`: fields whose values `config.choices` decides in a new run."""
    num_processes = launcher.world_size()
    config = _checked(config, chosen, num_processes)
    if config.run.dry_run:
        from .dry_run import dry_run

        dry_run(config, chosen)
        return

    from ..utils.signals import SignalHandler, stop_with_launcher

    stop_with_launcher()
    # The signals before torch, which takes seconds to import. Before several processes are connected, nothing is lost where they end at
    # once, and those that wait for one that has failed should.
    opened = open_run(config) if launcher.is_first_process() else contextlib.nullcontext()
    with opened as run, SignalHandler(at_once=num_processes > 1) as stop:
        _train_in(config, run, stop, num_processes, chosen, callback)


def precompute(config: TrainConfig, chosen: Collection[str] = ()) -> None:
    """Fills the `precompute_dir` of a text-to-image training with all that it knows before its first step; in each process of a launcher.

    What is there already is not computed again. Arguments as of `train_run`; nothing else is written.

    Raises:
        InputError: as the training would.
        CannotWriteError: the folder cannot be written to, or its disk has not enough room.
    """
    text, missing = config.text, []
    if not text.base_model:
        missing.append("base_model is missing; name the text-to-image model that is to be trained")
    if text.precompute_dir is None:
        missing.append("precompute_dir is missing; name the folder that is to be filled")
    if config.run.dry_run:
        missing.append("dry_run is on, but this command does nothing else than to compute; leave it out")
    raise_all(missing)
    num_processes = launcher.world_size()
    # Neither the directory of the run nor its steps change anything here, where any number of processes may share the work.
    output_dir = config.run.output_dir or text.precompute_dir
    others = {"batch_size": num_processes, "micro_batch_size": 1, "num_epochs": None}
    config = update(config, {"output_dir": output_dir, **others})
    config = _checked(config, chosen, num_processes, training=False)

    from ..utils.signals import stop_with_launcher

    stop_with_launcher()
    from .setup.build import accelerated
    from .setup.plan import prepare

    with accelerated(config) as accelerator:
        prepare(config, None, accelerator, chosen).task.prepare()
        if accelerator.is_main_process:
            say(f"precompute_dir {text.precompute_dir} has what this training knows before its first step")


def _checked(config: TrainConfig, chosen: Collection[str], num_processes: int, training: bool = True) -> TrainConfig:
    """The configuration with what was left out filled in. Raises InputError for what is wrong with it, the launcher or the packages."""
    config = resolved(config, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    raise_all(launcher.environment_problems(os.environ, training=training), "launcher")
    if launcher.is_sharded(os.environ):
        raise_all(sharding_problems(config.optimization, config.objective))
    if config.text.base_model:
        text_libraries.require()
        if config.lora.lora_rank:
            text_libraries.require_peft()
        _check_text(config, chosen, num_processes)
    else:
        raise_all(train_problems(choose(config, chosen, images=0, gpu=True)[0] if chosen else config, num_processes))
    _require_packages(config)
    return config


def _require_packages(config: TrainConfig) -> None:
    """Raises InputError where an extra is not installed that the configuration needs. Imports none of them."""
    if config.optimization.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("optimizer is adamw8bit, but bitsandbytes is not installed; run pip install bitsandbytes")
    for name in config.run.report_to:
        modules, package = TRACKERS[name]
        found = (importlib.util.find_spec(module) for module in modules)
        if not any(spec and spec.origin for spec in found):  # without an origin it is a folder, as wandb leaves one where it runs
            raise InputError(f"report_to is {name}, but it is not installed; run pip install {package}")


# What the schedulers of Stable Diffusion say: 1.x and XL, and models with zero terminal SNR.
_USUAL_BASES: tuple[dict[str, Any], ...] = (
    {"noise_schedule": "scaled_linear"},
    {"noise_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
)


def _check_text(config: TrainConfig, chosen: Collection[str], num_processes: int) -> None:
    """Raises InputError for a text-to-image training that cannot be, or a base model on this disk that cannot be trained.

    One on the Hub is looked at when it is downloaded; before, only what is wrong with each of the usual ones is an error.
    """
    usual = [{name: value for name, value in base.items() if name in chosen} for base in _USUAL_BASES]
    first, *others = (train_problems(update(config, values), num_processes) for values in usual)
    raise_all([problem for problem in first if all(problem in problems for problems in others)])
    base, folder = str(config.text.base_model), str(config.run.output_dir)
    if config.optimization.init:  # of a LoRA, else it is refused
        raise_all(lora_problems("init", config.optimization.init))
    if os.path.realpath(base) == os.path.realpath(folder):  # whose UNet the first export replaces
        resume = f"resume the run with --resume {shlex.quote(folder)}"
        raise InputError(f"base_model {base} is the run directory; name another --output_dir, or {resume}")
    if not any(map(is_model_id, filter(None, (base, config.text.vae)))):
        with_objective(config, open_base(config.text), chosen, num_processes)


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
    optim = config.optimization  # whose max_steps says nothing beside num_epochs
    if run and run.resume and not optim.num_epochs and run.resume.step == optim.max_steps and num_processes == 1:
        run.remove_temporary_files()  # of a kill while the last save removed older checkpoints
        say(f"{run.folder} is finished at step {run.resume.step}; raise --max_steps to go on")
        if to:
            Publisher(run.folder, to, run.resume.step).finish(run.resume.step, stop)
        return

    from .setup.build import run_training

    run_training(config, run, stop, to, chosen, callback)
