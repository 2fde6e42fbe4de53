"""The plan of a training: configuration agreed on and pinned, data opened. No network yet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator

from ...config import shard_names
from ...config.choices import choose
from ...config.hub_names import PINNED, is_dataset_id, is_model_id, is_pinned, split_revision
from ...config.loading import BEFORE_THE_FIELD, flatten, update
from ...config.schema.data import EMBEDDED
from ...config.schema.training import TrainConfig
from ...config.validation.training import train_problems
from ...data.captions import require_captions
from ...data.sources.base import Source
from ...data.sources.subset import RepeatedSource, folder_repeats
from ...data.validation_split import split_source
from ...diffusion.loss import Objective, make_objective
from ...diffusion.noise_schedule import require_noise_at_the_end, terminal_snr_problem
from ...errors import InputError, raise_all
from ...hub import client
from ...runs.checkpoints import Checkpoint
from ...tasks.base import Task
from ...tasks.pixel_data import open_data, readable
from ...tasks.pixels import PixelTask
from ...tasks.text_data import base_of_run, captioned
from ...utils.console import say
from ...utils.distributed import broadcast_from_first, in_each_process, set_threads

if TYPE_CHECKING:
    from ...evaluation.monitor import Monitor


@dataclass(frozen=True)
class Plan:
    """A training whose configuration is agreed on and whose data are open; there is no network yet."""

    config: TrainConfig
    found: Checkpoint | None  # to resume from
    objective: Objective
    task: Task
    monitor: Monitor | None
    num_threads: int


def prepare(config: TrainConfig, resume: Checkpoint | None, accelerator: Accelerator, chosen: Collection[str] = ()) -> Plan:
    """Configuration and data of a training that begins, or goes on from a checkpoint, which only the first process need have.

    Raises:
        InputError: configuration, data and checkpoint do not fit each other.
    """
    found = broadcast_from_first(lambda: resume, accelerator)
    channels = config.data.channels  # as typed
    config = broadcast_from_first(lambda: _config_of_run(config, found), accelerator)
    num_threads = set_threads(config.optimization.num_threads)
    if config.data.task == "text_to_image":
        return _prepare_text(config, found, accelerator, chosen, num_threads)
    if chosen and not found:  # by the data
        source = open_data(config, found, first=accelerator.is_main_process)
        config = broadcast_from_first(lambda: suited(config, chosen, len(source), accelerator), accelerator)
        objective = _objective(config, found, accelerator)
    else:
        objective = _objective(config, found, accelerator)  # first, because it may refuse the configuration
        source = open_data(config, found, first=accelerator.is_main_process)
    config, task, monitor = _open_task(config, source, channels, found, accelerator)
    config = _with_max_steps(config, task, found, accelerator)
    return Plan(config, found, objective, task, monitor, num_threads)


def _prepare_text(
    config: TrainConfig, found: Checkpoint | None, accelerator: Accelerator, chosen: Collection[str], num_threads: int
) -> Plan:
    """`prepare` of a text-to-image training."""
    from ...tasks.text_to_image import TextToImageTask  # with transformers, which pixel models do not need

    config, base = base_of_run(config, found, chosen, accelerator)
    objective = _objective(config, found, accelerator)
    source = open_data(config, found, first=accelerator.is_main_process)
    config, monitor = _with_monitor(config, source, accelerator)
    trained, held_out = _split(config, captioned(config, source, found, accelerator), accelerator)
    require_captions(trained)
    task = TextToImageTask(config, base, trained, accelerator, held_out)
    if monitor:
        monitor.check(task.conditions(monitor.count, as_in_data=True))
    if accelerator.is_main_process:
        task.say_data()
    config = _with_max_steps(config, task, found, accelerator)
    return Plan(config, found, objective, task, monitor, num_threads)


def _config_of_run(config: TrainConfig, found: Checkpoint | None) -> TrainConfig:
    """The configuration with commits for names on the Hub; of a run that is resumed, with its commits, channels and older defaults."""
    values = flatten(config)
    kinds = {name: ("dataset", is_dataset_id) if name == "dataset" else ("model", is_model_id) for name in PINNED}
    began = found.state["config"] if found else {}
    names = {n: values[n] for n in PINNED if values[n] and (is_pinned(began.get(n) or "") or kinds[n][1](values[n]))}
    if found is None:
        return update(config, {name: client.pinned(value, kinds[name][0]) for name, value in names.items()})
    _require_local_data(config, found)
    kept = {name: began.get(name, value) for name, value in names.items()}
    kept |= {name: client.pinned(kept[name], kinds[name][0]) for name in kept.keys() & found.changing}
    for name, value in names.items():
        if split_revision(value)[1] and value != kept[name]:
            say(f"{name} is {value}, but the run keeps to what it began with, {kept[name]}")
    older = {name: value for name, value in BEFORE_THE_FIELD.items() if name not in began}
    return update(config, kept | older | {"channels": began.get("channels")})


def _require_local_data(config: TrainConfig, found: Checkpoint) -> None:
    """Raises InputError where a run began with data of a disk and they are not where the command says: the Hub is not asked for them."""
    typed, began = str(config.data.dataset), found.state["config"]["dataset"]
    if "dataset" in found.changing:
        return
    paths = found.state.get("paths")
    on_disk = began not in EMBEDDED and not is_pinned(began) and (paths is None or "dataset" in paths)
    if on_disk and not shard_names.exists(typed):
        lay = f" at {paths['dataset']}" if paths else f" {began}"
        raise InputError(f"dataset {typed} is not there; this run began with the data{lay}; name where they are now with --dataset")


def _objective(config: TrainConfig, found: Checkpoint | None, accelerator: Accelerator) -> Objective:
    """The objective; refused where sampling could not start from noise, but a run of a version without this check is only warned."""
    objective = make_objective(config.objective)
    if found is None:
        require_noise_at_the_end(config.objective, objective.schedule)
    elif accelerator.is_main_process and (problem := terminal_snr_problem(objective.schedule)):
        say(f"warning: {problem}")
    return objective


def suited(config: TrainConfig, chosen: Collection[str], images: int, accelerator: Accelerator) -> TrainConfig:
    """The configuration with the values that suit the data for the fields that were left out. Prints what they are.

    Raises:
        InputError: they do not go with what was typed.
    """
    config, lines = choose(config, chosen, images, gpu=accelerator.device.type != "cpu")
    raise_all(train_problems(config, accelerator.num_processes), "what was left out was chosen; name it")
    size = f"{config.data.resolution}x{config.data.resolution}"
    say(f"chosen for {images} images of {size} pixels; flags change it, and a resume keeps it:")
    for line in lines:
        say(f"  {line}")
    return config


def _with_max_steps(config: TrainConfig, task: Task, found: Checkpoint | None, accelerator: Accelerator) -> TrainConfig:
    """The configuration with `max_steps` in place of `num_epochs`, now that the training images are known.

    Raises:
        InputError: so many steps do not go with the rest.
    """
    optim = config.optimization
    if optim.num_epochs is None:
        return config
    steps = task.data.steps_of_epochs(optim, *((found.step, found.state["position"]) if found else ()))
    config = update(config, {"num_epochs": None, "max_steps": steps})
    said = f"num_epochs {optim.num_epochs:g} of {len(task.data.source)} images"
    raise_all(train_problems(config, accelerator.num_processes), said)
    if accelerator.is_main_process:
        say(f"{said}: max_steps is {steps}")
    return config


def _open_task(
    config: TrainConfig, source: Source, channels: int | None, found: Checkpoint | None, accelerator: Accelerator
) -> tuple[TrainConfig, Task, Monitor | None]:
    """The configuration with what the metrics need, the task with its data, and what measures it; `channels` as typed."""
    config, monitor = _with_monitor(config, source, accelerator)  # before the images are read
    learned = update(config, {"channels": channels})  # `config` has the run's own value, which may be None
    source, channels = readable(config, source, found, channels, accelerator)
    trained, held_out = _split(config, source, accelerator)
    return config, PixelTask(learned, trained, channels, held_out), monitor


def _split(config: TrainConfig, source: Source, accelerator: Accelerator) -> tuple[Source, Source | None]:
    """The images that are trained, and those that are held out; how many is said."""
    trained, held_out = split_source(source, config.data.validation_split, config.optimization.seed)
    if held_out and accelerator.is_main_process:
        say(f"validation_split {config.data.validation_split}: {len(held_out)} images are held out, {len(trained)} are trained")
    return _repeated(config, trained, accelerator), held_out


def _repeated(config: TrainConfig, source: Source, accelerator: Accelerator) -> Source:
    """The source with the images of folders that name a number of repeats as often; how many there then are is said."""
    if not config.data.folder_repeats:
        return source
    repeated = RepeatedSource(source, folder_repeats(source))
    if not len(repeated):
        raise InputError("folder_repeats is on, and all folders have names that begin with 0_, so that no image is trained; rename one")
    if accelerator.is_main_process:
        say(f"folder_repeats: {len(repeated)} samples an epoch, of {len(source)} images")
    return repeated


def _with_monitor(config: TrainConfig, source: Source, accelerator: Accelerator) -> tuple[TrainConfig, Monitor | None]:
    """The configuration with the number of images that the metrics need, and what measures them; None where nothing is measured."""
    if not config.run.eval_every:
        return config, None
    from ...evaluation.monitor import Monitor  # with torch-fidelity, whose import takes seconds that a run without figures need not wait

    rank, processes = accelerator.process_index, accelerator.num_processes
    monitor = in_each_process(lambda: Monitor(config, source, accelerator.device, rank, processes), accelerator)
    return update(config, {"eval_images": monitor.count}), monitor
