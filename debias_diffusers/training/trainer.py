"""The loop: from a configuration and a run directory to trained weights.

It knows nothing of pixels: a task turns a batch into clean values x_0 and gives the network to call.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..config import hub_names
from ..config.hub_names import PINNED, is_hub_id, is_pinned, place_of
from ..config.loading import BEFORE_THE_FIELD, differences, flatten, stored, to_json, update
from ..config.schema import DIGITS, HubConfig, OptimizationConfig, TrainConfig
from ..data import dataset, images
from ..data.labels import nonempty_classes, proportional_labels
from ..data.sources import Source, SourceSubset, check_images, open_source, reopen_source, require_skippable, summary
from ..diffusion.loss import Terms, make_objective
from ..diffusion.noise_schedule import at, require_noise_at_the_end, terminal_snr_problem
from ..diffusion.timestep_samplers import make_timestep_sampler
from ..diffusion.weighting import effective_sample_size
from ..errors import CannotWriteError, InputError, NotFiniteError, StoppedError, raise_all
from ..evaluation.image_sets import process_batches
from ..hub import client
from ..hub.publish import Publisher
from ..pipelines.solvers import default_scheduler, make_scheduler
from ..runs import checkpoints
from ..runs.checkpoints import Checkpoint
from ..runs.run_directory import SAMPLES, Run
from ..sampling import generate
from ..tasks.pixels import PixelTask, network_arguments
from ..tasks.unet import build_unet
from ..utils import distributed, seeding, torch_errors
from ..utils.console import say
from ..utils.files import require_replaceable, write_file
from ..utils.signals import SignalHandler
from . import device, saver, state_dicts
from .ema import EMA
from .logger import Progress, due
from .loss_statistics import Window
from .optimizer_step import Update
from .saver import Saver

if TYPE_CHECKING:
    from ..evaluation import monitor

SKIPS_IN_A_ROW = 20  # fp16 steps with overflowing gradients that are taken for a search of the loss scale
GRID_IMAGES, GRID_STEPS = 64, 20


def train(config: TrainConfig, run: Run | None, stop: SignalHandler, to: HubConfig | None = None) -> None:
    """Trains to `max_steps`, resuming where the run directory stands.

    Args:
        config: checked and resolved.
        run: the run directory, which is closed at the end; None in all processes but the first.
        stop: remembers signals, already since before torch was imported; closed at the end.
        to: where the first process pushes to, as the Hub allowed it; None where nothing is pushed.

    Raises:
        DebiasError: of the kind that tells what stopped it; StoppedError after a signal, saved.
    """
    with run or contextlib.nullcontext(), stop if isinstance(stop, SignalHandler) else contextlib.nullcontext():
        _train(config, run, stop, to)


def _train(config: TrainConfig, run: Run | None, stop: SignalHandler, to: HubConfig | None) -> None:
    accelerator = device.start_accelerator(config)
    try:
        Trainer(config, run, accelerator, to).train(stop)
    except RuntimeError as error:
        size = micro_batch_size(config.optimization, accelerator.num_processes)
        if known := torch_errors.explain_error(error, "--micro_batch_size", size, config.run.ddp_timeout):
            raise known from error
        raise
    finally:
        accelerator.end_training()


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be computing."""

    step: int  # the number of steps that are done with it
    learning_rate: float
    drawn: list[tuple[Tensor, Tensor]]  # noise levels and losses of its pieces
    numbers: device.Fetched  # mean loss, norm of the gradient, whether it ends the run, signal, whether it is late
    asked: bool  # whether this process is asked to stop


