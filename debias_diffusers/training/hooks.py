"""What happens at intervals of a training: sample grids, validation losses, metrics of what the EMA weights draw, checkpoints."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.schema.objective import ObjectiveConfig
from ..config.schema.training import TrainConfig
from ..data import images
from ..data.dataset import PositionBatchSampler, load_batch
from ..diffusion.loss import Objective
from ..diffusion.noise_schedule import at
from ..diffusion.timestep_samplers import make_timestep_sampler
from ..diffusion.uncertainty import NAME as UNCERTAINTY_MODULE
from ..errors import CannotWriteError, InputError, NotFiniteError, reason
from ..evaluation.image_sets import process_batches
from ..runs import checkpoints
from ..runs.run_directory import SAMPLES, SKIPPED, Run
from ..tasks.base import Task
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, gather_from_all, told_by_the_first
from ..utils.files import temporary_path, translate_write_errors, write_file
from ..utils.sharding import write_shards
from . import state_dicts
from .logger import Logger
from .optimizer_step import SKIPPED_IN_A_ROW
from .saver import Saver, Tensors
from .state_dicts import MetricHistory, TrainingState

if TYPE_CHECKING:
    from ..evaluation.monitor import Monitor

# Of 20 steps of the solver, one or two network evaluations each. At default intervals (1000 steps of 64 images, forward and backward,
# which take three forwards) a grid has 320 to 640 forwards of an image where training has 192 000: 0.2 to 0.3%.
GRID_IMAGES = 16

# What may go wrong with images of weights that are still trained, without an end of the training.
_DRAWING_ERRORS = (InputError, NotFiniteError, torch.linalg.LinAlgError, torch.OutOfMemoryError)

Present = Callable[[], contextlib.AbstractContextManager[None]]  # within which a network has its weights, as of `state_dicts.evaluated`


class Hook(Protocol):
    """Something that all processes do every so many steps."""

    @property
    def every(self) -> int:
        """Steps between two calls; 0 is never."""

    def __call__(self, step: int, logger: Logger) -> None:
        """Does it, after `step` steps."""


class EmaImages:
    """Images that the EMA weights of the first rate draw, always from the seeds 0, 1, ...; each process draws its share."""

    def __init__(
        self, task: Task, network: nn.Module, accelerator: Accelerator, batch_size: int, present: Present = contextlib.nullcontext
    ) -> None:
        """`network` has the EMA weights within `present`; `batch_size` images are drawn at once, as many as the training computes with."""
        self.task, self.network, self.accelerator, self.batch_size, self.present = task, network, accelerator, batch_size, present

    def batches(self, count: int, conditions: Sequence[Any]) -> Iterator[tuple[int, Tensor, Sequence[Any] | None]]:
        """This process's share of `count` images: number of the batch, (B, C, H, W) uint8, and the B conditions if there are any."""
        processes = self.accelerator.num_processes
        size = min(self.batch_size, -(-count // processes))
        with self.present():
            for number, indices in process_batches(range(count), size, self.accelerator.process_index, processes):
                images_of_batch = self.task.draw(self.network, indices, conditions)
                yield number, images_of_batch, [conditions[k % len(conditions)] for k in indices] if conditions else None


@dataclass
class SampleGrid:
    """A picture of images from the same seeds, a class a row: samples/step-NNNNNNNN.png of the run directory."""

    every: int
    images: EmaImages
    run: Run | None  # None in all processes but the first

    def __call__(self, step: int, logger: Logger) -> None:
        """Draws and writes; an error is said and the training goes on."""
        try:
            conditions = self.images.task.conditions(GRID_IMAGES, as_in_data=False)[:GRID_IMAGES]
            rows = max(1, len(conditions))
            count = GRID_IMAGES // rows * rows  # as many of each condition
            batches = gather_from_all(lambda: list(self.images.batches(count, conditions)), self.images.accelerator.num_processes)
            if self.run:
                arrays = [image for _, batch, _ in sorted(batches, key=lambda batch: batch[0]) for image in batch.numpy()]
                drawn, names = [images.from_array(array) for array in arrays], self.images.task.condition_names(conditions)
                picture = images.named_grid(names, [drawn[k::rows] for k in range(rows)]) if conditions else images.grid(drawn)
                path = self.run.folder / SAMPLES / f"{checkpoints.folder_name(step)}.png"
                write_file(path, images.png(picture))
                logger.log_picture(step, path, picture)
        except (CannotWriteError, *_DRAWING_ERRORS) as error:
            if self.run:
                say(f"no sample grid at step {step}: {reason(error)}")


@dataclass
class Evaluation:
    """Metrics of what the EMA weights draw, against the training images."""

    every: int
    images: EmaImages
    monitor: Monitor
    measured: MetricHistory
    run: Run | None  # None in all processes but the first

    def __call__(self, step: int, logger: Logger) -> None:
        """Draws, measures and logs."""
        logger.log_metrics(step, self.measure(step))

    def measure(self, step: int) -> dict[str, float]:
        """The figures by name; {} in all processes but the first, and where the weights drew nothing finite."""
        try:
            conditions = self.images.task.conditions(self.monitor.count, as_in_data=True)
            figures = self.monitor.figures(self.images.batches(self.monitor.count, conditions))
        except _DRAWING_ERRORS as error:
            if self.run:
                say(f"no figures at step {step}: {reason(error)}")
            return {}
        if not self.run:
            return {}
        self.measured.last = {"step": step, "by": self.monitor.about, "figures": figures}
        self._remember_best(step, *next(iter(figures.items())))
        return figures

    def _remember_best(self, step: int, name: str, value: float) -> None:
        """The first metric decides. A best of another one says nothing: a checkpoint's may be of other --eval_metrics."""
        from ..evaluation.metrics import as_loss  # with torch-fidelity, whose import takes seconds that a run without figures need not wait

        loss, by, best = as_loss(name, value), {"figure": name, **self.monitor.about}, self.measured.best
        if math.isfinite(loss) and (best is None or best.get("by") != by or loss < best["value"]):
            self.measured.best = {"step": step, "value": loss, "by": by}


class ValidationLoss:
    """The loss of the EMA weights on images that are held out of training, each time with the same noise and timesteps.

    `validation_loss` estimates the objective of the training, `validation_mse` its mean square error without weights, at timesteps that
    are drawn equally often: image k of N from the k-th of N equal parts of them.
    """

    def __init__(
        self,
        every: int,
        task: Task,
        network: nn.Module,
        objective: Objective,
        density: Tensor,
        accelerator: Accelerator,
        batch_size: int,
        present: Present = contextlib.nullcontext,
    ) -> None:
        """`network` has the EMA weights within `present`; `density` (T,) float64 is that of the timesteps in the objective."""
        assert task.held_out is not None
        self.every, self.task, self.held_out, self.network = every, task, task.held_out, network
        self.objective, self.accelerator, self.batch_size, self.present = objective, accelerator, batch_size, present
        self.count = len(task.held_out.source)
        self.density = len(density) * density
        self.timesteps = make_timestep_sampler(ObjectiveConfig(timestep_sampler="stratified"), objective.schedule, self.count)

    def __call__(self, step: int, logger: Logger) -> None:
        """Measures and logs; weights whose loss is not finite are said."""
        losses, squares = self.measure()
        if math.isfinite(losses):
            logger.log_values(step, {"validation_loss": losses, "validation_mse": squares})
        elif self.accelerator.is_main_process:
            say(f"no validation loss at step {step}: it is {losses}")

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Mean loss and mean square error, the same in all processes, which share the images."""
        processes = self.accelerator.num_processes
        size = min(self.batch_size, -(-self.count // processes))
        batches = process_batches(range(self.count), size, self.accelerator.process_index, processes)
        parts = (part for _, indices in batches for part in self.held_out.one_shape(indices))
        with self.present():
            found = gather_from_all(lambda: [each for part in parts for each in self._losses(part)], processes)
        losses, squares = zip(*found)
        return math.fsum(losses) / self.count, math.fsum(squares) / self.count

    def _losses(self, indices: Sequence[int]) -> list[tuple[float, float]]:
        """Loss and mean square error of each of these images."""
        device, batch = self.accelerator.device, load_batch(self.held_out, indices)
        t, x_0 = self.timesteps.draw(batch["u"], indices), self.task.x_0(batch, device)
        network, uncertainty = self.task.conditioned(self.network, batch, device), getattr(self.network, UNCERTAINTY_MODULE, None)
        terms = self.objective(network, x_0, batch["noise"].to(device), t, uncertainty=uncertainty)
        return list(zip((at(self.density, t, terms.loss) * terms.loss).tolist(), terms.mse.tolist()))


class Checkpointer:
    """Saves steps, in the first process beside the training, and knows in all processes which step is saved."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run | None,
        accelerator: Accelerator,
        saver: Saver | None,
        state: TrainingState,
        constants: Mapping[str, Any],
        positions: PositionBatchSampler,
        step: int,
    ) -> None:
        """`run` and `saver` are None in all processes but the first; `constants` of state.json are the same at every step."""
        self.positions = positions
        self.config, self.run, self.accelerator, self.saver = config, run, accelerator, saver
        self.state, self.constants = state, constants
        self.every = config.run.checkpoint_every
        self.saved_step = self.saving_step = step  # the second is that of the save under way, where there is one
        self._saved_best = self._saving_best = state.measured.best  # as of these steps
        self._checksums = (step, state.optimizer_step.ema.checksums())  # of the averages, as of the start or the last save
        self._warned = False

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.saver:
            self.saver.__exit__(*error)

    def check(self) -> None:
        """Raises what a save beside the training raised."""
        if self.saver:
            self.saver.check()

    def __call__(self, step: int, logger: Logger) -> None:
        """Saves, except the last step, which `Trainer.train` saves with `final`."""
        if step < self.config.optimization.max_steps:
            self.save(step)

    @told_by_the_first()
    def save(self, step: int, final: bool = False) -> None:
        """Exports the pipeline and writes the checkpoint, with which the step counts as saved; beside the training where memory allows.

        A save that fails is said and tried again at the next interval; the last one must succeed.

        Raises:
            CannotWriteError: the last one failed.
        """
        self._finish()
        if step == self.saved_step:
            return
        try:
            tensors, shards = self._tensors(step)
        except CannotWriteError as error:
            if final:
                raise
            if self.run:
                say(f"step {step} was not saved: {error}; training goes on")
            self.state.measured.best = self._saved_best
            return
        statistics = self.state.statistics.state(self.accelerator.gather)
        self.saving_step, self._saving_best = step, self.state.measured.best
        # All wait until it has begun, or is done where there is no memory for a copy beside the training.
        broadcast_from_first(lambda: self._begin(step, tensors, shards, statistics, final), self.accelerator)
        if final:
            self._finish(final=True)

    def _tensors(self, step: int) -> tuple[Tensors, Path | None]:
        """What is to be saved, and the folder with the files that the processes have written of it, if each writes its own.

        Raises:
            CannotWriteError: in all processes, if one cannot write.
        """
        if not self.config.run.sharded_checkpoints:
            return state_dicts.gather(self.state), None
        shards = broadcast_from_first(lambda: self._folder_of_shards(step), self.accelerator)
        if isinstance(shards, CannotWriteError):
            raise shards
        try:
            write_shards(state_dicts.shards(self.state), shards)
        except CannotWriteError:
            if self.run:
                shutil.rmtree(shards, ignore_errors=True)
            raise
        return state_dicts.exported(self.state, self.config.optimization.ema_decay[0]), shards

    def _folder_of_shards(self, step: int) -> Path | CannotWriteError:
        """A new folder beside the checkpoints, or why there is none. One that a kill leaves behind is removed at the next start."""
        assert self.run
        folder = temporary_path(self.run.checkpoints / checkpoints.folder_name(step))
        try:
            with translate_write_errors(folder):
                folder.mkdir(parents=True)
        except CannotWriteError as error:
            return error
        return folder

    def _begin(self, step: int, tensors: Tensors, shards: Path | None, statistics: Mapping[str, Any], final: bool) -> None:
        if self.saver:
            self._warn_if_averages_stand_still(step)
            self.saver.save(tensors, {**self._state_json(step), "window": statistics}, final, shards)

    def _state_json(self, step: int) -> dict[str, Any]:
        """What state.json says of a step beside the tensors and statistics."""
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "position": self.positions.first(step),
            "scaler": scaler.state_dict() if scaler is not None else None,
            **({SKIPPED_IN_A_ROW: int(self.state.optimizer_step.skips)} if scaler is not None else {}),
            "best": self.state.measured.best,
            "measured": self.state.measured.last,
            **({SKIPPED: self.state.skipped_images} if self.state.skipped_images else {}),
            **self.constants,
        }

    def _finish(self, final: bool = False) -> None:
        """Waits for the save under way, if there is one; raises CannotWriteError where the final one failed."""
        if self.saving_step == self.saved_step:
            return
        # All must know whether to gather again.
        problem = broadcast_from_first(lambda: self.saver.result() if self.saver else None, self.accelerator)
        if problem is None:
            self.saved_step, self._saved_best = self.saving_step, self._saving_best
        elif final:
            raise CannotWriteError(problem)
        elif self.state.measured.best is self._saving_best and not self._is_there(self.saving_step):
            self.state.measured.best = self._saved_best
        self.saving_step = self.saved_step

    def _is_there(self, step: int) -> bool:
        """Whether the first process sees the checkpoint of a step, after which a save can still fail, as at the removal of an older one."""
        return self.run is not None and (self.run.checkpoints / checkpoints.folder_name(step)).is_dir()

    def _warn_if_averages_stand_still(self, step: int) -> None:
        """Says once which averages have not changed since the last save, though they should at every step."""
        (since, before), now = self._checksums, self.state.optimizer_step.ema.checksums()
        still = [str(rate) for rate in now if now[rate] == before[rate]]
        if still and not self._warned:
            self._warned = True
            say(
                f"warning: the averaged weights of ema_decay {', '.join(still)} have not changed from step {since} to {step}: what is "
                f"exported is not what is trained; a larger --learning_rate or a smaller --ema_decay moves them"
            )
        self._checksums = (step, now)
