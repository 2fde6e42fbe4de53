"""Which image, with which draws, stands at position p of a run.

Position p is the p-th image the run ever sees. Its epoch, its place in the epoch's permutation, its flip, its dropped
label, its u (which becomes the timestep) and its noise follow from (seed, p) alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..config.schema import DataConfig
from ..errors import DebiasError, InputError
from ..utils import seeding
from ..utils.torch_errors import LOST_WORKER
from . import images
from .decoded_cache import make_cache
from .sources import Source, require_class


class TrainingData(Dataset):
    """The samples of a run by position: 0, 1, 2, ... through all epochs.

    Each is a dict: `image` (C, H, W) uint8, `label` int64, `u` float64 in [0, 1), `noise` (C, H, W) float32. A dropped
    label is `null_label`, one after the last class. An image that cannot be read is returned as the error that says so, because a
    loader's worker would turn a raised one into a traceback.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int, channels: int | None = None) -> None:
        """`channels`: of the network, where `config` leaves them out and all images were looked at; else those of the first image."""
        assert config.resolution is not None
        self.source, self.config, self.seed = source, config, seed
        self.resolution = config.resolution
        self.num_classes = len(source.class_names) if source.class_names else 0
        self.null_label = self.num_classes if self.num_classes and config.label_dropout > 0 else None
        self.channels = config.channels or channels or self._channels_of_the_first()
        self.shape = (self.channels, self.resolution, self.resolution)
        # The processes that read are forked from this one, or are sent what they share.
        self.cache = make_cache(len(source), self.shape, config.cache_images_mb, shared=config.num_workers > 0)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _channels_of_the_first(self) -> int:
        content, _, where = self.source.read(0)
        return 3 if images.decode(content, where).mode == "RGB" else 1

    def index(self, position: int) -> int:
        """The source's index of the image at a position: each epoch is a permutation of (seed, epoch)."""
        epoch, place = divmod(position, len(self.source))
        if epoch != self._epoch:
            order = torch.randperm(len(self.source), generator=seeding.generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, order.numpy()
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, Any] | DebiasError:
        try:
            return self._sample(position)
        except DebiasError as error:
            return error

    def _sample(self, position: int) -> dict[str, Any]:
        pixels, label = self.decoded(self.index(position))
        if self.config.random_flip and seeding.uniform(self.seed, "flip", position) < 0.5:
            pixels = pixels.flip(-1)
        if self.null_label is not None and seeding.uniform(self.seed, "label", position) < self.config.label_dropout:
            label = self.null_label
        return {
            "image": pixels,
            "label": label,
            "u": seeding.uniform(self.seed, "timestep", position),
            "noise": torch.randn(self.shape, generator=seeding.generator(self.seed, "noise", position)),
        }

    def decoded(self, index: int) -> tuple[Tensor, int]:
        """Pixels (C, H, W) uint8 and label of one image; kept in memory where all of them fit."""
        if self.cache is None:
            return self._decode(index)
        found = self.cache.get(index)
        if found is None:
            found = self._decode(index)
            self.cache.put(index, *found)
        return found

    def _decode(self, index: int) -> tuple[Tensor, int]:
        content, label, where = self.source.read(index)
        image = images.decode(content, where)
        if image.mode == "RGB" and self.channels == 1 and self.config.channels is None:
            raise InputError(f"image {where} has colours, but the model learns grey ones; add --channels 1, which converts it to grey")
        require_class(label, self.source.class_names, where)
        image = images.fit(image.convert("L" if self.channels == 1 else "RGB"), self.resolution)
        return torch.from_numpy(images.to_array(image)), label


class PositionBatches(Sampler[list[int]]):
    """The positions of each forward of one process, from a step to the last.

    Step k has the positions k B .. (k+1) B - 1; process r of n has the r-th of n equal parts of them, in micro-batches of at most
    `micro_batch_size`.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int, num_processes: int, steps: range) -> None:
        self.batch_size, self.micro_batch_size, self.steps = batch_size, micro_batch_size, steps
        self.share = batch_size // num_processes
        self.offset = rank * self.share

    def micro_batches(self, step: int) -> list[range]:
        """The positions of one step in this process, a range for each forward."""
        start = step * self.batch_size + self.offset
        end = start + self.share
        return [range(first, min(first + self.micro_batch_size, end)) for first in range(start, end, self.micro_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from map(list, self.micro_batches(step))

    def __len__(self) -> int:
        return len(self.steps) * -(-self.share // self.micro_batch_size)


def collate(samples: list[dict[str, Any] | DebiasError]) -> dict[str, Tensor] | DebiasError:
    """Samples stacked to a batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, DebiasError):
            return sample
    batch: dict[str, Tensor] = default_collate(samples)
    return batch


def micro_batches(data: TrainingData, positions: PositionBatches, pin_memory: bool) -> Generator[dict[str, Tensor], None, None]:
    """Micro-batches in the order of `positions`.

    Raises:
        InputError: an image cannot be read; the message names it.
        DebiasError: a worker is gone.

    However it ends, by its last batch, an error or `close`, no worker is left.
    """
    loader = DataLoader(
        data,
        batch_sampler=positions,
        num_workers=data.config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except BaseException:  # between two workers, of which the first has begun
        _kill(set(multiprocessing.active_children()) - others)
        raise
    try:
        for batch in iterator:
            if isinstance(batch, DebiasError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:  # it was killed while it handed a batch over
        raise DebiasError(LOST_WORKER) from error
    finally:
        _end_workers(iterator)


def _end_workers(iterator: Any) -> None:
    """Ends the workers of a loader's iterator; those that stay are killed.

    Python joins them without a limit when the process ends, and they ignore the SIGTERM that they are sent before. An error that is
    raised keeps the iterator alive, so that it does not end them by itself.
    """
    workers = getattr(iterator, "_workers", [])  # none where the loop reads
    if workers:
        with contextlib.suppress(RuntimeError):  # of torch's handler of SIGCHLD: that one was killed is known, or does not matter any more
            iterator._shutdown_workers()
    _kill(workers)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()
        worker.join(5)  # no longer: not even SIGKILL ends one that waits for a disk that is gone


def _prepare_worker(_: int) -> None:
    """A worker leaves stopping to the process that trains: a signal to the whole group must not end it before the save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
