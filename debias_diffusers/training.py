"""The loop: from a configuration and a run directory to trained weights.

It knows nothing of pixels: a task turns a batch into clean values x_0 and gives the network to call.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from . import __version__, chance, checkpoint, data, hub, images, sampling, timesteps
from .checkpoint import Checkpoint
from .config import TrainConfig, to_json
from .ema import EMA
from .errors import CannotWriteError, InputError, NotFiniteError, StoppedError
from .files import DRAFT, said_if_not_writable, write_file
from .loss import make_objective
from .pixels import PixelTask
from .run import SAMPLES, Run, StopSignal, say
from .schedulers import make_scheduler

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SKIPS_IN_A_ROW = 20  # fp16 steps with overflowing gradients that are taken for a search of the loss scale
GRID_IMAGES, GRID_STEPS = 64, 20


def train(config: TrainConfig, run: Run | None) -> None:
    """Trains to `max_steps`, resuming where the run directory stands.

    Args:
        config: checked and resolved.
        run: the run directory; None in all processes but the first.

    Raises:
        DebiasError: of the kind that tells what stopped it; StoppedError after a signal, saved.
    """
    stop = StopSignal()
    trainer = Trainer(config, run)
    try:
        trainer.train(stop)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        smaller = max(1, trainer.micro_batch_size // 2)
        raise InputError(
            f"out of memory with {trainer.micro_batch_size} images per forward; add --micro_batch_size {smaller}, "
            f"which trains the same in less memory"
        ) from error
    finally:
        trainer.end()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Trainer:
    """Everything a training step needs, and the step."""

    def __init__(self, config: TrainConfig, run: Run | None) -> None:
        self.config, self.run = config, run
        self.optim = config.optimization
        self.num_threads = set_threads(self.optim.num_threads)
        self.accelerator = start_accelerator(config)
        self.device = self.accelerator.device
        share = self.optim.batch_size // self.accelerator.num_processes
        self.micro_batch_size = min(share, self.optim.micro_batch_size or share)

        self.task = PixelTask(config)
        self.objective = make_objective(config.objective)
        torch.manual_seed(chance.mixed(self.optim.seed, "weights", 0))
        self.bare = self.task.build().to(self.device).train()
        self.parameters = [p for p in self.bare.parameters() if p.requires_grad]
        self.ema = EMA(dict(self.bare.named_parameters()), self.optim.ema_decay)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=self.optim.learning_rate,
            weight_decay=self.optim.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = self.accelerator.prepare(self.bare, self.adamw)

        self.step = 0  # optimizer steps that are done
        self.saved_step = -1
        self.skips = 0
        self.resume(self._agree_on_checkpoint())
        self.averaged = self.task.build().to(self.device).eval()  # holds EMA weights to draw and to export
        if run:
            run.begin(config)
            warn_of_little_space(run.folder, sum(p.numel() for p in self.parameters), len(self.optim.ema_decay))

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def train(self, stop: StopSignal) -> None:
        """All steps that are left."""
        config, began = self.config.run, time.monotonic()
        micro_batches = self.micro_batches()
        self.settle_ddp()
        with Progress(self) as progress:
            while self.step < self.optim.max_steps:
                loss, grad_norm, signum, late = self.gradients(micro_batches, stop, began)
                self.update(loss, grad_norm)
                progress.record(loss, grad_norm)
                if due(self.step, config.sample_every):
                    self.draw_grid()
                if due(self.step, config.checkpoint_every):
                    self.save(final=False)
                if signum or late:
                    break
            self.save(final=True)
        self.say_end(signum=signum if self.step < self.optim.max_steps else 0)

    def gradients(self, micro_batches: Iterator[dict[str, Tensor]], stop: StopSignal, began: float) -> tuple[float, float, int, bool]:
        """One step's gradients; the loss over all processes, the gradient norm, and whether to stop after this step."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        share = self.optim.batch_size // self.accelerator.num_processes
        pieces = -(-share // self.micro_batch_size)
        first = self.step * self.optim.batch_size + self.accelerator.process_index * share
        for piece in range(pieces):
            batch = next(micro_batches)
            # Dropout follows the position too.
            torch.manual_seed(chance.mixed(self.optim.seed, "dropout", first + piece * self.micro_batch_size))
            with self.accelerator.no_sync(self.model) if piece < pieces - 1 else contextlib.nullcontext():
                loss = self.losses(batch).sum() / share
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.unscale_gradients()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        late = self.optim.max_hours > 0 and time.monotonic() - began > self.optim.max_hours * 3600
        mean, signum, late = self._agree(total.item(), stop.signum, late)
        return mean, grad_norm.item(), signum, late

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted loss of each sample of a micro-batch, (B,)."""
        x_0 = self.task.clean(batch, self.device)
        noise = batch["noise"].to(self.device, non_blocking=True)
        t = timesteps.uniform(batch["u"], len(self.objective.schedule))
        return self.objective(self.task.network(self.model, batch, self.device), x_0, noise, t)

    def update(self, loss: float, grad_norm: float) -> None:
        """Clips, steps the optimizer and the averages; refuses to where something is not finite."""
        self.require_finite(loss, grad_norm)
        if 0 < self.optim.max_grad_norm < grad_norm < math.inf:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], self.optim.max_grad_norm / grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.step += 1

    def require_finite(self, loss: float, grad_norm: float) -> None:
        """Raises NotFiniteError before the update would spoil the weights. fp16 may overflow while it finds its scale."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skips = 0
            return
        self.skips += 1
        if math.isfinite(loss) and self.accelerator.scaler is not None and self.skips < SKIPS_IN_A_ROW:
            return
        first = self.step * self.optim.batch_size
        raise NotFiniteError(
            f"loss {loss} with gradient norm {grad_norm} in step {self.step + 1} (positions {first} to "
            f"{first + self.optim.batch_size - 1} of seed {self.optim.seed}); the update was not made and the last checkpoint is "
            f"untouched; try a smaller --learning_rate, --max_grad_norm 1 or --mixed_precision no"
        )

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's share of the steps that are left, in pieces."""
        positions = data.PositionBatches(
            self.optim.batch_size,
            self.micro_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            range(self.step, self.optim.max_steps),
        )
        return data.batches(self.task.data, positions, pin_memory=self.device.type == "cuda")

    def settle_ddp(self) -> None:
        """One backward that is thrown away.

        DDP orders its sums anew after its first backward; without this the first step after a resume would round differently
        from the same step of a run that was not interrupted (from three processes on).
        """
        if self.accelerator.num_processes > 1:
            shape = self.task.data.shape
            batch = {"image": torch.zeros(1, *shape, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.long)}
            network = self.task.network(self.model, batch, self.device)
            network(self.task.clean(batch, self.device), torch.zeros(1, dtype=torch.long, device=self.device)).sum().backward()
            self.optimizer.zero_grad()

    def _agree(self, loss: float, signum: int, late: bool) -> tuple[float, int, bool]:
        """The mean loss, and one answer of all processes to "stop?"."""
        if self.accelerator.num_processes == 1:
            return loss, signum, late
        everyone = torch.tensor([[loss, signum, late]], dtype=torch.float64, device=self.device)
        everyone = self.accelerator.gather(everyone)
        return everyone[:, 0].mean().item(), int(everyone[:, 1].max()), bool(everyone[:, 2].any())

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the first process chose, in every process."""
        chosen = [self.run.resume if self.run else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        return chosen[0]

    def resume(self, found: Checkpoint | None) -> None:
        """Puts everything back as it was after the checkpoint's step."""
        if found is None:
            return
        state = found.state
        if self.run:
            require_same_data(state["data"], self.task.data.source.fingerprint(), self.config)
            say_what_changed(state, self.state())
            say(f"resuming {self.run.folder} at step {found.step} of {self.optim.max_steps}")
        optimizer = unflatten(safetensors.torch.load(found.read("optimizer.safetensors")))
        hyper = {name: value for name, value in self.adamw.param_groups[0].items() if name != "params"}
        groups = [{**hyper, "params": list(optimizer)}]
        set_optimizer_state_dict(self.model, self.adamw, {"state": optimizer, "param_groups": groups}, options=FULL)
        set_model_state_dict(self.model, safetensors.torch.load(found.read("model.safetensors")), options=FULL)
        for rate in self.ema.averages:
            self.ema.load(rate, safetensors.torch.load(found.read(ema_file(rate))))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = found.step

    def state(self) -> dict[str, Any]:
        """What state.json says beside the tensors."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "position": self.step * self.optim.batch_size,
            "num_processes": self.accelerator.num_processes,
            "num_threads": self.num_threads,
            "versions": versions(),
            "device": str(self.device.type),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "data": self.task.data.source.fingerprint() if self.run else None,
            "config": json.loads(to_json(self.config)),
        }

    def save(self, final: bool) -> None:
        """Exports the pipeline, then writes the checkpoint; with the checkpoint the step counts as saved.

        A save that fails is said and tried again at the next interval; the last one must succeed.
        """
        if self.step == self.saved_step:
            return
        # Gathered in every process: a sharded model needs them all.
        model = get_model_state_dict(self.model, options=FULL)
        optimizer = get_optimizer_state_dict(self.model, self.adamw, options=FULL)["state"]
        self.saved_step = self.step
        if self.run is None:
            return
        files = {
            "model.safetensors": model,
            **{ema_file(rate): average for rate, average in self.ema.averages.items()},
            "optimizer.safetensors": flatten(optimizer),
        }
        contents = ((name, safetensors.torch.save(contiguous(tensors))) for name, tensors in files.items())
        try:
            self.run.metrics.sync()
            self.export(self.run.folder)
            checkpoint.write(self.run.checkpoints, self.step, contents, self.state(), self.config.run.keep_checkpoints)
        except CannotWriteError as error:
            self.saved_step = -1
            if final:
                raise
            say(f"step {self.step} was not saved: {error}; training goes on")

    def export(self, folder: Path) -> None:
        """Makes the run directory a pipeline folder with the EMA weights of the first rate."""
        self.load_averaged()
        draft = folder / (DRAFT + "export")
        with said_if_not_writable(folder):
            self.task.pipeline(self.averaged).save_pretrained(draft, safe_serialization=True)
            # File by file, each whole or absent; only the weights differ from one export to the next.
            for path in sorted(p for p in draft.rglob("*") if p.is_file()):
                write_file(folder / path.relative_to(draft), path.read_bytes())
            shutil.rmtree(draft)
        write_file(folder / "README.md", hub.model_card(self.config, self.step, self.task.data.num_classes).encode())

    def load_averaged(self) -> None:
        average = next(iter(self.ema.averages.values()))
        with torch.no_grad():
            for name, parameter in self.averaged.named_parameters():
                parameter.copy_(average[name])

    def draw_grid(self) -> None:
        """Samples of the averaged weights, always from the same seeds, as one picture."""
        if self.run is None:
            return
        self.load_averaged()
        pipeline, labels = self.task.preview(self.averaged)
        steps = min(GRID_STEPS, len(self.objective.schedule) // 2)
        pipeline.scheduler = make_scheduler("unipc", pipeline.scheduler, "linspace", steps)
        drawn = sampling.draw(pipeline, range(GRID_IMAGES), seed=0, steps=steps, labels=labels)
        try:
            write_file(self.run.folder / SAMPLES / f"{checkpoint.name_of(self.step)}.png", images.png(images.grid(drawn)))
        except CannotWriteError as error:
            say(f"no sample grid at step {self.step}: {error}")

    def say_end(self, signum: int) -> None:
        folder = self.config.run.output_dir
        if signum:
            raise StoppedError(
                f"stopped by {signal.Signals(signum).name} at step {self.step} of {self.optim.max_steps}, saved; "
                f"the same command continues",
                signum,
            )
        if self.run and self.step < self.optim.max_steps:
            say(
                f"stopped after max_hours {self.optim.max_hours} at step {self.step} of {self.optim.max_steps}, saved; the same command continues"
            )
        elif self.run:
            say(f"finished at step {self.step}; the model is in {folder}")

    def end(self) -> None:
        """Closes trackers and leaves the group of processes."""
        self.accelerator.end_training()


class Progress:
    """The progress bar, metrics.jsonl and the tracker."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.smooth = math.nan
        self.since, self.images = time.monotonic(), 0
        accelerator = trainer.accelerator
        self.bar = tqdm(
            total=trainer.optim.max_steps,
            initial=trainer.step,
            unit="step",
            disable=trainer.run is None,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        if trainer.config.run.report_to != "none":
            values = json.loads(to_json(trainer.config)).items()
            accelerator.init_trackers("", {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values})

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def record(self, loss: float, grad_norm: float) -> None:
        """Tells of the step that was just made."""
        trainer = self.trainer
        self.images += trainer.optim.batch_size
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        rate = self.images / max(time.monotonic() - self.since, 1e-9)
        self.bar.set_postfix_str(f"loss {self.smooth:.3f}, {rate:.0f} images/s", refresh=False)
        self.bar.update()
        if due(trainer.step, trainer.config.run.log_every):
            values = {
                "step": trainer.step,
                "loss": loss,
                "learning_rate": learning_rate(trainer.config, trainer.step - 1),
                "grad_norm": grad_norm,
                "images_per_second": rate,
            }
            if trainer.run:
                trainer.run.metrics.append(values)
            trainer.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=trainer.step)
            self.since, self.images = time.monotonic(), 0


# ---- small things ----------------------------------------------------------------------------------------------------


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the update from `step` to `step + 1`: a function of the step, so that nothing needs saving."""
    optim = config.optimization
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.max_steps - optim.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return optim.learning_rate * shape[optim.lr_schedule]


def set_threads(asked: int | None) -> int:
    """Sets and returns the CPU threads of this process.

    `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which would leave all cores but one idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = asked or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def start_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's handle on devices and processes, after checking the configuration against the machine.

    Raises:
        InputError: the machine cannot do what the configuration asks for.
    """
    report_to, precision = config.run.report_to, config.optimization.mixed_precision
    available = {"tensorboard": accelerate.utils.is_tensorboard_available, "wandb": accelerate.utils.is_wandb_available}
    if report_to != "none" and not available[report_to]():
        raise InputError(f"report_to is {report_to}, but it is not installed; run pip install {report_to}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=None if report_to == "none" else report_to,
            project_dir=str(Path(config.run.output_dir or "") / "logs"),
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"mixed_precision is {precision}, but this machine refuses: {' '.join(str(error).split())}") from error
    if accelerator.num_processes != world_size:
        raise InputError(
            f"the launcher started {world_size} processes, but accelerate sees {accelerator.num_processes}; "
            f"on a CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision is fp16, but a CPU cannot train in it; take bf16 or no")
    return accelerator


def warn_of_little_space(folder: Path, parameters: int, rates: int) -> None:
    """Says when the disk holds less than 2.5 checkpoints: an old one stays until the new one is whole."""
    needed = 2.5 * 4 * parameters * (3 + rates)  # float32 weights, two moments, averages
    free = shutil.disk_usage(folder).free
    if free < needed:
        say(f"warning: {folder} has {free / 1e6:.0f} MB free, but checkpoints need about {needed / 1e6:.0f} MB")


def require_same_data(before: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    if before == now:
        return
    change = f"dataset {config.data.dataset} is not the one this run began with ({before['images']} images then, {now['images']} now)"
    if not config.run.accept_changed_data:
        raise InputError(f"{change}; put it back, or go on with --accept_changed_data")
    say(f"warning: {change}; positions of the run now mean other images")


def say_what_changed(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What may change on a resume, but ends the promise of equal bits."""
    pairs = [(name, before[name], now[name]) for name in ("num_processes", "num_threads", "device")]
    pairs += [(f"the version of {name}", old, now["versions"].get(name)) for name, old in before["versions"].items()]
    for name, old, new in pairs:
        if old != new:
            say(f"warning: {name} was {old}, now it is {new}; the run goes on, but not bit for bit as before")


def versions() -> dict[str, str]:
    return {
        "debias_diffusers": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }


def ema_file(rate: float) -> str:
    return f"ema_{rate}.safetensors"


def flatten(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Optimizer state by parameter and name as one level, "PARAMETER/NAME"."""
    return {f"{parameter}/{name}": value for parameter, values in state.items() for name, value in values.items()}


def unflatten(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.rsplit("/", 1)
        state.setdefault(parameter, {})[name] = value
    return state


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def dry_run(config: TrainConfig) -> None:
    """Says what would be trained: the configuration, the network's size, an epoch's length, a picture of the first batch."""
    print(to_json(config), end="")
    task = PixelTask(config)
    network = task.build()
    size, steps = len(task.data.source), len(task.data.source) / config.optimization.batch_size
    print(f"parameters: {sum(p.numel() for p in network.parameters())}")
    print(f"images: {size}, {task.data.channels} channel(s), {task.data.num_classes} classes; steps per epoch: {steps:.1f}")
    batch = [task.data[p] for p in range(min(config.optimization.batch_size, GRID_IMAGES))]
    picture = Path(f"{config.run.output_dir}-first-batch.png")
    write_file(picture, images.png(images.grid([images.from_array(sample["image"].numpy()) for sample in batch])))
    print(f"first batch: {picture}")