class Trainer:
    """Everything a training step needs, and the step."""

    def __init__(self, config: TrainConfig, run: Run | None, accelerator: Accelerator, to: HubConfig | None = None) -> None:
        self.run, self.accelerator = run, accelerator
        found = self._agree_on_checkpoint()
        typed = config.data.channels
        self.config = config = distributed.broadcast_from_first(lambda: _pinned(config, found), accelerator)
        # Fields that the run began before, which it goes on without: what is resumed tells by them what may be asked of it.
        self.older = BEFORE_THE_FIELD.keys() - found.state["config"].keys() if found else set()
        self.optim = config.optimization
        self.num_threads = distributed.set_threads(self.optim.num_threads)
        self.device = accelerator.device
        self.micro_batch_size = micro_batch_size(self.optim, accelerator.num_processes)

        self.objective = make_objective(config.objective)  # first, because it may refuse the configuration
        self._require_noise_at_the_end(resumes=found is not None)
        source = self._open_source(found)
        self.monitor = self._monitor(source) if config.run.eval_every else None
        if self.monitor:
            self.config = config = update(config, {"eval_images": self.monitor.count})
        learned = update(config, {"channels": typed})  # those of the run may stand there as left out
        self.task = PixelTask(learned, *self._readable(source, found, typed))
        self.sampler = make_timestep_sampler(config.objective, self.objective.schedule, self.optim.batch_size)
        self.window = Window(len(self.objective.schedule), self.device)
        torch.manual_seed(seeding.derive_seed(self.optim.seed, "weights", 0))
        unet = self.task.build()
        if self.optim.init and found is None:
            self._start_from(unet, self.optim.init)
        network = device.to_train(unet, accelerator)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.ema = EMA(dict(network.named_parameters()), self.optim.ema_decay, self.optim.ema_warmup)
        # A loss that is not finite is never the search of fp16 for its scale, an overflowing gradient may be.
        self.update = Update(self.parameters, self.ema, self.optim, SKIPS_IN_A_ROW - 1 if accelerator.scaler is not None else 0)
        self.adamw = self.update.adamw
        self.model, _ = self.accelerator.prepare(network, self.adamw)
        if self.optim.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.optim.compile:  # in place, so that weights keep their names; within DDP, which then exchanges while it computes
            network.compile(mode=self.optim.compile_mode)
        self.paths = _paths(config) if found is None else {**found.state.get("paths", {}), **_paths(config, ("dataset",))}
        # Looks at every file of a folder, so only the process that writes it down takes it.
        self.fingerprint = self.task.data.source.fingerprint() if run else None

        self.step = 0  # optimizer steps that are done
        self.saved_step = 0
        self.saving_step = 0  # of the save under way; the step that is saved where there is none
        self.drawn: list[tuple[Tensor, Tensor]] = []  # noise levels and losses of the pieces of the step at hand
        self.best: dict[str, Any] | None = None  # step and figure of the best measurement, and what was measured
        self.measured: dict[str, Any] | None = None  # the last measurement: its step, by what, and all figures
        self._resume(found)
        self.said_still = self.said_averages = False  # what is said once: that a gradient is 0, that averages have not moved
        self.still_since = (self.step, self.ema.checksums())  # of the averages, as of the start or the last save
        self.positions = dataset.PositionBatchSampler(
            self.optim.batch_size,
            self.micro_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            range(self.step, self.optim.max_steps),
        )
        if run:
            run.begin(config)
            device.warn_of_little_space(run.folder, sum(p.numel() for p in self.parameters), len(self.optim.ema_decay))
        if self.monitor:
            with self._said_by_the_first():
                self.monitor.read(self.task.data.source)
        self.publisher = Publisher(run.folder, to, self.step) if run and to else None
        self.saver = Saver(run, config, self.task, self.device, self.publisher) if run else None
        draws = self.saver is None and (config.run.sample_every or config.run.eval_every)
        self.drawing = self.task.build().to(self.device).eval() if draws else None  # its network where none is saved from

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self, stop: SignalHandler) -> None:
        """All steps that are left, or until a signal or `max_hours`."""
        deadline = time.monotonic() + self.optim.max_hours * 3600 if self.optim.max_hours else math.inf
        self._settle_ddp()
        with contextlib.closing(
            dataset.micro_batches(self.task.data, self.positions, pin_memory=self.device.type == "cuda")
        ) as micro_batches:
            signum = self._train(micro_batches, stop, deadline)
        self._say_end(signum)
        if self.publisher:
            self.publisher.finish(self.step, stop)

    def _train(self, micro_batches: Iterator[dict[str, Tensor]], stop: SignalHandler, deadline: float) -> int:
        """The steps themselves; returns the signal that ended them, or 0."""
        every = self.config.run
        signum = late = 0
        if self.publisher:
            self.publisher.resume()
        launched: deque[Launched] = deque()
        with Progress(self.config, self.run, self.accelerator, self.step) as progress, self.saver or contextlib.nullcontext():
            while self.step < self.optim.max_steps and not signum and not late:
                if self.saver:
                    self.saver.check()
                launched.append(self._launch(micro_batches, stop.signum, time.monotonic() > deadline))
                for _ in range(len(launched) - self._may_stay_unread(launched[-1])):
                    signum, late = self._read(launched.popleft(), progress)
                with progress.apart():
                    if due(self.step, every.sample_every):
                        self._draw_grid()
                    if due(self.step, every.eval_every):
                        progress.record_figures(self.step, self._measure())
                    if due(self.step, every.checkpoint_every) and self.step < self.optim.max_steps:
                        self._save()
            while launched:
                self._read(launched.popleft(), progress)
            self._save(final=True)
        return signum

    def _launch(self, micro_batches: Iterator[dict[str, Tensor]], signum: int, late: bool) -> Launched:
        """Starts the next step, without waiting for the device."""
        loss, stop = self._agree(self._gradients(micro_batches), signum, late)
        rate, grad_norm = self._update(loss)
        self.step += 1
        numbers = torch.stack([number.to(loss.dtype) for number in (loss, grad_norm, self.update.ended, *stop)])
        return Launched(self.step, rate, self.drawn, device.Fetched(numbers), asked=bool(signum or late))

    def _may_stay_unread(self, newest: Launched) -> int:
        """How many steps may be unread: one, so that the device has work meanwhile, but none where something is told, drawn or saved.

        A single process obeys a signal at once. Several must all read the same step before they stop, and do so a step later.
        """
        every, step = self.config.run, self.step
        told = any(due(step, n) for n in (every.log_every, every.sample_every, every.eval_every, every.checkpoint_every))
        return 0 if told or step == self.optim.max_steps or (newest.asked and self.accelerator.num_processes == 1) else 1

    def _read(self, launched: Launched, progress: Progress) -> tuple[int, int]:
        """Waits for a step and tells of it; (signal, whether it is late) as all processes have agreed on.

        Raises:
            NotFiniteError: its update was not made, nor that of any step that was launched after it.
        """
        loss, grad_norm, ended, signum, late = launched.numbers.read()
        if ended:
            raise self._not_finite(launched, loss, grad_norm)
        if grad_norm == 0 and self.run and not self.said_still:
            self.said_still = True
            say(f"warning: the gradient of step {launched.step} is exactly 0, so that nothing is learned from it; see weighting and data")
        progress.record(launched.step, loss, launched.learning_rate, grad_norm, self.window)
        return int(signum), int(late)

    def _gradients(self, micro_batches: Iterator[dict[str, Tensor]]) -> Tensor:
        """One step's gradients, averaged over the processes; returns this process's mean loss ()."""
        total = torch.zeros((), device=self.device)
        pieces = self.positions.micro_batches(self.step)
        corrections = self.sampler.corrections
        weights = corrections if self.objective.weights is None else corrections * self.objective.weights
        self.drawn = []
        for piece in pieces:
            batch = next(micro_batches)
            torch.manual_seed(seeding.derive_seed(self.optim.seed, "dropout", piece.start))  # after the loader, which draws when it starts
            t = self.sampler.draw(batch["u"], piece)
            # Only the last piece exchanges gradients between processes.
            synchronised = contextlib.nullcontext() if piece is pieces[-1] else self.accelerator.no_sync(self.model)
            with synchronised:
                terms = self._terms(batch, t)
                loss = (at(corrections, t, terms.loss) * terms.loss).sum() / self.positions.share
                self.accelerator.backward(loss)
            total += loss.detach()
            self.window.add(t, terms, weights)
            self.drawn.append((t, terms.loss.detach()))
        if self.sampler.learns:
            self._teach_sampler()
        return total

    def _teach_sampler(self) -> None:
        """Tells the sampler the levels and losses of a step, in the order of the processes, which is that of the positions.

        It waits for the device: the next levels follow from these losses.
        """
        t, losses = (torch.cat(parts) for parts in zip(*self.drawn))
        everyone = self.accelerator.gather(torch.stack([t.to(losses), losses], dim=1)).cpu()
        self.sampler.update(everyone[:, 0].long(), everyone[:, 1])

    def _terms(self, batch: dict[str, Tensor], t: Tensor) -> Terms:
        """What each sample of a micro-batch costs, before any correction for how t is drawn."""
        x_0 = self.task.clean(batch, self.device)
        noise = batch["noise"].to(self.device, non_blocking=True)
        return self.objective(self.task.network(self.model, batch, self.device), x_0, noise, t)

    def _update(self, loss: Tensor) -> tuple[float, Tensor]:
        """The update, where loss and gradient are finite; returns the learning rate and the norm () of the gradient."""
        self.accelerator.unscale_gradients()
        rate = learning_rate(self.optim, self.step)
        grad_norm, clipped = self.update(loss, rate, self.step)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.window.step(clipped)
        return rate, grad_norm

    def _not_finite(self, launched: Launched, loss: float, grad_norm: float) -> NotFiniteError:
        """The error that says what was not finite in a step, and where."""
        first, spoilt = (launched.step - 1) * self.optim.batch_size, self._spoilt(launched, loss)
        return NotFiniteError(
            f"loss {loss} with gradient norm {grad_norm} in step {launched.step} (positions {first} to "
            f"{first + self.optim.batch_size - 1} of seed {self.optim.seed}; {spoilt}); the update was not made and the last "
            f"checkpoint is untouched; try a smaller --learning_rate, --max_grad_norm 1 or --mixed_precision no"
        )

    def _spoilt(self, launched: Launched, loss: float) -> str:
        """Which samples of this process have a loss that is not finite, and their noise levels; those of all where none has."""
        t, losses = (torch.cat(parts).tolist() for parts in zip(*launched.drawn))
        positions = [position for piece in self.positions.micro_batches(launched.step - 1) for position in piece]
        found = [f"{position} at t = {level}" for position, level, value in zip(positions, t, losses) if not math.isfinite(value)]
        if not found and not math.isfinite(loss):
            return "not finite: a loss of another process"
        if not found:
            return f"each loss finite, t from {min(t)} to {max(t)}"
        return f"not finite: {', '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}"

    def _agree(self, loss: Tensor, signum: int, late: bool) -> tuple[Tensor, Tensor]:
        """The mean loss () of all processes, and one answer (2,) of all of them to "stop?": the signal, and whether it is late."""
        stop = torch.tensor([float(signum), float(late)]).to(self.device, non_blocking=True)
        if self.accelerator.num_processes == 1:
            return loss, stop
        everyone = self.accelerator.gather(torch.cat([loss.view(1), stop]).double()[None])
        return everyone[:, 0].mean(), everyone[:, 1:].amax(0)

    def _settle_ddp(self) -> None:
        """One backward that is thrown away.

        DDP orders its sums anew after its first backward; without this, the first step after a resume would round otherwise
        than the same step of a run that was not interrupted (from three processes on).
        """
        if self.accelerator.num_processes > 1:
            size, shape = self.micro_batch_size, self.task.data.shape  # of a step, or it would be compiled twice
            batch = {"image": torch.zeros(size, *shape, dtype=torch.uint8), "label": torch.zeros(size, dtype=torch.long)}
            network = self.task.network(self.model, batch, self.device)
            network(self.task.clean(batch, self.device), torch.zeros(size, dtype=torch.long, device=self.device)).sum().backward()
            self.adamw.zero_grad()

    def _say_end(self, signum: int) -> None:
        at = f"at step {self.step} of {self.optim.max_steps}, saved; the same command continues"
        if self.step == self.optim.max_steps:
            sentence = f"finished at step {self.step}; the model is in {self.config.run.output_dir}"
        elif signum:
            raise StoppedError(f"stopped by {signal.Signals(signum).name} {at}", signum)
        else:
            sentence = f"stopped after max_hours {self.optim.max_hours} {at}"
        if self.run:
            say(sentence)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def _start_from(self, unet: nn.Module, model: str) -> None:
        for sentence in self.task.start_from(unet, model):
            if self.run:
                say(f"warning: {sentence}")
        if self.run:
            say(f"starting from the weights of {model}")

    def _require_noise_at_the_end(self, resumes: bool) -> None:
        """Refuses a schedule that cannot be sampled; a run that began before this was looked at may end, with a warning."""
        if not resumes:
            with self._said_by_the_first():
                require_noise_at_the_end(self.config.objective, self.objective.schedule)
        elif self.run and (problem := terminal_snr_problem(self.objective.schedule)):
            say(f"warning: {problem}")

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the first process chose, in every process."""
        return distributed.broadcast_from_first(lambda: self.run.resume if self.run else None, self.accelerator)

    def _open_source(self, found: Checkpoint | None) -> Source:
        """The data, its labels in the order of the run; a run that did not write down its class names has the plain one."""
        data = self.config.data
        source = reopen_source(data, found.state.get("class_names") or "plain", found.state["data"]) if found else open_source(data)
        for sentence in summary(source, self.config.data.dataset) if self.run else ():
            say(sentence)
        return source

    def _readable(self, source: Source, found: Checkpoint | None, typed: int | None) -> tuple[Source, int | None]:
        """The source less its unreadable images, and the channels that are learned.

        The processes share the look at all, unless a checkpoint says what was seen before. The channels are None for the digits, of
        which the first says them, too.
        """
        known = distributed.broadcast_from_first(lambda: self._known_to_be_skipped(source, found), self.accelerator)
        channels = found.state["network"]["in_channels"] if found else typed
        if known is None:
            known, coloured = self._look(source)
            count = len(source) - len(known)
            if channels == 1 and typed is None and coloured:
                with self._said_by_the_first():
                    raise InputError(
                        f"dataset {self.config.data.dataset}: {coloured} of {count} images have colours, but this run learns grey ones; "
                        f"add --channels 1, which converts them to grey"
                    )
            channels = channels or _channels(coloured, count, say if self.run else None)
        return SourceSubset(source, known) if known else source, channels

    def _known_to_be_skipped(self, source: Source, found: Checkpoint | None) -> list[int] | None:
        """None where the images are still to be looked at."""
        if found:
            before = found.state["data"]
            known: list[int] = before.get("skipped", [])
            if before == SourceSubset(source, known).fingerprint():
                return known
            self._require_same_data(before, source.fingerprint())
        return [] if self.config.data.dataset == DIGITS else None  # they come with the package, and its tests read them

    def _monitor(self, source: Source) -> monitor.Monitor:
        from ..evaluation import monitor  # with torch-fidelity, whose import takes seconds that a run without figures need not wait

        made: list[monitor.Monitor] = []

        def make() -> list[None]:
            made.append(monitor.Monitor(self.config, source, self.device, self.accelerator.process_index, self.accelerator.num_processes))
            return []

        with self._said_by_the_first():
            distributed.gather_from_all(make, self.accelerator.num_processes)
        return made[0]

    @contextlib.contextmanager
    def _said_by_the_first(self) -> Iterator[None]:
        """For what is refused by all processes at once."""
        try:
            yield
        except InputError as error:
            if self.run is None:
                raise SystemExit(error.exit_code) from error
            raise

    def _look(self, source: Source) -> tuple[list[int], int]:
        """The images that are skipped, and how many of the others have colours."""
        mine = check_images(source, range(len(source))[self.accelerator.process_index :: self.accelerator.num_processes])
        parts = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        bad = dict(sorted(item for part, _ in parts for item in part.items()))
        with self._said_by_the_first():
            require_skippable(bad, str(self.config.data.dataset), len(source), self.config.data.skip_bad)
        for sentence in bad.values() if self.run else ():
            say(f"skipped: {sentence}")
        return list(bad), sum(coloured for _, coloured in parts)

    def _resume(self, found: Checkpoint | None) -> None:
        """Puts everything back as it was after the checkpoint's step."""
        if found is None:
            return
        if self.run:
            now = self._state()
            # The file behind --model_config may have changed, though its name has not.
            raise_all(differences(found.state["network"], now["network"]), f"run directory {self.run.folder} holds another network")
            # A function that was registered may have changed, though its name has not.
            other = differences(found.state.get("weights", now["weights"]), now["weights"])
            raise_all(other, f"run directory {self.run.folder} holds another weighting; put it back, or name another --output_dir")
            device.say_what_changed(found.state, now)
            if (before := found.state["config"]["max_steps"]) != self.optim.max_steps and self.optim.lr_schedule != "constant":
                say(f"warning: max_steps was {before}, now it is {self.optim.max_steps}: the learning rate falls to 0 there")
            say(f"resuming {self.run.folder} at step {found.step} of {self.optim.max_steps}")
        state_dicts.restore(found, self.model, self.adamw, self.ema)
        if self.sampler.learns:
            self.sampler.load(safetensors.torch.load(found.read(checkpoints.SAMPLER)))
        self.window.load(found.state["window"], self.accelerator.is_main_process)
        self.best, self.measured = found.state.get("best"), found.state.get("measured")
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.step = self.saved_step = self.saving_step = found.step

    def _require_same_data(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if before == now:
            return
        change = (
            f"dataset {self.config.data.dataset} is not the one this run began with ({before['images']} images then, {now['images']} now)"
        )
        if not self.config.run.accept_changed_data:
            raise InputError(f"{change}; put it back, or go on with --accept_changed_data")
        say(f"warning: {change}; positions of the run now mean other images")

    def _state(self) -> dict[str, Any]:
        """What state.json says beside the tensors."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "position": self.step * self.optim.batch_size,
            "num_processes": self.accelerator.num_processes,
            "num_threads": self.num_threads,
            "device": self.device.type,
            "versions": device.versions(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": self.fingerprint,
            "class_names": self.task.class_names,
            "class_counts": self.task.class_counts,
            "paths": self.paths,
            "network": self.task.arguments,
            "weights": self._some_weights(),
            "best": self.best,
            "measured": self.measured,
            "config": {name: value for name, value in stored(self.config).items() if name not in self.older},
        }

    def _some_weights(self) -> dict[str, float]:
        """Weights at a few levels, to six digits, which no other machine rounds otherwise."""
        weights, T = self.objective.weights, len(self.objective.schedule)
        if weights is None:
            return {}
        some = {f"weight at t = {t}": weights[t] for t in (0, T // 4, T // 2, 3 * T // 4, T - 1)} | {"mean weight": weights.mean()}
        return {name: float(f"{value:.6g}") for name, value in some.items()}

    def _save(self, final: bool = False) -> None:
        """Exports the pipeline and writes the checkpoint, with which the step counts as saved; beside the training where memory allows.

        A save that fails is said and tried again at the next interval; the last one must succeed.
        """
        self._finish_save()
        if self.step == self.saved_step:
            return
        tensors = state_dicts.gather(self.model, self.adamw, self.ema)
        if self.sampler.learns:
            tensors[checkpoints.SAMPLER] = self.sampler.state()
        window = self.window.state(self.accelerator.gather, self.accelerator.is_main_process)
        self.saving_step = self.step
        if self.run:
            self._say_if_still()
        if self.saver:
            self.saver.save(tensors, {**self._state(), "window": window}, final)
        if final:
            self._finish_save(final=True)

    def _say_if_still(self) -> None:
        """Says once which averages have not changed since the last save, though they should at every step."""
        (since, before), now = self.still_since, self.ema.checksums()
        still = [str(rate) for rate in now if now[rate] == before[rate]]
        if still and not self.said_averages:
            self.said_averages = True
            say(
                f"warning: the averaged weights of ema_decay {', '.join(still)} have not changed from step {since} to {self.step}: what is "
                f"exported is not what is trained; a larger --learning_rate or a smaller --ema_decay moves them"
            )
        self.still_since = (self.step, now)

    def _finish_save(self, final: bool = False) -> None:
        """Waits for the save under way, if there is one; raises CannotWriteError where the final one failed."""
        if self.saving_step == self.saved_step:
            return
        # All must know whether to gather again.
        problem = distributed.broadcast_from_first(lambda: self.saver.result() if self.saver else None, self.accelerator)
        if problem is None:
            self.saved_step = self.saving_step
        elif final:
            raise CannotWriteError(problem)
        self.saving_step = self.saved_step

    def _draw_grid(self) -> None:
        """Samples of the averaged weights, always from the same seeds, as one picture; each process draws its share."""
        try:
            classes = nonempty_classes(self.task.class_counts or [])
            parts = distributed.gather_from_all(lambda: list(self._drawn(GRID_IMAGES, classes)), self.accelerator.num_processes)
            if self.saver:
                arrays = [image for _, batch in sorted(parts, key=lambda part: part[0]) for image in batch.numpy()]
                picture = images.grid([images.from_array(array) for array in arrays])
                write_file(self.saver.run.folder / SAMPLES / f"{checkpoints.folder_name(self.step)}.png", images.png(picture))
        except (CannotWriteError, InputError, NotFiniteError, torch.linalg.LinAlgError) as error:
            if self.saver:
                say(f"no sample grid at step {self.step}: {error}")

    def _drawn(self, count: int, labels: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """This process's share of the images of the averaged weights from the seeds 0, 1, ...: (number, (B, C, H, W) uint8) of batches.

        `labels` in turn, if there are any.
        """
        average = self.ema.averages[self.optim.ema_decay[0]]
        network = saver.filled(self.drawing, average) if self.drawing else self.saver.averaged(average)  # type: ignore[union-attr]
        pipeline = self.task.preview(network)
        steps = min(GRID_STEPS, len(self.objective.schedule) // 2)
        pipeline.scheduler = make_scheduler(default_scheduler(pipeline.scheduler), pipeline.scheduler, "linspace", steps)
        processes = self.accelerator.num_processes
        size = min(self.micro_batch_size, -(-count // processes))  # no more at once than the training has memory for
        for number, indices in process_batches(range(count), size, self.accelerator.process_index, processes):
            own = [labels[k % len(labels)] for k in indices] if labels else None
            yield number, generate.draw(pipeline, indices, 0, own, num_inference_steps=steps).cpu()

    def _measure(self) -> dict[str, float]:
        """Figures of what the averaged weights draw; {} in all processes but the first, and where they drew nothing finite."""
        if self.monitor is None:
            return {}
        try:
            count = self.config.run.eval_images or 0
            figures = self.monitor.figures(self._drawn(count, proportional_labels(self.task.class_counts or [], count)))
        except (InputError, NotFiniteError, torch.linalg.LinAlgError) as error:
            if self.saver:
                say(f"no figures at step {self.step}: {error}")
            return {}
        if self.saver is None:
            return {}
        self.measured = {"step": self.step, "by": self.monitor.about, "figures": figures}
        name, value = next(iter(figures.items()))
        # A best of another figure says nothing: of a checkpoint, it may be of other --eval_metrics or another extractor.
        from ..evaluation.metrics import as_loss  # see `_monitor`

        loss, by = as_loss(name, value), {"figure": name, **self.monitor.about}
        if math.isfinite(loss) and (self.best is None or self.best.get("by") != by or loss < self.best["value"]):
            self.best = {"step": self.step, "value": loss, "by": by}
        return figures


def _pinned(config: TrainConfig, found: Checkpoint | None) -> TrainConfig:
    """The configuration with the commits of what comes from the Hub, those that the run began with or the newest, and older values."""
    values = flatten(config)
    kinds = {"dataset": ("dataset", is_hub_id), "init": ("model", hub_names.is_id)}
    began = found.state["config"] if found else {}
    names = {n: values[n] for n in PINNED if values[n] and (is_pinned(began.get(n) or "") or kinds[n][1](values[n]))}
    if found is None:
        return update(config, {name: client.pinned(value, kinds[name][0]) for name, value in names.items()})
    _require_local_data(config, found)
    kept = {name: began.get(name, value) for name, value in names.items()}
    for name, value in names.items():
        if hub_names.split(value)[1] and value != kept[name]:
            say(f"{name} is {value}, but the run keeps to what it began with, {kept[name]}")
    older = {name: value for name, value in BEFORE_THE_FIELD.items() if name not in began}
    return update(config, kept | older | {"channels": began.get("channels")})


def _require_local_data(config: TrainConfig, found: Checkpoint) -> None:
    """Raises InputError where a run began with data of a disk and they are not where the command says: the Hub is not asked for them."""
    typed, began = str(config.data.dataset), found.state["config"]["dataset"]
    paths = found.state.get("paths")
    on_disk = began != DIGITS and not is_pinned(began) and (paths is None or "dataset" in paths)
    if on_disk and not Path(typed).expanduser().exists():
        lay = f" at {paths['dataset']}" if paths else f" {began}"
        raise InputError(f"dataset {typed} is not there; this run began with the data{lay}; name where they are now with --dataset")


def _paths(config: TrainConfig, names: tuple[str, ...] = PINNED) -> dict[str, str]:
    """Where the data and the first weights of a run are, as far as they are on this disk."""
    values = flatten(config)
    ids = {"dataset": is_hub_id, "init": hub_names.is_id}
    return {name: place_of(values[name]) for name in names if values[name] and values[name] != DIGITS and not ids[name](values[name])}


def micro_batch_size(config: OptimizationConfig, num_processes: int) -> int:
    """Samples of one forward in one process: what is asked for, but no more than its share of a step."""
    share = config.batch_size // num_processes
    return min(share, config.micro_batch_size or share)


def learning_rate(config: OptimizationConfig, step: int) -> float:
    """The learning rate of the update from `step` to `step + 1`: a function of the step, so that nothing needs saving."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.lr_schedule]


def dry_run(config: TrainConfig) -> None:
    """Shows what would be trained: configuration, size of the network, length of an epoch, picture of the first batch."""
    objective = make_objective(config.objective)
    require_noise_at_the_end(config.objective, objective.schedule)
    picture = Path(f"{Path(config.run.output_dir or '')}-first-batch.png")
    require_replaceable("picture of the first batch", picture, lambda path: images.software(path) == images.SOFTWARE)
    print(to_json(config), end="")
    try:
        source, channels = _seen(config)
    except InputError as error:
        if config.data.channels and not config.data.class_conditional:
            print(f"parameters: {_count_parameters(network_arguments(config, config.data.channels, 0))}")
        print(f"what else depends on the data: unknown, because they cannot be seen ({error})")
        return
    if objective.weights is not None:
        sampler = make_timestep_sampler(config.objective, objective.schedule)
        weights, p = sampler.corrections * objective.weights, sampler.probabilities
        size = effective_sample_size(weights, p)
        print(f"weights as t is drawn: mean {(p * weights).sum():.4g}, largest {weights.max():.4g}, effective sample size {size:.2g}")
    for sentence in summary(source, config.data.dataset):
        say(sentence)
    task, batch_size = PixelTask(config, source, channels), config.optimization.batch_size
    print(f"parameters: {_count_parameters(task.arguments)}")
    if config.optimization.init:
        for sentence in task.start_from(task.build(), config.optimization.init):
            print(f"warning: {sentence}")
    print(f"images: {len(source)}, {task.data.channels} channel(s), {task.data.num_classes} classes")
    print(f"steps per epoch: {len(source) / batch_size:.1f}")
    first = dataset.PositionBatchSampler(min(batch_size, GRID_IMAGES), batch_size, 0, 1, range(1))
    (batch,) = dataset.micro_batches(task.data, first, pin_memory=False)
    write_file(picture, images.signed_png(images.grid([images.from_array(image.numpy()) for image in batch["image"]])))
    print(f"first batch: {picture}")


def _seen(config: TrainConfig) -> tuple[Source, int | None]:
    """The data of a run that begins, and the channels that it learns, as `Trainer` finds them."""
    source = open_source(config.data)
    if config.data.dataset == DIGITS:
        return source, None
    bad, coloured = check_images(source, range(len(source)))
    require_skippable(bad, str(config.data.dataset), len(source), config.data.skip_bad)
    return SourceSubset(source, list(bad)), config.data.channels or _channels(coloured, len(source) - len(bad), print)


def _channels(coloured: int, count: int, tell: Callable[[str], None] | None) -> int:
    """Those of all images where so many have colours, into which grey fits, too; that they are mixed is told."""
    if tell and 0 < coloured < count:
        tell(f"{coloured} of {count} images have colours, so the model learns 3 channels; --channels 1 converts them to grey")
    return 3 if coloured else 1


def _count_parameters(arguments: dict[str, Any]) -> int:
    with torch.device("meta"):  # no memory
        return sum(p.numel() for p in build_unet(arguments).parameters())
