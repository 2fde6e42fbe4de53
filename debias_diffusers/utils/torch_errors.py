"""What torch has only a RuntimeError for, in a sentence."""

from __future__ import annotations

import torch

from ..errors import DebiasError, InputError


def explain_error(error: RuntimeError, flag: str, size: int, limit: int | None = None) -> DebiasError | None:
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


LOST_WORKER = "a process that reads images was killed, perhaps for lack of memory; take fewer --num_workers; the same command continues"
NO_SHARED_MEMORY = (
    "the processes that read images found no shared memory left in /dev/shm; give more of it (a container has 64 MB unless it is started "
    "with, for example, docker run --shm-size 2g), or add --num_workers 0; the same command continues"
)
