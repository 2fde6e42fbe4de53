"""The machine under a training: threads, devices, precision, memory, and what must be said when they change."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from . import __version__
from .config import TrainConfig
from .data import LOST_WORKER, NO_SHARED_MEMORY
from .errors import DebiasError, InputError, reason
from .run import launched, say

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)

# Kinds of distribution in which every process holds the whole network, as the update, the averages and the saves need it.
KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_threads(asked: int | None) -> int:
    """Sets and returns the CPU threads of this process: `asked`, else OMP_NUM_THREADS of the user, else its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    given = _omp_num_threads()
    threads = asked or given or share
    if not asked and given and given != share and os.environ.get("RANK", "0") == "0":
        say(f"{given} CPU threads for each process, as OMP_NUM_THREADS says; --num_threads {share} takes all cores")
    torch.set_num_threads(threads)
    return threads


def _omp_num_threads() -> int | None:
    """OMP_NUM_THREADS as the user set it.

    `accelerate launch` and torchrun set it, too, for their children, mostly to 1, which would leave all cores but one idle. What the
    launcher itself was started with tells one from the other (Linux); elsewhere a 1 is taken for theirs.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    if launched():
        try:
            environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace").split("\0")
            value = dict(entry.partition("=")[::2] for entry in environment).get("OMP_NUM_THREADS", "")
        except OSError:
            value = "" if value == "1" else value
    first = value.split(",")[0].strip()  # of nested regions, the outermost
    return int(first) if first.isdecimal() and int(first) else None


def start_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's handle on devices and processes, after checking the configuration against the machine.

    Raises:
        InputError: the machine cannot do what the configuration asks for.
    """
    report_to, precision = config.run.report_to, config.optimization.mixed_precision
    available = {"tensorboard": accelerate.utils.is_tensorboard_available, "wandb": accelerate.utils.is_wandb_available}
    if report_to != "none" and not available[report_to]():
        raise InputError(f"report_to is {report_to}, but it is not installed; run pip install {report_to}")
    accelerator = _accelerator(
        mixed_precision=precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=str(Path(config.run.output_dir or "") / "logs"),
        kwargs_handlers=[
            # Gradients lie where they are exchanged: neither memory nor time for a second copy.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.ddp_timeout)),
        ],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision is fp16, but a CPU cannot train in it; take bf16 or no")
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # a training's shapes stay the same, so trying the kernels out pays
    return accelerator


def _accelerator(**options: Any) -> Accelerator:
    """accelerate's handle, for the kinds of distribution that are built.

    Raises:
        InputError: accelerate refuses the machine or the launcher's configuration, or another kind of distribution is asked for.
    """
    try:
        # By the plugin, because a number alone gives way to a variable of the environment, and divides every gradient.
        accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **options)
    except (ValueError, RuntimeError, ImportError) as error:
        precision = options.get("mixed_precision", "no")
        refused = f"mixed_precision is {precision}, but" if precision != "no" and precision in str(error) else "accelerate cannot start:"
        raise InputError(f"{refused} this machine or the launcher's configuration says: {reason(error)}") from error
    if (kind := accelerator.distributed_type) not in KINDS:
        raise InputError(
            f"accelerate is configured for {kind.value}, but only one process, several CPUs or several GPUs (MULTI_CPU, MULTI_GPU) "
            f"are supported; launch with --multi_gpu, or without a configuration"
        )
    _require_all_processes(accelerator.num_processes)
    return accelerator


