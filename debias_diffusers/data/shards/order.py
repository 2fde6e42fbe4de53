"""The order of images in an epoch: a permutation of all, or shards in another order in every epoch and images shuffled within windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...utils import seeding


class ShardOrder:
    """Which image is at a place of an epoch: a function of (seed, epoch, place), found without a replay.

    The shards are permuted and divided into windows of at most K shards, whose numbers differ by at most one; the images of each window
    are permuted. With K of at least the number of shards, an epoch is a permutation of all images. The memory is that of a window's
    permutation and of a few numbers for each shard.
    """

    def __init__(self, starts: Sequence[int] | np.ndarray, window: int | None, seed: int, purpose: str = "order") -> None:
        """The order of some images.

        Args:
            starts: the first image of each shard, and the number of images; a shard may have none.
            window: K; all shards if None.
            seed: of the run.
            purpose: of the permutations of images. The order of the shards has a purpose of its own, so that orders of other images of the
                same shards go through them together.
        """
        self.starts, self.seed, self.purpose = np.asarray(starts, np.int64), seed, purpose
        shards = len(self.starts) - 1
        self.count = int(self.starts[-1])
        windows = -(-shards // min(window or shards, shards)) if shards else 1
        self._edges = np.arange(windows + 1) * shards // windows  # of the windows, in shards
        self._epoch = self._window = -1
        self._shards = np.arange(shards)  # in the order of the epoch
        self._ends = self.starts  # images of the epoch until the end of each window
        self._order = np.empty(0, np.int64)  # the images of the window, in theirs

    def index(self, epoch: int, place: int) -> int:
        """The image at a place of an epoch."""
        if epoch != self._epoch:
            self._shuffle_shards(epoch)
        window = int(np.searchsorted(self._ends, place, "right"))
        if window != self._window:
            self._order, self._window = self._images(epoch, window), window
        return int(self._order[place - (self._ends[window - 1] if window else 0)])

    def soon(self) -> np.ndarray:
        """The shards of the window of the last `index`, and those of the window after it."""
        following = self._window + 1
        if following < len(self._edges) - 1:
            return np.concatenate([self._of(self._window), self._of(following)])
        first: np.ndarray = self._permutation(self._epoch + 1)[: self._edges[1]]
        return np.concatenate([self._of(self._window), first])

    @property
    def window(self) -> tuple[int, int]:
        """Epoch and window of the last `index`."""
        return self._epoch, self._window

    def _shuffle_shards(self, epoch: int) -> None:
        self._epoch, self._window, self._shards = epoch, -1, self._permutation(epoch)
        sizes = np.diff(self.starts)[self._shards]
        self._ends = np.concatenate([[0], sizes.cumsum()])[self._edges[1:]]

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of the shards in an epoch. In one window it does not matter."""
        shards = len(self.starts) - 1
        if len(self._edges) == 2:
            return np.arange(shards)
        order: np.ndarray = torch.randperm(shards, generator=seeding.generator(self.seed, "order of shards", epoch)).numpy()
        return order

    def _of(self, window: int) -> np.ndarray:
        """The shards of a window."""
        return self._shards[self._edges[window] : self._edges[window + 1]]

    def _images(self, epoch: int, window: int) -> np.ndarray:
        """The images of a window in their order."""
        if len(self._edges) == 2:
            full: np.ndarray = torch.randperm(self.count, generator=seeding.generator(self.seed, self.purpose, epoch)).numpy()
            return full
        shards = self._of(window)
        sizes = np.diff(self.starts)[shards]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        every = np.repeat(self.starts[shards], sizes) + within
        generator = seeding.generator(self.seed, f"{self.purpose}, window {window}", epoch)
        shuffled: np.ndarray = every[torch.randperm(len(every), generator=generator).numpy()]
        return shuffled
