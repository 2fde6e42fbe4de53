"""Stateless random numbers (rng): each is a function of (seed, purpose, position) and not of earlier draws.

A position gets the same numbers in every process and data loader worker, and after any number of interruptions. So no
random state is saved in checkpoints.
"""

import hashlib
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, position: int) -> int:
    """A seed of 64 bits, hashed from the three arguments.

    A torch CPU generator uses only the low 32 bits of its seed. Sums of seed and position would collide, so they are hashed.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(seed: int, purpose: str, position: int) -> float:
    """A uniform random number in [0, 1) with the 53 bits of a double."""
    return (derive_seed(seed, purpose, position) >> 11) / 2**53


def generator(seed: int, purpose: str, position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A seeded torch generator, for tensors of random numbers; the numbers depend on the type of the device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, position) % 2**32)


_OF_THREAD = threading.local()


def normal(shape: Sequence[int], seed: int, purpose: str, positions: Iterable[int]) -> Tensor:
    """Standard normal numbers (B, *shape), float32, of B positions: for each those of `generator`.

    One generator of the thread is seeded anew and fills one tensor, which is faster than a generator and a tensor for each.
    """
    generator: torch.Generator | None = getattr(_OF_THREAD, "generator", None)
    if generator is None:
        generator = _OF_THREAD.generator = torch.Generator()
    seeds = [derive_seed(seed, purpose, position) % 2**32 for position in positions]
    numbers = torch.empty(len(seeds), *shape)
    for row, each in zip(numbers.unbind(), seeds):
        row.normal_(generator=generator.manual_seed(each))
    return numbers


def seed_device(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for what is computed on a device, of CPUs and GPUs without its calls for all other kinds of accelerators.

    Each of those writes down the stack for the day when there is one, which takes half a millisecond.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def subset(seed: int, total: int, count: int) -> Sequence[int]:
    """A random subset of `count` of the indices 0 .. total - 1, in ascending order; all indices if count >= total.

    Uses Floyd's algorithm (Bentley and Floyd, 1987): its memory does not grow with `total`, which may come from an untrusted file.
    """
    if count >= total:
        return range(total)
    chosen = set[int]()
    for last in range(total - count, total):
        drawn = int(uniform(seed, "subset", last) * (last + 1))
        chosen.add(last if drawn in chosen else drawn)
    return sorted(chosen)
