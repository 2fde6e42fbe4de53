"""Building a training: configuration agreed on and pinned, data opened, network wrapped, and put back as a checkpoint says."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import shard_names
from ..config.choices import choose
from ..config.hub_names import PINNED, absolute_path, is_dataset_id, is_model_id, is_pinned, split_revision
from ..config.loading import BEFORE_THE_FIELD, CHANGES, differences, flatten, stored, update
from ..config.schema.data import EMBEDDED
from ..config.schema.hub import HubConfig
from ..config.schema.training import OptimizationConfig, TrainConfig
from ..config.validation.training import train_problems
from ..data.captions import require_captions
from ..data.dataset import PositionBatchSampler
from ..data.sources.base import Source
from ..data.sources.subset import RepeatedSource, folder_repeats
from ..data.validation_split import split_source
from ..diffusion.loss import Objective, make_objective
from ..diffusion.noise_schedule import require_noise_at_the_end, terminal_snr_problem
from ..diffusion.power_ema import KEPT
from ..diffusion.timestep_samplers import final_timestep_sampler, make_timestep_sampler
from ..diffusion.uncertainty import NAME as UNCERTAINTY_MODULE
from ..diffusion.uncertainty import Uncertainty
from ..errors import InputError, StoppedError, raise_all
from ..hub import client
from ..hub.publish import Publisher
from ..pipelines.compiled import compile_channels_last
from ..runs.checkpoints import Checkpoint
from ..runs.run_directory import DATA, SKIPPED, Change, Run
from ..tasks.base import Task
from ..tasks.pixel_data import open_data, readable
from ..tasks.pixels import PixelTask
from ..tasks.text_data import base_of_run, captioned
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, gather_from_all, set_threads, told_by_the_first
from ..utils.signals import SignalHandler
from ..utils.torch_errors import explain_error
from . import device, state_dicts
from .ema import EMA
from .hooks import Checkpointer, EmaImages, Evaluation, Hook, SampleGrid, ValidationLoss
from .loss_statistics import LossStatistics
from .optimizer_step import OptimizerStep, state_bytes
from .saver import Saver
from .state_dicts import TrainingState
from .trainer import Callback, Trainer

if TYPE_CHECKING:
    from ..evaluation.monitor import Monitor

SKIPS_IN_A_ROW = 20  # fp16 steps with overflowing gradients that are taken for a search of the loss scale


def run_training(
    config: TrainConfig,
    run: Run | None,
    stop: SignalHandler,
    to: HubConfig | None = None,
    chosen: Collection[str] = (),
    callback: Callback | None = None,
) -> None:
    """Trains to `max_steps`, resuming where the run directory stands.

    Args:
        config: checked and resolved.
        run: the run directory, which is closed at the end; None in all processes but the first.
        stop: remembers signals, already since before torch was imported; closed at the end.
        to: where the first process pushes to, as the Hub allowed it; None where nothing is pushed.
        chosen: fields whose values `config.choices` decides in a new run.
        callback: called in the first process after each step.

    Raises:
        DebiasError: of the kind that tells what stopped it; StoppedError after a signal, saved.
    """
    signals = stop if isinstance(stop, SignalHandler) else contextlib.nullcontext()
    with run or contextlib.nullcontext(), signals, accelerated(config) as accelerator:
        trainer, publisher = make_trainer(config, run, accelerator, to, chosen)
        trainer.callback = callback if accelerator.is_main_process else None
        _train(trainer, publisher, stop)


@contextlib.contextmanager
def accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """The `Accelerator` of a training, to its end. Errors of torch within become a DebiasError where their cause is known."""
    accelerator = device.start_accelerator(config)
    try:
        yield accelerator
    except RuntimeError as error:
        size = micro_batch_size(config.optimization, accelerator.num_processes)
        if known := explain_error(error, "--micro_batch_size", size, config.run.ddp_timeout):
            raise known from error
        raise
    finally:
        accelerator.end_training()


def _train(trainer: Trainer, publisher: Publisher | None, stop: SignalHandler) -> None:
    if publisher:
        publisher.resume()
    signum = trainer.train(stop)
    _say_end(trainer, signum)
    if publisher:
        publisher.finish(trainer.step, stop)


def _say_end(trainer: Trainer, signum: int) -> None:
    config, step = trainer.config, trainer.step
    at = f"at step {step} of {config.optimization.max_steps}, saved; the same command continues"
    count = trainer.state.skipped_images
    skipped = f"; {count} samples had an image that cannot be read, and another in its place" if count else ""
    if step == config.optimization.max_steps:
        sentence = f"finished at step {step}; the model is in {config.run.output_dir}{skipped}"
    elif signum:
        raise StoppedError(f"stopped by {signal.Signals(signum).name} {at}{skipped}", signum)
    else:
        sentence = f"stopped after max_hours {config.optimization.max_hours} {at}{skipped}"
    if trainer.accelerator.is_main_process:
        say(sentence)


def make_trainer(
    config: TrainConfig, run: Run | None, accelerator: Accelerator, to: HubConfig | None = None, chosen: Collection[str] = ()
) -> tuple[Trainer, Publisher | None]:
    """A training at the step where its run directory stands, and what pushes it; arguments as of `run_training`.

    Raises:
        InputError: configuration, data and checkpoint do not fit each other or the machine.
    """
    return build(prepare(config, run.resume if run else None, accelerator, chosen), run, accelerator, to)


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
    from ..tasks.text_to_image import TextToImageTask  # with transformers, which pixel models do not need

    config, base = base_of_run(config, found, chosen, accelerator)
    objective = _objective(config, found, accelerator)
    source = open_data(config, found, first=accelerator.is_main_process)
    monitor = _monitor(config, source, accelerator) if config.run.eval_every else None
    if monitor:
        config = update(config, {"eval_images": monitor.count})
    trained, held_out = _split(config, captioned(config, source, found, accelerator), accelerator)
    with told_by_the_first(accelerator):
        require_captions(trained)
    task = TextToImageTask(config, base, trained, accelerator, held_out)
    if monitor:
        with told_by_the_first(accelerator):
            monitor.check(task.conditions(monitor.count, as_in_data=True))
    if accelerator.is_main_process:
        task.say_data()
    config = _with_max_steps(config, task, found, accelerator)
    return Plan(config, found, objective, task, monitor, num_threads)


def build(plan: Plan, run: Run | None, accelerator: Accelerator, to: HubConfig | None = None) -> tuple[Trainer, Publisher | None]:
    """Network, optimizer and all that goes with a training, as the checkpoint has them; other arguments as of `run_training`.

    Without `run` in any process nothing is written, by this or by the training.

    Raises:
        InputError: the network is not that of the checkpoint, or of `init`.
    """
    config, found, objective, task, monitor = plan.config, plan.found, plan.objective, plan.task, plan.monitor
    task.prepare()
    uncertainty = Uncertainty(len(objective.schedule)) if config.objective.learned_uncertainty else None
    network = _network(task, config.optimization, found, accelerator, uncertainty)
    # For exporting and drawing: the same modules and tensors, without what `accelerator.prepare` does to `forward`; without tensors where
    # they are about to be sharded.
    unwrapped = state_dicts.with_weights(network, state_dicts.without_memory(network) if device.sharded(accelerator) else {})
    state = TrainingState(
        _wrapped(network, config.optimization, accelerator),
        _optimizer_step(task, network, config.optimization, accelerator),
        make_timestep_sampler(config.objective, objective.schedule, config.optimization.batch_size),
        LossStatistics(len(objective.schedule), accelerator.device),
        trained_alone=config.lora.lora_rank is not None,
        uncertainty=uncertainty,
    )
    constants = _constants(config, found, accelerator, objective, task) | {"num_threads": plan.num_threads}
    if found:
        found = dataclasses.replace(found, state={**found.state, CHANGES: constants.get(CHANGES, [])})
        if accelerator.is_main_process:
            _require_same_training(found, constants, config)
        state_dicts.restore(found, state, accelerator.is_main_process)
        state.skipped_images = found.state.get(SKIPPED, 0)
        if accelerator.scaler is not None and found.state["scaler"]:  # none where the run has just been changed to fp16
            accelerator.scaler.load_state_dict(found.state["scaler"])
    step = found.step if found else 0
    if run:
        if found:
            say(f"resuming {run.folder} at step {step} of {config.optimization.max_steps}")
        run.begin(config, constants.get(CHANGES, ()))
        parameters = state.optimizer_step.parameters
        weights = sum(p.nbytes for p in parameters)
        ema = state.optimizer_step.ema
        averages = sum(tensor.nbytes for kind in (ema.averages, ema.power_averages) for each in kind.values() for tensor in each.values())
        device.warn_of_little_space(run.folder, weights + averages + state_bytes(config.optimization.optimizer, parameters))
    if monitor:
        with told_by_the_first(accelerator):
            monitor.read(task.data.source)
    publisher = Publisher(run.folder, to, step) if run and to else None
    saver = Saver(run, config, task, unwrapped, accelerator.device, publisher) if run else None
    positions = _positions(config.optimization, accelerator, found)
    checkpointer = Checkpointer(config, run, accelerator, saver, state, constants, positions, step)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        task=task,
        objective=objective,
        state=state,
        positions=positions,
        checkpointer=checkpointer,
        hooks=[*_ema_hooks(config, run, task, objective, unwrapped, network, state, monitor, accelerator), checkpointer],
        step=step,
    )
    return trainer, publisher


# ---- configuration and data ------------------------------------------------------------------------------------------


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


def _paths(config: TrainConfig, names: tuple[str, ...] = PINNED) -> dict[str, str]:
    """Where the data and the first weights of a run are, as far as they are on this disk."""
    values = flatten(config)
    ids = {name: is_dataset_id if name == "dataset" else is_model_id for name in names}
    there = {
        name: values[name] for name in names if values[name] and values[name] not in EMBEDDED and not shard_names.is_remote(values[name])
    }
    return {name: absolute_path(value) for name, value in there.items() if not ids[name](value)}


def _objective(config: TrainConfig, found: Checkpoint | None, accelerator: Accelerator) -> Objective:
    """The objective; refused where sampling could not start from noise, but a run of a version without this check is only warned."""
    objective = make_objective(config.objective)
    if found is None:
        with told_by_the_first(accelerator):
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
    with told_by_the_first(accelerator):
        raise_all(train_problems(config, accelerator.num_processes), said)
    if accelerator.is_main_process:
        say(f"{said}: max_steps is {steps}")
    return config


def _open_task(
    config: TrainConfig, source: Source, channels: int | None, found: Checkpoint | None, accelerator: Accelerator
) -> tuple[TrainConfig, Task, Monitor | None]:
    """The configuration with what the metrics need, the task with its data, and what measures it; `channels` as typed."""
    monitor = _monitor(config, source, accelerator) if config.run.eval_every else None  # before the images are read
    if monitor:
        config = update(config, {"eval_images": monitor.count})
    learned = update(config, {"channels": channels})  # `config` has the run's own value, which may be None
    source, channels = readable(config, source, found, channels, accelerator)
    trained, held_out = _split(config, source, accelerator)
    return config, PixelTask(learned, trained, channels, held_out), monitor


def _split(config: TrainConfig, source: Source, accelerator: Accelerator) -> tuple[Source, Source | None]:
    """The images that are trained, and those that are held out; how many is said."""
    with told_by_the_first(accelerator):
        trained, held_out = split_source(source, config.data.validation_split, config.optimization.seed)
    if held_out and accelerator.is_main_process:
        say(f"validation_split {config.data.validation_split}: {len(held_out)} images are held out, {len(trained)} are trained")
    return _repeated(config, trained, accelerator), held_out


def _repeated(config: TrainConfig, source: Source, accelerator: Accelerator) -> Source:
    """The source with the images of folders that name a number of repeats as often; how many there then are is said."""
    if not config.data.folder_repeats:
        return source
    with told_by_the_first(accelerator):
        repeated = RepeatedSource(source, folder_repeats(source))
        if not len(repeated):
            raise InputError("folder_repeats is on, and all folders have names that begin with 0_, so that no image is trained; rename one")
    if accelerator.is_main_process:
        say(f"folder_repeats: {len(repeated)} samples an epoch, of {len(source)} images")
    return repeated


def _monitor(config: TrainConfig, source: Source, accelerator: Accelerator) -> Monitor:
    from ..evaluation.monitor import Monitor  # with torch-fidelity, whose import takes seconds that a run without figures need not wait

    made: list[Monitor] = []

    def make() -> list[None]:
        made.append(Monitor(config, source, accelerator.device, accelerator.process_index, accelerator.num_processes))
        return []

    with told_by_the_first(accelerator):
        gather_from_all(make, accelerator.num_processes)
    return made[0]


# ---- network ---------------------------------------------------------------------------------------------------------


def _network(
    task: Task, optim: OptimizationConfig, found: Checkpoint | None, accelerator: Accelerator, uncertainty: Uncertainty | None
) -> nn.Module:
    """The network on its device, with fresh weights or those of `init`; a learned uncertainty becomes a part of it."""
    torch.manual_seed(seeding.derive_seed(optim.seed, "weights", 0))
    network = task.build()
    if optim.init and found is None:
        warnings = task.load(network, optim.init)
        for sentence in (*(f"warning: {warning}" for warning in warnings), f"starting from the weights of {optim.init}"):
            if accelerator.is_main_process:
                say(sentence)
    if uncertainty is not None:  # so that whatever trains, averages and saves a network does the same with it
        network.add_module(UNCERTAINTY_MODULE, uncertainty)
    if optim.param_dtype == "bf16":
        network.bfloat16()  # not by .to(), for which diffusers prints a warning
    return device.to_train(network, accelerator, optim.optimizer)


def _wrapped(network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> nn.Module:
    """The network as it is called in training: mixed precision, DDP, gradient checkpointing, compiled."""
    model: nn.Module = device.to_shards(network, accelerator) if device.sharded(accelerator) else accelerator.prepare(network)
    if optim.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    if optim.compile:  # in place, so that weights keep their names; within DDP, which then exchanges while it computes
        _compile(network, optim, accelerator)
    return model


def _compile(network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> None:
    if getattr(network, "_repeated_blocks", None):  # of which diffusers compiles one for all: minutes less
        network.compile_repeated_blocks(mode=optim.compile_mode)  # type: ignore[operator]
    elif accelerator.device.type == "cuda" and device.memory_format(accelerator, optim.optimizer) == torch.channels_last:
        compile_channels_last(network, optim.compile_mode)
    else:
        network.compile(mode=optim.compile_mode)


def _optimizer_step(task: Task, network: nn.Module, optim: OptimizationConfig, accelerator: Accelerator) -> OptimizerStep:
    """Optimizer and averages over the parameters as they are after the network was wrapped."""
    trained = task.trained(network)
    ema = EMA(trained, optim.ema_decay, optim.ema_warmup, optim.ema_on_cpu, KEPT if optim.post_hoc_ema else ())
    if optim.ema_on_cpu and accelerator.device.type == "cpu" and accelerator.is_main_process:
        say("ema_on_cpu changes nothing here: the averages of a training on a CPU are in main memory anyway")
    # A loss that is not finite is never the search of fp16 for its scale, an overflowing gradient may be.
    step = OptimizerStep(list(trained.values()), ema, optim, SKIPS_IN_A_ROW - 1 if accelerator.scaler is not None else 0)
    if accelerator.scaler is not None:
        accelerator.prepare(step.optimizer)
    return step


def micro_batch_size(config: OptimizationConfig, num_processes: int) -> int:
    """Samples of one forward in one process: what is asked for, but no more than its share of a step."""
    share = config.batch_size // num_processes
    return min(share, config.micro_batch_size or share)


def _positions(optim: OptimizationConfig, accelerator: Accelerator, found: Checkpoint | None) -> PositionBatchSampler:
    """The positions of this process from a checkpoint on, whatever the batch sizes were before it."""
    size, processes = micro_batch_size(optim, accelerator.num_processes), accelerator.num_processes
    step, position = (found.step, found.state["position"]) if found else (0, 0)
    steps, origin = range(step, optim.max_steps), position - step * optim.batch_size
    return PositionBatchSampler(optim.batch_size, size, accelerator.process_index, processes, steps, origin)


def _ema_hooks(
    config: TrainConfig,
    run: Run | None,
    task: Task,
    objective: Objective,
    unwrapped: nn.Module,
    network: nn.Module,
    state: TrainingState,
    monitor: Monitor | None,
    accelerator: Accelerator,
) -> list[Hook]:
    """What draws with the averaged weights, and what measures them, which share these weights."""
    rate, ema = config.optimization.ema_decay[0], state.optimizer_step.ema
    averaged, present = state_dicts.evaluated(unwrapped, network, ema, rate, accelerator.device)
    batch_size = micro_batch_size(config.optimization, accelerator.num_processes)
    images = EmaImages(task, averaged, accelerator, batch_size, present)
    hooks: list[Hook] = [SampleGrid(config.run.sample_every, images, run)]
    if task.held_out:
        sampler = final_timestep_sampler(config.objective, objective.schedule)  # so that the losses of a run can be compared
        density = sampler.probabilities * sampler.corrections
        every = config.run.validation_every
        hooks.append(ValidationLoss(every, task, averaged, objective, density, accelerator, batch_size, present))
    if monitor:
        hooks.append(Evaluation(config.run.eval_every, images, monitor, state.measured, run))
    return hooks


# ---- checkpoint ------------------------------------------------------------------------------------------------------


def _constants(config: TrainConfig, found: Checkpoint | None, accelerator: Accelerator, objective: Objective, task: Task) -> dict[str, Any]:
    """What state.json says at every step: processes, versions, data, network, loss weights and configuration."""
    # Fields that the run began before, which it goes on without: what is resumed tells by them what may be asked of it.
    older = BEFORE_THE_FIELD.keys() - found.state["config"].keys() if found else set()
    data = broadcast_from_first(task.data.source.fingerprint, accelerator)  # which looks at every file of a folder
    paths = {name: path for name, path in found.state.get("paths", {}).items() if name not in found.changing} if found else {}
    return {
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "versions": device.versions(),
        "data": data,
        "paths": paths | _paths(config, tuple(name for name in PINNED if name != "init") if found else PINNED),
        "weights": _some_weights(objective),
        "config": {name: value for name, value in stored(config).items() if name not in older},
        **({CHANGES: changes} if (changes := _changes(config, found, data)) else {}),
        **task.state(),
    }


def _changes(config: TrainConfig, found: Checkpoint | None, data: dict[str, Any]) -> list[Change]:
    """What --allow_change has changed so far: at this step also the files of the data, and names on the Hub with their commit."""
    if found is None:
        return []
    values, changes = stored(config), found.state.get(CHANGES, [])
    changes = [c | {"after": values[c["name"]]} if c["step"] == found.step and c["name"] in PINNED else c for c in changes]
    other = {"step": found.step, "name": DATA, "before": found.state["data"], "after": data}
    return changes if data == found.state["data"] or other in changes else [*changes, other]


def _some_weights(objective: Objective) -> dict[str, float]:
    """Loss weights at a few timesteps, to six digits, so that rounding on other hardware does not matter."""
    weights, T = objective.weights, len(objective.schedule)
    if weights is None:
        return {}
    some = {f"weight at t = {t}": weights[t] for t in (0, T // 4, T // 2, 3 * T // 4, T - 1)} | {"mean weight": weights.mean()}
    return {name: float(f"{value:.6g}") for name, value in some.items()}


def _require_same_training(found: Checkpoint, now: dict[str, Any], config: TrainConfig) -> None:
    """Refuses another network or weighting behind the same names, and says what else is not as it was."""
    optim, where = config.optimization, f"run directory {config.run.output_dir}"
    # The file behind --model_config may have changed, though its name has not.
    allowed = {name: value for name, value in now["network"].items() if name in found.changing}  # the dropout rate
    raise_all(differences(found.state["network"] | allowed, now["network"]), f"{where} holds another network")
    if found.state.get("frozen_parts") != now.get("frozen_parts"):  # pixel models have none
        parts = "UNet, text encoders" if config.lora.lora_rank else "text encoders"
        raise InputError(
            f"{where} was trained with other files of {parts}, tokenizers or VAE than those of base_model {config.text.base_model} now; "
            f"put them back, or name another --output_dir"
        )
    if not found.changing & state_dicts.OBJECTIVE:
        # A function that was registered may have changed, though its name has not.
        other = differences(found.state.get("weights", now["weights"]), now["weights"])
        raise_all(other, f"{where} holds another weighting", "put it back, or name another --output_dir")
    device.say_what_changed(found.state, now)
    if (before := found.state["config"]["max_steps"]) != optim.max_steps and optim.lr_schedule != "constant":
        say(f"warning: max_steps was {before}, now it is {optim.max_steps}: the learning rate falls to 0 there")
