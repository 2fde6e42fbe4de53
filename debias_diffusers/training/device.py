"""The device of a training: accelerator, memory format, versions, and warnings where they differ from the run's last start."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .. import __version__
from ..config.registry import TRACKERS
from ..config.schema.training import TrainConfig
from ..config.schema.types import OptimizerName
from ..errors import InputError
from ..tasks.base import HALF_DTYPES
from ..utils import launcher
from ..utils.console import say
from ..utils.distributed import make_accelerator
from ..utils.sharding import shard
from .optimizer_step import require_optimizer

N = TypeVar("N", bound=nn.Module)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The `Accelerator` of a training, after checking the configuration against the hardware.

    Raises:
        InputError: the hardware or the installed packages cannot do what the configuration asks for.
    """
    precision = config.optimization.mixed_precision
    _require_trackers(config.run.report_to)
    if is_initialized() and AcceleratorState().mixed_precision != precision:  # that of an earlier training in this process
        AcceleratorState._reset_state()
    accelerator = make_accelerator(
        sharded=launcher.is_sharded(os.environ),
        mixed_precision=precision,
        kwargs_handlers=[
            # Gradients lie where they are exchanged: neither memory nor time for a second copy.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.ddp_timeout)),
        ],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision is fp16, but a CPU cannot train in it; take bf16 or no")
    require_optimizer(config.optimization, accelerator.device)
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    if config.optimization.deterministic:
        _be_deterministic()
    else:
        torch.backends.cudnn.benchmark = True  # a training's shapes stay the same, so trying the kernels out pays
    return accelerator


def _require_trackers(names: Sequence[str]) -> None:
    """Raises InputError where accelerate says that it cannot use a tracker."""
    available = set(map(str, get_available_trackers()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"report_to is {name}, but this version of accelerate has no such tracker; run pip install -U accelerate")
        if name not in available:
            raise InputError(f"report_to is {name}, but it is not installed; run pip install {TRACKERS[name][1]}")


def _be_deterministic() -> None:
    """Has torch take deterministic algorithms alone, and refuse operations that have none. A CPU has no others."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product is computed
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # else new tensors are written twice
    torch.backends.cudnn.benchmark = False  # of two starts, each could find other kernels the fastest


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next activations, of up to 1 GB each (32 MB in older versions).

    It would give the large ones back to the system, which clears every page anew when the next step takes them: some 5% of a step in
    float32 (docs/scaling.md). Other C libraries have no `mallopt`, and stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before version 2.35 it refuses more than 32 MB. With nothing but the second setting, less would be kept than by default.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, -1)


def memory_format(accelerator: Accelerator, optimizer: OptimizerName = "adamw") -> torch.memory_format:
    """How the weights of convolutions lie in memory, where it is faster (docs/scaling.md).

    Shards are parts of contiguous weights only. bitsandbytes makes all weights contiguous, but not the moments that it has made
    before, which would then lie otherwise.
    """
    if optimizer == "adamw8bit" or sharded(accelerator):
        return torch.contiguous_format
    half = accelerator.mixed_precision != "no"
    last = half if accelerator.device.type == "cuda" else not half and accelerator.device.type == "cpu"
    return torch.channels_last if last else torch.contiguous_format


def to_train(network: N, accelerator: Accelerator, optimizer: OptimizerName = "adamw") -> N:
    """The network on its device, ready to be trained, with its convolutions in `memory_format`."""
    layout = memory_format(accelerator, optimizer)
    network.to(accelerator.device).to(memory_format=layout).train()
    if layout == torch.channels_last:
        for module in network.modules():
            if isinstance(module, ResnetBlock2D):
                # Its own mode (its dropout has one for itself) only decides whether the input of its shortcut is made contiguous,
                # which is wrong here: it and all gradients that meet it would be copied to and fro.
                module.training = False
    return network


def sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights (FSDP2)."""
    return launcher.is_sharded(os.environ) and accelerator.num_processes > 1


def to_shards(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network as it is called in a sharded training; its parameters are replaced by this process's parts of them.

    accelerate's plugin has the launcher's options. What it does to a network is torch's `fully_shard`, which is called here itself,
    because the plugin works on accelerators alone and wants the optimizer at the same time.
    """
    half = HALF_DTYPES.get(accelerator.mixed_precision)
    model: nn.Module = accelerator.prepare_model(network, evaluation_mode=True)  # only autocast
    reshard = FullyShardedDataParallelPlugin().reshard_after_forward
    shard(model, accelerator.device.type, accelerator.num_processes, half, reshard)
    return model


class Fetched:
    """Numbers of the device on their way to the host, behind what was launched before them and no later work."""

    def __init__(self, numbers: Tensor) -> None:
        """`numbers`: (N,) on any device."""
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._there = torch.cuda.Event() if numbers.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> list[float]:
        """Waits for them."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()


def warn_of_little_space(folder: Path, checkpoint: int) -> None:
    """Says when the disk holds less than 2.5 checkpoints of so many bytes: an old one stays until the new one is whole."""
    needed = 2.5 * checkpoint
    free = shutil.disk_usage(folder).free
    if free < needed:
        say(f"warning: {folder} has {free / 1e6:.1f} MB free, but checkpoints need about {needed / 1e6:.1f} MB")


def versions() -> dict[str, str]:
    """The versions that decide how numbers are rounded."""
    return {
        "debias_diffusers": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }


def say_what_changed(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What may change on a resume, but ends the promise of equal bits. Both are contents of state.json."""
    pairs = [(name, before[name], now[name]) for name in ("num_processes", "num_threads", "device")]
    # A field may be younger than the run.
    names = ("micro_batch_size", "compile", "compile_mode", "deterministic")
    pairs += [(name, before["config"].get(name, now["config"][name]), now["config"][name]) for name in names]
    pairs += [(f"the version of {name}", old, now["versions"].get(name)) for name, old in before["versions"].items()]
    for name, old, new in pairs:
        if old != new:
            say(f"warning: {name} was {old}, now it is {new}; the run goes on, but not bit for bit as before")