def _keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next activations, of up to 1 GB each (32 MB in older versions).

    It would give the large ones back to the system, which clears every page anew when the next step takes them: some 5% of a step in
    float32 (docs/scaling.md). Other C libraries have no `mallopt`, and stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before version 2.35 it refuses more than 32 MB. With nothing but the second setting, less would be kept than by default.
    if mallopt is not None and (mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(_M_TRIM_THRESHOLD, -1)


def memory_format(accelerator: Accelerator) -> torch.memory_format:
    """How the weights of convolutions lie in memory, where it is faster (docs/scaling.md)."""
    half = accelerator.mixed_precision != "no"
    last = half if accelerator.device.type == "cuda" else not half and accelerator.device.type == "cpu"
    return torch.channels_last if last else torch.contiguous_format


def to_train(network: N, accelerator: Accelerator) -> N:
    """The network on its device, ready to be trained, with its convolutions in `memory_format`."""
    layout = memory_format(accelerator)
    network.to(accelerator.device).to(memory_format=layout).train()
    if layout == torch.channels_last:
        for module in network.modules():
            if isinstance(module, ResnetBlock2D):
                # Its own mode (its dropout has one for itself) only decides whether the input of its shortcut is made contiguous,
                # which is wrong here: it and all gradients that meet it would be copied to and fro.
                module.training = False
    return network


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


def start_processes(num_threads: int | None) -> Accelerator:
    """accelerate's handle on devices and processes where nothing is trained."""
    # Processes meet at the beginning and at the end only, and may be hours apart by then.
    accelerator = _accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    set_threads(num_threads)
    return accelerator


def agreed(decide: Callable[[], T], accelerator: Accelerator) -> T:
    """What the first process decides, in every process."""
    chosen = [decide() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    answer: Any = chosen[0]
    return answer  # type: ignore[no-any-return]


def gathered(work: Callable[[], list[T]], processes: int) -> list[T]:
    """What `work`, each process's share of some work, finds in all of them, in their order; all processes must call it.

    Raises:
        Exception: what `work` raised in any process, in all of them: none waits for one that has failed.
    """
    if processes == 1:
        return work()
    found: list[T] = []
    failed = None
    try:
        found = work()
    except Exception as error:  # whatever it is, the others must know
        failed = error
    known = failed is None or isinstance(failed, (DebiasError, RuntimeError, OSError))  # others may not be sent as they are
    everyone = gather_object([(found, failed if known else RuntimeError(f"another process met {failed!r}"))])
    for _, other in everyone:
        if other:
            raise failed or other
    return [item for part, _ in everyone for item in part]


def _require_all_processes(seen: int) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if seen != world_size:
        raise InputError(
            f"the launcher started {world_size} processes, but accelerate sees {seen}; "
            f"on a CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        )


def explained(error: RuntimeError, flag: str, size: int, limit: int | None = None) -> DebiasError | None:
    """What stopped a command, in a sentence, where torch has only a RuntimeError for it; None where we do not know better.

    `flag` decides how many images, now `size`, are computed with at once; `limit` is --ddp_timeout, where a command has it.
    """
    said = _chain(error)
    # Of a device, or of the main memory.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        advice = f"add {flag} {size // 2}, which does the same in less memory" if size > 1 else "take a smaller network or resolution"
        return InputError(f"out of memory with {size} images per forward; {advice}")
    if "CppCompiler" in said or "C++ compiler" in said:
        return InputError("compile needs a C++ compiler, and there is none that works; install one, or leave --compile out")
    # A worker that cannot write its batch, or is killed by it: Linux gives the memory only when it is written to.
    if any(words in said for words in ("Bus error", "(shm)", "shared memory object", "file </torch_")):
        return DebiasError(NO_SHARED_MEMORY)
    if "DataLoader worker" in said:
        return DebiasError(LOST_WORKER)
    # Of gloo, of NCCL's watchdog, and of the store where processes meet.
    if limit and any(words in said for words in ("Timed out", "timed out", "wait timeout", "collective operation timeout")):
        return DebiasError(
            f"waited longer for another process than --ddp_timeout allows ({limit} s): it was slow to read data, to measure or to save, or "
            f"hangs; see what it said last, or raise --ddp_timeout; the same command continues"
        )
    # Of gloo or NCCL: the process at the other end of an exchange is gone.
    if any(words in said for words in ("closed by peer", "Connection reset", "remote process exited")):
        return DebiasError("another process of this command has ended; the reason is what it said last")
    return None


def _chain(error: BaseException | None) -> str:
    """What an error says, and those that led to it."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def warn_of_little_space(folder: Path, parameters: int, rates: int) -> None:
    """Says when the disk holds less than 2.5 checkpoints: an old one stays until the new one is whole."""
    needed = 2.5 * 4 * parameters * (3 + rates)  # float32 weights, two moments, averages
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
    names = ("micro_batch_size", "compile", "compile_mode")
    pairs += [(name, before["config"].get(name, now["config"][name]), now["config"][name]) for name in names]
    pairs += [(f"the version of {name}", old, now["versions"].get(name)) for name, old in before["versions"].items()]
    for name, old, new in pairs:
        if old != new:
            say(f"warning: {name} was {old}, now it is {new}; the run goes on, but not bit for bit as before")
