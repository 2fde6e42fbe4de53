"""Clear messages for torch's RuntimeErrors: out of memory, no compiler, shared memory, lost workers, distributed timeouts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import DebiasError, InputError


@contextlib.contextmanager
def explained_torch_errors(flag: str, size: int, limit: int | None = None) -> Iterator[None]:
    """Raises the error of `explain_error` in place of a RuntimeError whose cause is recognised; arguments as there."""
    try:
        yield
    except RuntimeError as error:
        if sentence := explain_error(error, flag, size, limit):
            raise sentence from error
        raise


def explain_error(error: RuntimeError, flag: str, size: int, limit: int | None = None) -> DebiasError | None:
    """An error with a clear message and advice for a RuntimeError of torch; None if the cause is not recognised.

    Args:
        error: what torch raised.
        flag: the flag that sets the (micro-)batch size, for the advice.
        size: the images in a forward now.
        limit: --ddp_timeout in seconds, for commands that have it.
    """
    text = _chain(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY):
        advice = f"add {flag} {size // 2}, which does the same in less memory" if size > 1 else "take a smaller network or resolution"
        return InputError(f"out of memory with {size} images per forward; {advice}")
    if any(words in text for words in ("CppCompiler", "C++ compiler", "C compiler")):
        return InputError("compile needs a C++ compiler, and there is none that works; install one, or leave --compile out")
    if "triton installation" in text or "supported by the triton" in text:
        return InputError("compile needs Triton, which is not installed, or does not know this GPU; leave --compile out")
    # A data loader worker cannot write its batch, or is killed by that: Linux allocates shared memory only when it is written to.
    if any(words in text for words in ("Bus error", "(shm)", "shared memory object", "file </torch_")):
        return DebiasError(NO_SHARED_MEMORY)
    if "DataLoader worker" in text:
        return DebiasError(LOST_WORKER)
    # Timeouts of gloo, of NCCL's watchdog, and of the store through which processes connect.
    if limit and any(words in text for words in ("Timed out", "timed out", "wait timeout", "collective operation timeout")):
        return DebiasError(
            f"waited longer for another process than --ddp_timeout allows ({limit} s): it was slow to read data, to measure or to save, or "
            f"hangs; see what it said last, or raise --ddp_timeout; the same command continues"
        )
    # Of gloo or NCCL: the other process of a collective operation has ended.
    if any(words in text for words in ("closed by peer", "Connection reset", "remote process exited")):
        return DebiasError("another process of this command has ended; the reason is what it said last")
    return None


def _chain(error: BaseException | None) -> str:
    """The messages of an error and of its causes."""
    text = []
    while error is not None:
        text.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(text)


# Of main memory; of a GPU where the compiler has wrapped the error, or a library that allocates by itself has met it.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
LOST_WORKER = "a process that reads images was killed, perhaps for lack of memory; take fewer --num_workers; the same command continues"
NO_SHARED_MEMORY = (
    "the processes that read images found no shared memory left in /dev/shm; give more of it (a container has 64 MB unless it is started "
    "with, for example, docker run --shm-size 2g), or add --num_workers 0; the same command continues"
)
