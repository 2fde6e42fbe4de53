"""What would be trained, without training: all checks of a start, then data, network, objective, memory and time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..config.loading import to_json
from ..config.schema.training import OptimizationConfig, TrainConfig
from ..data import images
from ..data.dataset import load_batch
from ..diffusion.loss import Objective
from ..diffusion.power_ema import KEPT
from ..diffusion.timestep_samplers import make_timestep_sampler
from ..diffusion.weighting import effective_sample_size
from ..runs.run_directory import inspect_run
from ..tasks.base import HALF_DTYPES, Task, trained_parameters
from ..utils import launcher, memory
from ..utils.console import say
from ..utils.distributed import broadcast_from_first
from ..utils.files import require_replaceable, write_file
from ..utils.sharding import gathered_bytes
from ..utils.tensor_memory import backward_peak
from .device import sharded
from .optimizer_step import state_bytes, temporary_bytes
from .setup.build import accelerated, build, micro_batch_size
from .setup.plan import Plan, prepare
from .trainer import Trainer

FIRST_IMAGES = 64  # in the picture of the first batch


def dry_run(config: TrainConfig, chosen: Collection[str] = ()) -> None:
    """Prints what would be trained. Writes nothing but, with `verbose`, OUTPUT_DIR-first-batch.png.

    Raises:
        DebiasError: as the start would; but the Hub is not asked whether it would take a push.
    """
    picture = Path(f"{Path(config.run.output_dir or '')}-first-batch.png")
    first = launcher.is_first_process()
    if first and config.run.verbose:
        require_replaceable("picture of the first batch", picture, lambda path: images.software(path) == images.SOFTWARE)
    found = inspect_run(config) if first else None
    if first and config.optimization.compile:
        say("the network is compiled before its steps are measured, which takes minutes")
    with accelerated(config) as accelerator:
        plan = prepare(config, found, accelerator, chosen)
        network, flops = on_meta(plan.task)
        if first:
            _print_plan(plan, network)
        for line in _cost(plan, network, flops, accelerator):
            if first:
                print(line)
        if first:
            step, steps = (found.step if found else 0), plan.config.optimization.max_steps
            print(f"output_dir: {config.run.output_dir}, {'resumed from' if found else 'a new run, from'} step {step} to {steps}")
        if first and config.run.verbose:
            print(to_json(plan.config), end="")
            write_file(picture, images.signed_png(_first_images(plan.task, config.optimization)))
            print(f"first batch: {picture}")


def _print_plan(plan: Plan, network: nn.Module) -> None:
    data, objective, optim = plan.task.data, plan.config.objective, plan.config.optimization
    print("\n".join(plan.task.describe()))
    print(f"steps per epoch: {len(data.source) / optim.batch_size:.1f}")
    parameters, trained = (sum(p.numel() for p in found) for found in (network.parameters(), trained_parameters(network).values()))
    print(f"parameters: {parameters}" + (f", of which {trained} are trained" if trained < parameters else ""))
    schedule = f"noise_schedule {objective.noise_schedule or 'of rectified flow'} with schedule_shift {objective.schedule_shift:g}"
    names = f"weighting {objective.weighting}, {schedule}, timestep_sampler {objective.timestep_sampler}"
    if objective.timestep_sampler_after:
        names += f", from step {objective.timestep_sampler_switch} on {objective.timestep_sampler_after}"
    if objective.timestep_bias_strategy != "none":
        names += f", timestep_bias_strategy {objective.timestep_bias_strategy}"
    print(f"objective: {objective.prediction_type}, {names}")
    _print_weights(plan.config, plan.objective)


def _print_weights(config: TrainConfig, objective: Objective) -> None:
    if objective.weights is None:
        return
    sampler = make_timestep_sampler(config.objective, objective.schedule)
    for step in sorted({0, config.objective.timestep_sampler_switch}):
        sampler.begin_step(step)
        weights, p = sampler.corrections * objective.weights, sampler.probabilities
        when, size = f" from step {step} on" if step else "", effective_sample_size(weights, p)
        print(f"weights as t is drawn{when}: mean {(p * weights).sum():.4g}, largest {weights.max():.4g}, effective sample size {size:.2g}")


def _first_images(task: Task, optim: OptimizationConfig) -> Any:
    return task.picture(load_batch(task.data, range(min(optim.batch_size, FIRST_IMAGES))))


# ---- memory and time -------------------------------------------------------------------------------------------------


def on_meta(task: Task) -> tuple[nn.Module, int]:
    """The network without memory, and the floating-point operations of its forward and backward for one sample."""
    with torch.device("meta"):
        network = task.build()
    batch = task.dummy_batch(1)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # it does not know all kernels of attention; as plain products it does
        t = torch.zeros(1, dtype=torch.long, device="meta")
        task.conditioned(network, batch, "meta")(task.x_0(batch, "meta"), t).sum().backward()
    return network, counter.get_total_flops()


def _cost(plan: Plan, network: nn.Module, flops: int, accelerator: Accelerator) -> Iterator[str]:
    """Memory and time of the training, measured on optimizer steps where its tensors fit into the free memory."""
    optim, device = plan.config.optimization, accelerator.device
    work = f"{_in_units(flops * optim.batch_size)}FLOP per step, {_in_units(flops)}FLOP per image"
    shards = accelerator.num_processes if sharded(accelerator) else 1
    estimate = estimated_memory(plan.task, network, optim, device.type, accelerator.num_processes, shards)
    free = broadcast_from_first(lambda: _free(device), accelerator)  # all processes build the network, or none does
    counted = f"memory: estimated peak {_in_units(estimate.peak)}B ({estimate})"
    if estimate.peak > free:
        yield (
            f"{counted}, but {_in_units(free)}B are free on this {device.type}: the training does not fit, so that neither its network is "
            f"built nor a step measured"
        )
        yield f"time: unknown; {work}"
        return
    trainer, _ = build(dataclasses.replace(plan, monitor=None), None, accelerator)
    seconds, peak = measure(trainer)
    left = max(0, optim.max_steps - trainer.checkpointer.saved_step)
    of = "" if device.type == "cuda" else " of the whole process"
    yield f"{counted}; measured peak{of} {_in_units(peak)}B; {_in_units(free)}B were free on this {device.type}"
    yield (
        f"time: {seconds:.3g} s per step ({1 / seconds:.3g} steps/s), {_duration(seconds * left)} for {left} steps, without loading and "
        f"encoding the data, sample grids, evaluations and saves; {work}"
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training's tensors on its device."""

    kept: Mapping[str, int]  # what stays from step to step, by its name
    step: int  # what a step takes beside it at most: gradients with activations, or with what the optimizer computes

    @property
    def peak(self) -> int:
        """All together."""
        return sum(self.kept.values()) + self.step

    def __str__(self) -> str:
        parts = [f"{name} {_in_units(size)}B" for name, size in self.kept.items() if size]
        return ", ".join([*parts, f"gradients and activations {_in_units(self.step)}B"])


