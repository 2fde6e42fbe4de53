"""Decoded images in memory that a training shares with the processes that read for it, so that each is decoded once."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..utils.memory import free_memory

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it: containers often have little


class DecodedCache:
    """Pixels (N, C, H, W) uint8 and labels, filled as they are asked for.

    A process may see another's mark of an image before its pixels, where the machine reorders writes. So the mark is their checksum.
    """

    def __init__(self, count: int, shape: Sequence[int], shared: bool) -> None:
        """`shared`: other processes will fill it and read from it, too."""
        self.pixels = torch.empty((count, *shape), dtype=torch.uint8)
        self.labels = torch.zeros(count, dtype=torch.int64)
        self.checksums = torch.full((count,), -1, dtype=torch.int64)  # -1: not there
        if shared:
            for tensor in (self.pixels, self.labels, self.checksums):
                tensor.share_memory_()

    def get(self, index: int) -> tuple[Tensor, int] | None:
        """Pixels (C, H, W) and label; None where they are not there yet."""
        pixels, label = self.pixels[index], int(self.labels.numpy()[index])
        return (pixels, label) if self.checksums.numpy()[index] == _checksum(pixels, label) else None

    def put(self, index: int, pixels: Tensor, label: int) -> None:
        """Keeps an image. Several processes may do so at once, with the same bytes."""
        self.pixels[index] = pixels
        self.labels[index] = label
        self.checksums[index] = _checksum(self.pixels[index], label)


def _checksum(pixels: Tensor, label: int) -> int:
    return zlib.crc32(pixels.numpy().data, label)


def make_cache(count: int, shape: Sequence[int], most_mb: int, shared: bool) -> DecodedCache | None:
    """A cache, where all images fit into `most_mb` (10^6 bytes) and into half the memory that is left; else None."""
    size = count * math.prod(shape)
    if size > 1e6 * most_mb or size > _room(shared) / 2:
        return None
    return DecodedCache(count, shape, shared)


def _room(shared: bool) -> int:
    """Bytes that are left for each training process of this machine."""
    left = free_memory()
    if shared and SHARED_MEMORY.is_dir():
        left = min(left, shutil.disk_usage(SHARED_MEMORY).free)
    return left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
