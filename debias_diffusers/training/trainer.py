"""The training loop. What is trained is a task, what happens at intervals is a hook; both are handed in."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.schema.training import OptimizationConfig, TrainConfig
from ..data.dataset import PositionBatchSampler, micro_batches
from ..diffusion.loss import Objective, Terms
from ..diffusion.noise_schedule import at
from ..errors import CannotWriteError, DebiasError, FetchError, InputError, NotFiniteError
from ..tasks.base import Batch, Task
from ..utils import seeding
from ..utils.console import say
from ..utils.distributed import gather_from_all, told_by_the_first
from ..utils.signals import SignalHandler
from ..utils.tensor_memory import sent
from . import device
from .device import Fetched
from .hooks import Checkpointer, Hook
from .logger import Logger, due
from .state_dicts import TrainingState

DATA_ERRORS = (InputError, FetchError)  # that a run ends with after it has saved

Callback = Callable[[int, dict[str, float]], None]  # with optimizer steps, and loss, learning rate and gradient norm of the last one


@dataclass(frozen=True)
class Told:
    """What the processes have told each other in a step, the same in all."""

    signum: int = 0  # the largest of all, or 0
    out_of_time: bool = False  # of any
    skipped: int = 0  # images replaced, of all together

    @property
    def stop(self) -> bool:
        """Whether the training ends with this step."""
        return bool(self.signum) or self.out_of_time


@dataclass(frozen=True)
class PendingStep:
    """An optimizer step that the device may still be computing."""

    step: int  # optimizer steps, including this one
    learning_rate: float
    losses: list[tuple[Tensor, Tensor]]  # timesteps and losses of its micro-batches
    numbers: Fetched  # as `_launch` stacks them
    told: Told


@dataclass(kw_only=True)
class Trainer:
    """Trains a network to `max_steps`, from `step` on."""

    config: TrainConfig
    accelerator: Accelerator
    task: Task
    objective: Objective
    state: TrainingState
    positions: PositionBatchSampler
    checkpointer: Checkpointer
    hooks: Sequence[Hook]  # called after each step, in this order; the checkpointer last, so that it saves what was measured
    step: int = 0  # optimizer steps that are done
    callback: Callback | None = None  # called with the numbers of each step as soon as they are read
    _warned_of_zero: bool = False
    _unread: DebiasError | None = None  # why this process could not read its part of a step, after which no more is read
    _skipped: set[str] = field(default_factory=set)  # what has been said of images that were replaced

    def train(self, stop: SignalHandler) -> int:
        """Makes all steps that are left, or those until a signal or `max_hours`; returns the signal, or 0.

        On return the last step is saved.

        Raises:
            NotFiniteError: a loss or gradient is not finite.
            CannotWriteError: the last step cannot be saved.
            InputError: an image cannot be read.
            FetchError: a file of the data cannot be fetched.
            DebiasError: a data loader worker was lost.
        """
        optim, told = self.config.optimization, Told()
        deadline = time.monotonic() + optim.max_hours * 3600 if optim.max_hours else math.inf
        self._settle_ddp()
        batches = micro_batches(self.task.data, self.positions, pin_memory=self.accelerator.device.type == "cuda")
        pending: deque[PendingStep] = deque()
        logger = Logger(self.config, self.checkpointer.run, self.accelerator, self.step)
        with contextlib.closing(batches), logger, self.checkpointer:
            with self._saved_where_data_end():
                while self.step < optim.max_steps and not told.stop:
                    self.checkpointer.check()
                    try:
                        self.task.data.require_few_skipped(self.state.skipped_images, self.positions.first(self.step - len(pending)))
                        newest = self._launch(batches, stop.signum, time.monotonic() > deadline)
                    except DATA_ERRORS:
                        self._read_all(pending, logger)
                        raise
                    pending.append(newest)
                    while len(pending) > self._max_pending(newest):
                        told = self._read(pending.popleft(), logger)
                    with logger.paused():
                        for hook in self.hooks:
                            if due(self.step, hook.every):
                                hook(self.step, logger)
                self._read_all(pending, logger)
            self.checkpointer.save(self.step, final=True)
        return told.signum

    @contextlib.contextmanager
    def _saved_where_data_end(self) -> Iterator[None]:
        """Saves the last whole step where data cannot be read any more, and says so with the error."""
        try:
            yield
        except DATA_ERRORS as error:
            try:
                self.checkpointer.save(self.step, final=True)
            except CannotWriteError as problem:
                raise problem from error
            advice = "" if isinstance(error, FetchError) or self.config.data.skip_bad else ", with --skip_bad past this image"
            saved = f"; step {self.step} is saved, and the same command goes on from it{advice}" if self.step else ""
            with told_by_the_first():
                raise type(error)(f"{error}{saved}") from error

    def step_alone(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, waited for, and nothing else of a training. Raises NotFiniteError."""
        pending = self._launch(batches, 0, out_of_time=False)
        loss, grad_norm, aborted = pending.numbers.read()
        if aborted:
            raise self._not_finite(pending, loss, grad_norm)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _launch(self, batches: Iterator[Batch], signum: int, out_of_time: bool) -> PendingStep:
        """Starts the next step, without waiting for the device to compute it.

        Raises:
            DebiasError: in all processes, if the data of one cannot be read; nothing has changed then.
        """
        before = self.state.statistics.copy()
        try:
            own_loss, losses, told = self._gradients(batches, signum, out_of_time)
        except DATA_ERRORS:
            self.state.statistics = before
            raise
        loss, rate = self._mean(own_loss), learning_rate(self.config.optimization, self.step)
        grad_norm = self._update(loss, rate)
        self.step += 1
        numbers = torch.stack([number.to(loss.dtype) for number in (loss, grad_norm, self.state.optimizer_step.aborted)])
        return PendingStep(self.step, rate, losses, Fetched(numbers), told)

    def _gradients(self, batches: Iterator[Batch], signum: int, out_of_time: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Told]:
        """Computes the gradients of one step, averaged over the processes.

        Returns:
            The mean loss () of this process, the timesteps and losses (B,) of each of its micro-batches, and what all processes say.

        Raises:
            DebiasError: in all processes, if the data of one cannot be read.
        """
        total = torch.zeros((), device=self.accelerator.device)
        parts = self.positions.micro_batches(self.step)
        self.state.timestep_sampler.begin_step(self.step)
        corrections = self.state.timestep_sampler.corrections
        weights = corrections if self.objective.weights is None else corrections * self.objective.weights
        losses, skipped = [], 0
        for positions in parts:
            batch = self._next(batches, len(positions))
            skipped += self._say_skipped(batch)
            if positions is parts[-1]:  # before it is computed with: so the answers are there while the device still computes
                answers = self._tell(signum, out_of_time, skipped)
            # After the data loader, which takes from the global generator when it starts.
            seeding.seed_device(self.accelerator.device, seeding.derive_seed(self.config.optimization.seed, "dropout", positions.start))
            origin = self.positions.origin
            t = self.state.timestep_sampler.draw(batch["u"], range(positions.start - origin, positions.stop - origin))
            # Gradients are reduced over the processes with the last micro-batch only, but those of shards with each: whole, they would
            # take the memory that sharding saves.
            reduced = positions is parts[-1] or device.sharded(self.accelerator)
            sync = contextlib.nullcontext() if reduced else self.accelerator.no_sync(self.state.model)
            with sync:
                loss, terms = self._backward(batch, t, corrections)
            total += loss
            self.state.statistics.add(t, terms, weights)
            losses.append((t, terms.loss))
        largest, any_out_of_time, unread, all_skipped = answers()
        if unread:
            raise self._data_error()
        if self.state.timestep_sampler.learns:
            self._update_timestep_sampler(losses)
        return total, losses, Told(int(largest), bool(any_out_of_time), int(all_skipped))

    def _next(self, batches: Iterator[Batch], size: int) -> Batch:
        """The next micro-batch; zeros where the data of one of several processes cannot be read, so that none waits for it in vain."""
        if self._unread is None:
            try:
                return next(batches)
            except DATA_ERRORS as error:
                if self.accelerator.num_processes == 1:
                    raise
                self._unread = error
        drawn = {"u": torch.zeros(size, dtype=torch.float64), "noise": torch.zeros(size, *self.task.shape)}
        return {**self.task.dummy_batch(size), **drawn}

    def _say_skipped(self, batch: Batch) -> int:
        """How many images of a micro-batch were replaced; each that cannot be read is said once."""
        found = [sentence for sentence in batch.get("skipped", ()) if sentence]
        for sentence in found:
            if sentence not in self._skipped:
                self._skipped.add(str(sentence))
                say(f"skipped: {sentence}")
        return len(found)

    def _backward(self, batch: Batch, t: Tensor, corrections: Tensor) -> tuple[Tensor, Terms]:
        """Adds the gradients of a micro-batch. Returns its share () of the mean loss, and its terms, without their graph."""
        terms = self._terms(batch, t)
        loss = (at(corrections, t, terms.loss) * terms.loss).sum() / self.positions.share
        self.accelerator.backward(loss)
        return loss.detach(), terms.detached()

    def _terms(self, batch: Batch, t: Tensor) -> Terms:
        """The loss of each sample of a micro-batch, before any correction for how t is drawn."""
        place = self.accelerator.device
        x_0 = self.task.x_0(batch, place)
        noise, *of_input = (sent(batch[name], place) for name in ("noise", "input_noise") if name in batch)
        network = self.task.conditioned(self.state.model, batch, place)
        learned: dict[str, Any] = {} if self.state.uncertainty is None else {"uncertainty": self.state.uncertainty}
        return self.objective(network, x_0, noise, t, *of_input, **learned)

    def _update(self, loss: Tensor, rate: float) -> Tensor:
        """The optimizer step, where loss and gradient are finite; returns the gradient norm ()."""
        self.accelerator.unscale_gradients()
        grad_norm, clipped = self.state.optimizer_step(loss, rate, self.step)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.state.statistics.step(clipped)
        return grad_norm

    def _update_timestep_sampler(self, of_micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """Gives the sampler the timesteps and losses of a step, in the order of the processes, which is that of the positions.

        It waits for the device: the next timesteps follow from these losses.
        """
        t, losses = (torch.cat(parts) for parts in zip(*of_micro_batches))
        everyone = self.accelerator.gather(torch.stack([t.to(losses), losses], dim=1)).cpu()
        if everyone.isfinite().all():
            self.state.timestep_sampler.update(everyone[:, 0].long(), everyone[:, 1])

    def _max_pending(self, newest: PendingStep) -> int:
        """How many steps need not be read yet: one, so that the device has work meanwhile, but none where something is logged or saved."""
        due_now = any(due(self.step, every) for every in (self.config.run.log_every, *(hook.every for hook in self.hooks)))
        last = self.step == self.config.optimization.max_steps
        return 0 if due_now or last or newest.told.stop else 1

    def _read(self, pending: PendingStep, logger: Logger) -> Told:
        """Waits for a step and logs it; returns what the processes have told each other in it.

        Raises:
            NotFiniteError: its update was not made, nor that of any step that was launched after it.
        """
        loss, grad_norm, aborted = pending.numbers.read()
        if aborted:
            with told_by_the_first():
                raise self._not_finite(pending, loss, grad_norm)
        if grad_norm == 0 and self.accelerator.is_main_process and not self._warned_of_zero:
            self._warned_of_zero = True
            say(f"warning: the gradient of step {pending.step} is exactly 0, so that nothing is learned from it; see weighting and data")
        self.state.skipped_images += pending.told.skipped
        logger.log_step(pending.step, loss, pending.learning_rate, grad_norm, self.state.statistics, self.state.skipped_images)
        if self.callback:
            self.callback(pending.step, {"loss": loss, "learning_rate": pending.learning_rate, "grad_norm": grad_norm})
        return pending.told

    def _read_all(self, pending: deque[PendingStep], logger: Logger) -> None:
        while pending:
            self._read(pending.popleft(), logger)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def _mean(self, loss: Tensor) -> Tensor:
        """The mean of a loss () over the processes."""
        return loss if self.accelerator.num_processes == 1 else self.accelerator.gather(loss.double().view(1)).mean()

    def _tell(self, signum: int, out_of_time: bool, skipped: int) -> Callable[[], list[float]]:
        """Sends what this process says to all. What is returned waits for the others, and gives the same in all.

        It is the largest signal, whether the time of any is over, whether the data of any could not be read, and how many images of all
        were replaced.
        """
        told = [float(signum), float(out_of_time), float(self._unread is not None), float(skipped)]
        if self.accelerator.num_processes == 1:
            return lambda: told
        everyone = self.accelerator.gather(sent(torch.tensor([told]), self.accelerator.device))
        return Fetched(torch.cat([everyone[:, :-1].amax(0), everyone[:, -1:].sum(0)])).read

    def _settle_ddp(self) -> None:
        """One backward that is thrown away.

        DDP rebuilds its gradient buckets after its first backward; without this, the first step after a resume would round otherwise
        than the same step of a run that was not interrupted (from three processes on).
        """
        if self.accelerator.num_processes == 1 or device.sharded(self.accelerator):
            return
        size, place = self.positions.micro_batch_size, self.accelerator.device
        batch = self.task.dummy_batch(size)  # of the shape of training batches, or `compile` would compile twice
        network = self.task.conditioned(self.state.model, batch, place)
        t = torch.zeros(size, dtype=torch.long)
        output = network(self.task.x_0(batch, place), t.to(place)).sum()
        if self.state.uncertainty is not None:  # DDP waits for the gradients of all parameters
            output = output + self.state.uncertainty(t).sum()
        output.backward()
        self.state.optimizer_step.optimizer.zero_grad()

    # ---- errors ------------------------------------------------------------------------------------------------------

    def _data_error(self) -> DebiasError:
        """Why a process could not read its data, the first one's in all of them."""
        found = gather_from_all(lambda: [self._unread] if self._unread else [], self.accelerator.num_processes)
        return found[0]

    def _not_finite(self, pending: PendingStep, loss: float, grad_norm: float) -> NotFiniteError:
        """The error that says what was not finite in a step, and where."""
        optim = self.config.optimization
        first, where = self.positions.first(pending.step - 1), self._where_not_finite(pending, loss)
        return NotFiniteError(
            f"loss {loss} with gradient norm {grad_norm} in step {pending.step} (positions {first} to "
            f"{first + optim.batch_size - 1} of seed {optim.seed}; {where}); the update was not made and the last "
            f"checkpoint is untouched; try a smaller --learning_rate, --max_grad_norm 1 or --mixed_precision no"
        )

    def _where_not_finite(self, pending: PendingStep, loss: float) -> str:
        """Which samples have a loss that is not finite, and their timesteps; where none has, the timesteps of this process."""
        timesteps, losses = (torch.cat(parts).tolist() for parts in zip(*pending.losses))
        positions = [position for part in self.positions.micro_batches(pending.step - 1) for position in part]
        own = [f"{position} at t = {t}" for position, t, value in zip(positions, timesteps, losses) if not math.isfinite(value)]
        found = gather_from_all(lambda: own, self.accelerator.num_processes)
        if not found:
            return f"each loss finite, t from {min(timesteps)} to {max(timesteps)}"
        return f"not finite: {', '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}"


def learning_rate(config: OptimizationConfig, step: int) -> float:
    """The learning rate of the update from `step` to `step + 1`: a function of the step, so that nothing needs saving."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.lr_schedule]
