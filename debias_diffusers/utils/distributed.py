"""Distributed processes: the Accelerator, CPU threads, broadcast and gather of Python objects."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, broadcast_object_list, gather_object

from ..errors import DebiasError, InputError, reason
from .console import say
from .launcher import is_first_process, is_launched, world_size

T = TypeVar("T")
R = TypeVar("R")
DEFAULT_TIMEOUT = timedelta(minutes=10)  # torch's, of collective operations on a GPU; on a CPU it is longer

# Distributed types in which every process holds the whole network. A training may also be sharded (FSDP).
SUPPORTED_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def set_threads(asked: int | None) -> int:
    """Sets and returns the number of CPU threads of this process: `asked`, else the user's OMP_NUM_THREADS, else its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // world_size("LOCAL_WORLD_SIZE"))
    given = _omp_num_threads()
    threads = asked or given or share
    if not asked and given and given != share and is_first_process():
        say(f"{given} CPU threads for each process, as OMP_NUM_THREADS says; --num_threads {share} takes all cores")
    torch.set_num_threads(threads)
    return threads


def _omp_num_threads() -> int | None:
    """OMP_NUM_THREADS as the user set it.

    `accelerate launch` and torchrun set it for their child processes, mostly to 1, which would leave all cores but one idle. On Linux the
    environment of the launcher itself has the user's value; on other systems a value of 1 counts as the launcher's.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    if is_launched():
        try:
            environment = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace").split("\0")
            value = dict(entry.partition("=")[::2] for entry in environment).get("OMP_NUM_THREADS", "")
        except OSError:
            value = "" if value == "1" else value
    first = value.split(",")[0].strip()  # a list is for nested parallel regions; the first entry is for the outermost
    return int(first) if first.isdecimal() and int(first) else None


def make_accelerator(sharded: bool = False, **options: Any) -> Accelerator:
    """An Accelerator of one of the `SUPPORTED_TYPES`; with `sharded` also of FSDP.

    Raises:
        InputError: accelerate rejects the device or the launcher's configuration, or the launcher asks for another distributed type.
    """
    try:
        # As a plugin: an environment variable overrides a plain number, which would divide every gradient.
        accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **options)
        if accelerator.device.type == "cuda" and accelerator.device.index is not None:
            torch.cuda.set_device(accelerator.device)  # accelerate does it for several processes, not for ACCELERATE_TORCH_DEVICE=cuda:1
    except (ValueError, RuntimeError, ImportError) as error:
        precision = options.get("mixed_precision", "no")
        refused = f"mixed_precision is {precision}, but" if precision != "no" and precision in str(error) else "accelerate cannot start:"
        raise InputError(f"{refused} this machine or the launcher's configuration says: {reason(error)}") from error
    if (kind := accelerator.distributed_type) not in SUPPORTED_TYPES and not (sharded and kind == DistributedType.FSDP):
        raise InputError(
            f"accelerate is configured for {kind.value}, but only one process, several CPUs or several GPUs (MULTI_CPU, MULTI_GPU) "
            f"are supported; launch with --multi_gpu, or without a configuration"
        )
    _require_all_processes(accelerator.num_processes)
    return accelerator


def inference_accelerator(num_threads: int | None) -> Accelerator:
    """An Accelerator for commands that do not train (sampling, evaluation); sets the number of CPU threads."""
    # Processes synchronize only at the start and at the end, and may finish hours apart.
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    set_threads(num_threads)
    return accelerator


def broadcast_from_first(decide: Callable[[], T], accelerator: Accelerator) -> T:
    """Calls `decide` in the first process and returns its result in all processes (a broadcast). All processes must call it.

    `decide` communicates with no other process, and may take longer than the timeout of collective operations: the others are told again
    and again that it is not done yet.

    Raises:
        DebiasError: what `decide` raised, in the first process; the others exit with its exit code.
    """
    if accelerator.num_processes == 1:
        return decide()
    message: list[Any] = [(False, None, 0)]  # whether it is done, the result, and the exit code where there is none
    if not accelerator.is_main_process:
        while not message[0][0]:
            broadcast_object_list(message)
        _, result, exit_code = message[0]
        if exit_code:
            raise SystemExit(exit_code)
        return result  # type: ignore[no-any-return]
    try:
        with _telling_that_it_goes_on(accelerator):
            result = decide()
    except DebiasError as error:
        broadcast_object_list([(True, None, error.exit_code)])
        raise
    broadcast_object_list([(True, result, 0)])
    return result


@contextlib.contextmanager
def _telling_that_it_goes_on(accelerator: Accelerator) -> Iterator[None]:
    """Broadcasts four times within the timeout of collective operations, from a thread, that the first process is not done."""
    handler, done = accelerator.init_handler, threading.Event()
    seconds = (handler.timeout if handler and handler.timeout else DEFAULT_TIMEOUT).total_seconds()

    def tell() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.set_device(accelerator.device)  # each thread has its own
        with contextlib.suppress(RuntimeError):  # the next broadcast of the process meets it, too
            while not done.wait(min(seconds / 4, threading.TIMEOUT_MAX)):
                broadcast_object_list([(False, None, 0)])

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def told_by_the_first(kind: type[DebiasError] = DebiasError) -> Iterator[None]:
    """For an error that all processes raise at once: only the first process raises it; the others exit with its exit code.

    What another process raises alone, `cli` prints when the first one has had the time for it.

    Args:
        kind: of the error; others pass.
    """
    try:
        yield
    except kind as error:
        if not is_first_process():
            raise SystemExit(error.exit_code) from error
        raise


def gather_from_all(work: Callable[[], list[T]], processes: int) -> list[T]:
    """Calls `work` in each process and returns the joined lists in all of them, in the order of their ranks. All processes must call it.

    Raises:
        Exception: if `work` fails in any process, all processes raise its error, so that none waits for a failed one.
    """
    if processes == 1:
        return work()
    found: list[T] = []
    failed = None
    try:
        found = work()
    except Exception as error:  # of any kind: the other processes must raise it, too
        failed = error
    known = failed is None or isinstance(failed, (DebiasError, RuntimeError, OSError))  # other kinds may not be picklable
    everyone = gather_object([(found, failed if known else RuntimeError(f"another process met {failed!r}"))])
    for _, other in everyone:
        if other:
            raise failed or other
    return [item for part, _ in everyone for item in part]


def in_each_process(work: Callable[[], T], accelerator: Accelerator) -> T:
    """Calls `work` in each process and returns its own result there. Where it fails in one, all end; a DebiasError the first one raises."""
    found: list[T] = []

    def kept() -> list[None]:
        found.append(work())
        return []

    with told_by_the_first():
        gather_from_all(kept, accelerator.num_processes)
    return found[0]


def shared_out(work: Callable[[T], R], items: Sequence[T], accelerator: Accelerator) -> list[R]:
    """What `work` gives of each item, of which each process does its share; the same list in all. Errors as of `gather_from_all`."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    shares = gather_from_all(lambda: [[work(item) for item in items[rank::processes]]], processes)
    return [shares[k % processes][k // processes] for k in range(len(items))]


def _require_all_processes(seen: int) -> None:
    if seen != (started := world_size()):
        raise InputError(
            f"the launcher started {started} processes, but accelerate sees {seen}; "
            f"on a CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        )
