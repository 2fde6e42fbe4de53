"""Aspect-ratio buckets: image sizes of about equal area, which image has which, and which images a step has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ..utils import seeding
from .shards.order import ShardOrder

MAX_RATIO = 4  # of the sides of a size
MIN_AREA = 0.9  # of a size, as a share of the square of the resolution; it has at most that square
MAX_STEP = 64  # pixels
MEASURED_AT_ONCE = 1 << 16  # images whose distances from all sizes are in memory

Size = tuple[int, int]  # height and width in pixels


def side_step(resolution: int, unit: int) -> int:
    """What the sides of all sizes are multiples of: 64 from 512 pixels on, below an eighth of the resolution in multiples of `unit`."""
    return max(unit, min(MAX_STEP, resolution // 8) // unit * unit)


def bucket_sizes(resolution: int, unit: int) -> list[Size]:
    """The sizes of a resolution; at 1024 those of SDXL's own training (arXiv 2307.01952, appendix I).

    Args:
        resolution: of the square, a multiple of `unit`.
        unit: pixels of which a side must be a multiple, whatever the resolution.
    """
    step, area = side_step(resolution, unit), resolution**2
    sides = range(step, 2 * resolution + 1, step)  # with an area of at most the square and a ratio of at most 4
    found = [
        (height, width)
        for height in sides
        for width in sides
        if MIN_AREA * area <= height * width <= area and max(height, width) <= MAX_RATIO * min(height, width)
    ]
    return found or [(resolution, resolution)]


class Buckets:
    """The size of each image: that of the nearest aspect ratio, by the logarithm of the ratio; of two as near the larger one."""

    def __init__(self, sizes: Sequence[Size] | np.ndarray, resolution: int, unit: int) -> None:
        """`sizes` (N, 2) are those of the images, other arguments as of `bucket_sizes`."""
        every = sorted(bucket_sizes(resolution, unit), key=lambda size: (-size[0] * size[1], size))
        original = np.array(sizes, dtype=np.float64).reshape(-1, 2)
        targets = np.array(every, dtype=np.float64)
        ratios, wanted = np.log(original[:, :1] / original[:, 1:]), np.log(targets[:, 0] / targets[:, 1])
        parts = np.array_split(ratios, len(ratios) // MEASURED_AT_ONCE + 1)
        nearest = np.concatenate([np.abs(part - wanted).argmin(1) for part in parts])
        self.sizes: list[Size] = [every[k] for k in nearest]  # of each image
        self.enlarged = int((original < targets[nearest]).any(1).sum())  # images that are smaller than their size

    def describe(self, samples: Sequence[int]) -> str:
        """A line for the user; `samples` are the images of an epoch, some of which may occur several times."""
        counts = Counter(map(self.sizes.__getitem__, samples))
        listed = ", ".join(f"{width}x{height}: {counts[height, width]}" for height, width in sorted(counts))
        enlarged = f"; {self.enlarged} images are smaller than their size and enlarged" if self.enlarged else ""
        return f"aspect_ratio_buckets: {len(counts)} sizes (width x height: images): {listed}{enlarged}"


class BucketOrder:
    """Which sample is at a position, where a step has samples of one bucket: a function of (seed, position), found without a replay.

    The samples of a bucket are an endless stream of permutations, of which every step takes the next `batch_size` of one bucket, B. In
    the first e epochs bucket b, of n samples, has ceil(e n / B) steps: every sample was seen e times, and fewer than B of each bucket once
    more. So a bucket has its share of the steps, and one with fewer than B samples a step in the first epoch, too. The order of the
    steps of an epoch is shuffled.

    In windows of shards the permutation of each bucket is a `ShardOrder`, and the steps of each bucket are spread evenly over the epoch, at
    random within equal parts of it: all buckets go through the shards together, except for images of rare sizes, of which a step needs
    `batch_size`, from wherever they are.
    """

    def __init__(
        self,
        buckets: Sequence[Size],
        batch_size: int,
        seed: int,
        starts: Sequence[int] | np.ndarray | None = None,
        window: int | None = None,
    ) -> None:
        """The order of some samples.

        Args:
            buckets: the size of each sample.
            batch_size: of a step, over all processes.
            seed: of the run.
            starts: of the shards, as in `ShardOrder`; one if left out.
            window: as in `ShardOrder`.
        """
        self.batch_size, self.seed = batch_size, seed
        self._evenly = starts is not None and window is not None and window < len(starts) - 1
        self.sizes = sorted(set(buckets))
        number = {size: k for k, size in enumerate(self.sizes)}
        of_samples = np.array([number[size] for size in buckets])
        self._members = [np.flatnonzero(of_samples == k) for k in range(len(self.sizes))]
        self._counts = np.array([len(members) for members in self._members], dtype=np.int64)
        self._steps = range(0)  # of the epoch that the following are of
        self._buckets = self._ranks = np.empty(0, dtype=np.int64)  # the bucket of each step, and how many steps before have the same
        starts = (0, len(buckets)) if starts is None else starts
        self._orders = [
            ShardOrder(np.searchsorted(members, starts), window, seed, f"order of {height}x{width}")
            for members, (height, width) in zip(self._members, self.sizes)
        ]

    def steps(self, epochs: float) -> int:
        """The steps of the first epochs, after which every sample was seen so often."""
        return sum(-(-math.ceil(epochs * int(count)) // self.batch_size) for count in self._counts)

    def index(self, position: int) -> int:
        """The sample at a position of the run."""
        step, place = divmod(position, self.batch_size)
        if step not in self._steps:
            self._shuffle(self._epoch_of(step))
        bucket, rank = int(self._buckets[step - self._steps.start]), int(self._ranks[step - self._steps.start])
        epoch, place = divmod(rank * self.batch_size + place, len(self._members[bucket]))
        return int(self._members[bucket][self._orders[bucket].index(epoch, place)])

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Epoch and window of the last `index` of each bucket; negative where there was none."""
        return [order.window for order in self._orders]

    def soon(self) -> np.ndarray:
        """The shards of the windows in which the buckets are, and of the windows after those, as of `ShardOrder.soon`."""
        return np.concatenate([order.soon() for order in self._orders if order.window[0] >= 0])

    def _done(self, epochs: int) -> np.ndarray:
        """The steps of each bucket in the first epochs."""
        return -(-epochs * self._counts // self.batch_size)

    def _epoch_of(self, step: int) -> int:
        """The epoch of a step: the last one that does not begin after it. e epochs of N samples have from e N / B steps on, rounded up."""
        low, high = 0, step * self.batch_size // int(self._counts.sum()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._done(middle).sum() <= step else (low, middle)
        return low

    def _shuffle(self, epoch: int) -> None:
        """Draws the order of the steps of an epoch."""
        before, after = self._done(epoch), self._done(epoch + 1)
        self._steps = range(int(before.sum()), int(after.sum()))
        each = after - before
        if self._evenly:
            self._spread(epoch, before, each)
            return
        order = torch.randperm(len(self._steps), generator=seeding.generator(self.seed, "buckets", epoch)).numpy()
        self._buckets, self._ranks = np.empty_like(order), np.empty_like(order)
        # In the order of `order`, bucket after bucket: its steps are numbered as they follow in the run.
        ends = each.cumsum()
        for bucket, (start, end) in enumerate(zip(ends - each, ends)):
            steps = np.sort(order[start:end])
            self._buckets[steps], self._ranks[steps] = bucket, before[bucket] + np.arange(end - start)

    def _spread(self, epoch: int, before: np.ndarray, each: np.ndarray) -> None:
        """Draws the order of the steps of an epoch: step j of the n of a bucket is at random in part j of n of the epoch."""
        buckets = np.repeat(np.arange(len(each)), each)
        numbers = np.arange(len(buckets)) - np.repeat(each.cumsum() - each, each)
        drawn = torch.rand(len(buckets), generator=seeding.generator(self.seed, "buckets", epoch), dtype=torch.float64).numpy()
        order = np.argsort((numbers + drawn) / each[buckets], kind="stable")
        self._buckets, self._ranks = buckets[order], before[buckets[order]] + numbers[order]
