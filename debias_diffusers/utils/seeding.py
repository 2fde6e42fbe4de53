"""Chance as a function of (seed, purpose, position), never of what happened before.

Two runs that draw for the same position draw the same, whichever process or worker does it and however often the run
was interrupted. So no random state is ever saved.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(seed: int, purpose: str, position: int) -> int:
    """64 well-mixed bits of the three.

    A torch CPU generator uses the low 32 bits of its seed only, so neighbouring seeds and positions must not be added
    but hashed.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(seed: int, purpose: str, position: int) -> float:
    """A number in [0, 1), with all 53 bits of a double."""
    return (derive_seed(seed, purpose, position) >> 11) / 2**53


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator for longer draws."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, position) % 2**32)


def subset(seed: int, total: int, count: int) -> Sequence[int]:
    """`count` of the indices 0 .. total - 1, ascending, each set of them equally likely; all where there are no more.

    By Floyd's algorithm (Bentley and Floyd, 1987), whose memory does not grow with the total, which a file may claim to be anything.
    """
    if count >= total:
        return range(total)
    chosen = set[int]()
    for last in range(total - count, total):
        drawn = int(uniform(seed, "subset", last) * (last + 1))
        chosen.add(last if drawn in chosen else drawn)
    return sorted(chosen)
