"""A cache of decoded images in memory, shared with the data loader workers, so that each image is decoded once."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..utils.launcher import world_size
from ..utils.memory import free_memory

SHARED_MEMORY = Path("/dev/shm")  # shared memory of Linux; containers often have little of it


class DecodedCache:
    """Pixels (N, C, H, W) uint8 and labels (N,) int64, filled on first use.

    A CPU may reorder writes, so a process could see an entry marked as filled before its pixels. Therefore the mark is their checksum.
    """

    def __init__(self, count: int, shape: Sequence[int], shared: bool) -> None:
        """`count` images of `shape` (C, H, W). `shared`: other processes use the cache, too."""
        self.pixels = torch.empty((count, *shape), dtype=torch.uint8)
        self.labels = torch.zeros(count, dtype=torch.int64)
        self.checksums = torch.full((count,), -1, dtype=torch.int64)  # -1: not filled
        if shared:
            for tensor in (self.pixels, self.labels, self.checksums):
                tensor.share_memory_()

    def get(self, index: int) -> tuple[Tensor, int] | None:
        """Pixels (C, H, W) uint8 and label; None if the image is not in the cache."""
        pixels, label = self.pixels[index], int(self.labels.numpy()[index])
        return (pixels, label) if self.checksums.numpy()[index] == _checksum(pixels, label) else None

    def put(self, index: int, pixels: Tensor, label: int) -> None:
        """Stores pixels (C, H, W) uint8 and label. Several processes may store the same image at the same time."""
        self.pixels[index] = pixels
        self.labels[index] = label
        self.checksums[index] = _checksum(self.pixels[index], label)


def _checksum(pixels: Tensor, label: int) -> int:
    return zlib.crc32(pixels.numpy().data, label)


def make_cache(count: int, shape: Sequence[int], max_mb: int, shared: bool) -> DecodedCache | None:
    """A cache for `count` images (C, H, W) if they fit into `max_mb` (10^6 bytes) and into half the free memory; else None."""
    size = count * math.prod(shape)
    if size > 1e6 * max_mb or size > _free_per_process(shared) / 2:
        return None
    return DecodedCache(count, shape, shared)


def _free_per_process(shared: bool) -> int:
    """Free bytes for each training process of this computer."""
    free = free_memory()
    if shared and SHARED_MEMORY.is_dir():
        free = min(free, shutil.disk_usage(SHARED_MEMORY).free)
    return free // world_size("LOCAL_WORLD_SIZE")