def estimated_memory(
    task: Task, network: nn.Module, optim: OptimizationConfig, device_type: str, processes: int = 1, shards: int = 1
) -> MemoryEstimate:
    """Counts the memory of a training on each device, without computing and without taking it.

    What is beside tensors is not counted: the CUDA context, workspaces of kernels, and gaps between tensors.

    Args:
        network: on the meta device, and changed as the training would change it.
        device_type: on "cuda" autocast computes some layers in float32.
        processes: among which a batch is divided.
        shards: processes that share the weights (FSDP2).
    """
    half = HALF_DTYPES.get(optim.mixed_precision or "no")
    sizes = tensor_bytes(task, network, optim)
    if optim.param_dtype == "bf16" or (half is not None and shards > 1):  # as shards are gathered
        network.bfloat16()
    if optim.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    size = micro_batch_size(optim, processes)
    batch, t = task.dummy_batch(size), torch.zeros(size, dtype=torch.long)
    x_0, predict = task.x_0(batch, "cpu"), task.conditioned(network, batch, "cpu")
    gradients: Any = "dropped" if shards > 1 else "kept" if size < optim.batch_size else "made"
    step = backward_peak(network, lambda: predict(x_0, t), device_type, half, gradients)
    if optim.ema_on_cpu and device_type != "cpu":
        del sizes["averages"]
    if shards > 1:
        sizes = {name: bytes_ if name == "frozen parts" else -(-bytes_ // shards) for name, bytes_ in sizes.items()}
        step += sizes["gradients"] + gathered_bytes(network)
    update = sizes.pop("gradients") + temporary_bytes(optim, list(trained_parameters(network).values()))
    return MemoryEstimate(sizes, max(step, update))


def tensor_bytes(task: Task, network: nn.Module, optim: OptimizationConfig) -> dict[str, int]:
    """Bytes of a training's tensors by what they are; what the layers keep for the backward pass comes on top."""
    trained = list(trained_parameters(network).values())
    values, each = sum(p.numel() for p in trained), 2 if optim.param_dtype == "bf16" else 4
    return {
        "weights": each * sum(p.numel() for p in network.parameters()),
        "gradients": each * values,
        "optimizer": state_bytes(optim.optimizer, trained),
        "averages": 4 * values * (sum(rate > 0 for rate in optim.ema_decay) + (len(KEPT) if optim.post_hoc_ema else 0)),
        "frozen parts": task.frozen_bytes,
    }


def _free(device: torch.device) -> int:
    """Bytes of the memory of a device that are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free_memory()


def measure(trainer: Trainer) -> tuple[float, int]:
    """Some optimizer steps with the samples of the first.

    Returns:
        Seconds of the last one, and the peak memory in bytes: of the GPU's tensors, or the main memory of this process.
    """
    device = trainer.accelerator.device
    parts = [load_batch(trainer.task.data, positions) for positions in trainer.positions.micro_batches(trainer.step)]
    batches = itertools.cycle(parts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # In the first, kernels are looked for and compiled; in the second, CUDA graphs are recorded.
    for _ in range(1 if trainer.config.optimization.compile_mode == "default" else 2):
        trainer.step_alone(batches)
    began = time.perf_counter()
    trainer.step_alone(batches)
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak_memory()


def _in_units(number: float) -> str:
    """A number with three digits and the prefix of its unit, such as "1.25 G"."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def _duration(seconds: float) -> str:
    """Such as "about 40 minutes"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s"
