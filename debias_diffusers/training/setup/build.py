"""Building a training from its plan, as a checkpoint has it, and running it."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn

from ...config.loading import CHANGES
from ...config.schema.hub import HubConfig
from ...config.schema.training import OptimizationConfig, TrainConfig
from ...data.dataset import PositionBatchSampler
from ...diffusion.loss import Objective
from ...diffusion.timestep_samplers import make_timestep_sampler, objective_density
from ...diffusion.uncertainty import Uncertainty
from ...errors import InputError, StoppedError
from ...hub.publish import Publisher
from ...runs.checkpoints import Checkpoint, folder_name
from ...runs.run_directory import SKIPPED, Run
from ...tasks.base import Task
from ...utils.console import say
from ...utils.distributed import broadcast_from_first, told_by_the_first
from ...utils.signals import SignalHandler
from ...utils.torch_errors import explained_torch_errors
from .. import device, state_dicts
from ..hooks import Checkpointer, EmaImages, Evaluation, Hook, SampleGrid, ValidationLoss
from ..loss_statistics import LossStatistics
from ..optimizer_step import SKIPPED_IN_A_ROW, OptimizerStep, state_bytes
from ..saver import Saver
from ..state_dicts import TrainingState
from ..trainer import Callback, Trainer
from .network import make_network, make_optimizer_step, wrapped
from .plan import Plan, prepare
from .state import constants_of, require_same_training

if TYPE_CHECKING:
    from ...evaluation.monitor import Monitor


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
        run: the run directory; None in all processes but the first.
        stop: remembers signals, already since before torch was imported.
        to: where the first process pushes to, as the Hub allowed it; None where nothing is pushed.
        chosen: fields whose values `config.choices` decides in a new run.
        callback: called in the first process after each step.

    Raises:
        DebiasError: of the kind that tells what stopped it; StoppedError after a signal, saved.
    """
    with accelerated(config) as accelerator:
        stop.record()
        trainer, publisher = make_trainer(config, run, accelerator, to, chosen)
        trainer.callback = callback if accelerator.is_main_process else None
        _train(trainer, publisher, stop)


@contextlib.contextmanager
def accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """The `Accelerator` of a training, to its end. Errors of torch within become a DebiasError where their cause is known.

    An InputError, which all processes meet as they read the same files, the first one says; memory may be short in one of them.
    """
    accelerator = device.start_accelerator(config)
    size = micro_batch_size(config.optimization, accelerator.num_processes)
    try:
        with explained_torch_errors("--micro_batch_size", size, config.run.ddp_timeout), told_by_the_first(InputError):
            yield accelerator
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


def build(plan: Plan, run: Run | None, accelerator: Accelerator, to: HubConfig | None = None) -> tuple[Trainer, Publisher | None]:
    """Network, optimizer and all that goes with a training, as the checkpoint has them; other arguments as of `run_training`.

    Without `run` in any process nothing is written, by this or by the training.

    Raises:
        InputError: the network is not that of the checkpoint, or of `init`.
    """
    config, found, objective, task, monitor = plan.config, plan.found, plan.objective, plan.task, plan.monitor
    positions = _positions(config.optimization, accelerator, found)
    step = found.step if found else 0
    task.prepare(positions.of_step(step) if config.run.dry_run else None)
    uncertainty = Uncertainty(len(objective.schedule)) if config.objective.learned_uncertainty else None
    network = make_network(task, config.optimization, found, accelerator, uncertainty)
    # For exporting and drawing: the same modules and tensors, without what `accelerator.prepare` does to `forward`; without tensors where
    # they are about to be sharded.
    unwrapped = state_dicts.with_weights(network, state_dicts.without_memory(network) if device.sharded(accelerator) else {})
    state = TrainingState(
        wrapped(network, config.optimization, accelerator),
        make_optimizer_step(network, config.optimization, accelerator),
        make_timestep_sampler(config.objective, objective.schedule, config.optimization.batch_size),
        LossStatistics(len(objective.schedule), accelerator.device),
        trained_alone=config.lora.lora_rank is not None,
        uncertainty=uncertainty,
    )
    constants = constants_of(config, found, accelerator, objective, task) | {"num_threads": plan.num_threads}
    if found:
        _restore(found, state, constants, config, accelerator)
    broadcast_from_first(lambda: _begin(run, config, constants, state) if run else None, accelerator)
    if monitor:
        with told_by_the_first():
            monitor.read(task.data.source)
    publisher = Publisher(run.folder, to, step) if run and to else None
    saver = Saver(run, config, task, unwrapped, accelerator.device, publisher) if run else None
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


def _begin(run: Run, config: TrainConfig, constants: Mapping[str, Any], state: TrainingState) -> None:
    """What the first process says and writes before the first step."""
    if run.resume:
        say(f"resuming {run.folder} at step {run.resume.step} of {config.optimization.max_steps}")
    run.begin(config, constants.get(CHANGES, ()))
    device.warn_of_little_space(run.folder, _checkpoint_bytes(state.optimizer_step, config.optimization))


def _restore(found: Checkpoint, state: TrainingState, constants: dict[str, Any], config: TrainConfig, accelerator: Accelerator) -> None:
    """Puts the tensors of a checkpoint back, and what else it has of a training.

    Raises:
        InputError: it is of another training.
    """
    found = dataclasses.replace(found, state={**found.state, CHANGES: constants.get(CHANGES, [])})
    broadcast_from_first(lambda: require_same_training(found, constants, config), accelerator)
    state_dicts.restore(found, state, accelerator.process_index, accelerator.num_processes)
    best = state.measured.best
    if config.run.keep_best and best and not (found.path.parent / folder_name(best["step"])).is_dir():
        state.measured.best = None  # it was not kept, as before a start with --keep_best
    state.skipped_images = found.state.get(SKIPPED, 0)
    if accelerator.scaler is not None and found.state["scaler"]:  # none where the run has just been changed to fp16
        accelerator.scaler.load_state_dict(found.state["scaler"])
        state.optimizer_step.skips.fill_(found.state.get(SKIPPED_IN_A_ROW, 0))


def _checkpoint_bytes(step: OptimizerStep, optim: OptimizationConfig) -> int:
    """What weights, averages and the state of the optimizer take on the disk."""
    averages = sum(
        tensor.nbytes for kind in (step.ema.averages, step.ema.power_averages) for each in kind.values() for tensor in each.values()
    )
    return sum(p.nbytes for p in step.parameters) + averages + state_bytes(optim.optimizer, step.parameters)


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
        density = objective_density(config.objective, objective.schedule)  # of the last steps, so that losses of a run can be compared
        every = config.run.validation_every
        hooks.append(ValidationLoss(every, task, averaged, objective, density, accelerator, batch_size, present))
    if monitor:
        hooks.append(Evaluation(config.run.eval_every, images, monitor, state.measured, run))
    return hooks
