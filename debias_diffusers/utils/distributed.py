"""The machine under a training: threads, devices, precision, memory, and what must be said when they change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from ..errors import DebiasError, InputError, reason
from .console import say
from .launcher import launched

T = TypeVar("T")

# Kinds of distribution in which every process holds the whole network, as the update, the averages and the saves need it.
KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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


def make_accelerator(**options: Any) -> Accelerator:
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


def start_processes(num_threads: int | None) -> Accelerator:
    """accelerate's handle on devices and processes where nothing is trained."""
    # Processes meet at the beginning and at the end only, and may be hours apart by then.
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    set_threads(num_threads)
    return accelerator


def agreed(decide: Callable[[], T], accelerator: Accelerator) -> T:
    """What the first process decides, in every process."""
    chosen = [decide() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    answer: Any = chosen[0]
    return answer  # type: ignore[no-any-return]


@contextlib.contextmanager
def told_by_the_first(accelerator: Accelerator) -> Iterator[None]:
    """For an InputError that all processes raise at once: the others end with its exit code and leave the sentence to the first."""
    try:
        yield
    except InputError as error:
        if not accelerator.is_main_process:
            raise SystemExit(error.exit_code) from error
        raise


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
