"""The training dataset, indexed by position in the run: image, flip, label, timestep and noise.

Position p is the p-th image that the run trains on, counted over all epochs. Its epoch, its index in the epoch's
permutation, its flip, its label dropout, its u (which becomes the timestep) and its noise are functions of (seed, p).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..config.choices import steps_of_epochs
from ..config.schema.data import DataConfig
from ..config.schema.objective import NoiseConfig
from ..config.schema.training import OptimizationConfig
from ..errors import DebiasError, InputError
from ..utils import seeding
from ..utils.torch_errors import LOST_WORKER
from . import images
from .buckets import BucketOrder
from .decoded_cache import make_cache
from .noise import draw_noise
from .shards.order import ShardOrder
from .sources.base import Source
from .sources.checks import MAX_SKIPPED_SHARE, require_class
from .sources.subset import sharded

T = TypeVar("T")

REPLACEMENTS = 1000  # positions whose images are tried in place of one that cannot be read


class ChannelsError(InputError):
    """An image has colours, and the model learns grey ones: it can be read, and is not skipped."""


class PositionedData(Dataset):
    """The samples of a run by position: 0, 1, 2, ... through all epochs, each a permutation of the source.

    A sample is a dict with `u`, float64 in [0, 1), `noise`, float32 of the shape of x_0, and what the task needs. Where an image cannot
    be read the error is returned and not raised, because a data loader worker would turn a raised error into a traceback.

    The data loader takes whole batches, whose random numbers are drawn together.
    """

    shape: tuple[int, ...]  # of one x_0

    def __init__(self, source: Source, config: DataConfig, seed: int, noise: NoiseConfig) -> None:
        assert config.resolution is not None
        self.source, self.config, self.seed, self.resolution, self.noise = source, config, seed, config.resolution, noise
        self.count = len(source)
        self._order = ShardOrder(shard_starts(source, config), config.shuffle_window, seed)
        self._shards = sharded(source)
        self._window: object = None  # of the last index

    def index(self, position: int) -> int:
        """The index in the source of the image at a position. Each epoch is a permutation, a function of (seed, epoch)."""
        index = self._order.index(*divmod(position, self.count))
        self._prefetch(self._order.window, self._order)
        return index

    def _prefetch(self, window: object, order: ShardOrder | BucketOrder) -> None:
        """Says which shards are read next when the last `index` was in another window than the one before."""
        if self._shards and window != self._window:
            self._window = window
            self._shards.prefetch(order.soon())

    def __getitem__(self, position: int) -> dict[str, Any] | DebiasError:
        batch = self.__getitems__([position])
        return batch if isinstance(batch, DebiasError) else {name: values[0] for name, values in batch.items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any] | DebiasError:
        """The batch of the samples at some positions, such as `noise` (B, C, H, W) and `u` (B,); or an error."""
        try:
            return {**default_collate([self.sample(position) for position in positions]), **self.drawn(positions)}
        except DebiasError as error:
            return error

    def sample(self, position: int) -> dict[str, Any]:
        """The sample at a position without what is `drawn`, a function of (seed, position). Raises DebiasError."""
        raise NotImplementedError

    def shape_at(self, positions: Sequence[int]) -> Sequence[int]:
        """The shape of x_0 at some positions, which all have the same."""
        return self.shape

    def read(self, position: int, read: Callable[[int], T]) -> tuple[int, T, dict[str, str]]:
        """What `read` gives of the image at a position.

        With `skip_bad` an image that cannot be read is replaced by that of the next position which can be, and has the same size: a
        function of (seed, position), as `index` is.

        Returns:
            The index of the image in the source, what was read, and with `skip_bad` under "skipped" what is wrong with the image that
            it replaces, or "".
        """
        index = self.index(position)
        if not self.config.skip_bad:
            return index, read(index), {}
        try:
            return index, read(index), {"skipped": ""}
        except ChannelsError:
            raise
        except InputError as error:
            for other in map(self.index, range(position + 1, position + 1 + REPLACEMENTS)):
                with contextlib.suppress(InputError):
                    if self.same_size(index, other):
                        return other, read(other), {"skipped": str(error)}
            raise

    def require_few_skipped(self, count: int, position: int) -> None:
        """Raises InputError where so many samples before a position, or in the first epoch, are more than `skip_bad` permits to replace."""
        if count > MAX_SKIPPED_SHARE * max(self.count, position):
            raise InputError(
                f"dataset {self.config.dataset}: the images of {count} of {position} samples could not be read, and no more than "
                f"{MAX_SKIPPED_SHARE:.0%} are skipped; --check_images all names them before a training"
            )

    def same_size(self, one: int, other: int) -> bool:
        """Whether the samples of two images of the source have one shape."""
        return True

    def flips(self, position: int) -> bool:
        """Whether the image at a position is mirrored."""
        return self.config.random_flip and seeding.uniform(self.seed, "flip", position) < 0.5

    def drawn(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """The random numbers of the loss at some positions: `u`, and what `draw_noise` returns."""
        u = torch.tensor([seeding.uniform(self.seed, "timestep", position) for position in positions], dtype=torch.float64)
        return {"u": u, **draw_noise(self.shape_at(positions), self.noise, self.seed, positions)}

    def one_shape(self, positions: Sequence[int]) -> list[Sequence[int]]:
        """Some positions in parts whose x_0 have one shape each."""
        return [positions]

    def steps_of_epochs(self, optim: OptimizationConfig, step: int = 0, position: int = 0) -> int:
        """The `max_steps` that `num_epochs` is, of a run that is at this step and position."""
        return steps_of_epochs(optim, self.count, step, position)


def shard_starts(source: Source, config: DataConfig) -> Sequence[int] | np.ndarray:
    """The first image of each shard of a source, and the number of images; one shard where all are shuffled together.

    Raises:
        InputError: there are no shards to shuffle in windows.
    """
    if config.shuffle_window is None:
        return (0, len(source))
    starts = source.shards()
    if starts is None:
        raise InputError(
            f"shuffle_window is {config.shuffle_window}, but the images of dataset {config.dataset} are no shards; leave it out, or make "
            f"shards of them with python -m debias_diffusers.shards make"
        )
    return starts


class TrainingData(PositionedData):
    """Images and their labels.

    Beside `u` and `noise` a sample has `image` (C, H, W) uint8 and `label` int64. A dropped label is `null_label`, the index after the
    last class.
    """

    def __init__(
        self, source: Source, config: DataConfig, seed: int, channels: int | None = None, noise: NoiseConfig | None = None
    ) -> None:
        """`channels`: of the network, used if `config` leaves them out. If both are None, the first image decides."""
        super().__init__(source, config, seed, noise or NoiseConfig())
        self.num_classes = len(source.class_names) if source.class_names else 0
        self.null_label = self.num_classes if self.num_classes and config.label_dropout > 0 else None
        self.channels = config.channels or channels or self._channels_of_the_first()
        self.shape = (self.channels, self.resolution, self.resolution)
        # Data loader workers share the cache: they are forked from this process, or receive its shared tensors.
        self.cache = make_cache(len(source), self.shape, config.cache_images_mb, shared=config.num_workers > 0)

    def _channels_of_the_first(self) -> int:
        content, _, where = self.source.read(0)
        return 3 if images.decode(content, where).mode == "RGB" else 1

    def sample(self, position: int) -> dict[str, Any]:
        _, (pixels, label), skipped = self.read(position, self.decoded)
        if self.flips(position):
            pixels = pixels.flip(-1)
        if self.null_label is not None and seeding.uniform(self.seed, "label", position) < self.config.label_dropout:
            label = self.null_label
        return {"image": pixels, "label": label, **skipped}

    def decoded(self, index: int) -> tuple[Tensor, int]:
        """Pixels (C, H, W) uint8 and label of the image at an index of the source, from the cache in memory if there is one."""
        if self.cache is None:
            return self._decode(index)
        found = self.cache.get(index)
        if found is None:
            found = self._decode(index)
            self.cache.put(index, *found)
        return found

    def _decode(self, index: int) -> tuple[Tensor, int]:
        content, label, where = self.source.read(index)
        image = images.decode(content, where, (self.resolution, self.resolution) if self.config.jpeg_draft else None)
        if image.mode == "RGB" and self.channels == 1 and self.config.channels is None:
            raise ChannelsError(f"image {where} has colours, but the model learns grey ones; add --channels 1, which converts it to grey")
        require_class(label, self.source.class_names, where)
        image = images.fit(image.convert("L" if self.channels == 1 else "RGB"), self.resolution)
        return torch.from_numpy(images.to_array(image)), label


class PositionBatchSampler(Sampler[list[int]]):
    """A batch sampler: the positions of each micro-batch of one process, for a range of steps.

    Step k has the positions kB + o .. (k+1)B + o - 1; process r of n has the r-th of n equal parts of them, in micro-batches of at most
    `micro_batch_size`. The origin o is 0, unless the batch size was changed: then every step goes on where the one before ended.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int, num_processes: int, steps: range, origin: int = 0) -> None:
        self.batch_size, self.micro_batch_size, self.steps, self.origin = batch_size, micro_batch_size, steps, origin
        self.share = batch_size // num_processes
        self.offset = rank * self.share

    def first(self, step: int) -> int:
        """The first position of a step, over all processes."""
        return step * self.batch_size + self.origin

    def of_step(self, step: int) -> range:
        """The positions of a step, over all processes."""
        return range(self.first(step), self.first(step + 1))

    def micro_batches(self, step: int) -> list[range]:
        """The positions of one step in this process, one range for each forward."""
        start = self.first(step) + self.offset
        end = start + self.share
        return [range(first, min(first + self.micro_batch_size, end)) for first in range(start, end, self.micro_batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from map(list, self.micro_batches(step))

    def __len__(self) -> int:
        return len(self.steps) * -(-self.share // self.micro_batch_size)


def load_batch(data: PositionedData, positions: Sequence[int]) -> dict[str, Tensor]:
    """The batch of samples at some positions, without workers.

    Raises:
        DebiasError: an image cannot be read.
    """
    batch = data.__getitems__(positions)
    if isinstance(batch, DebiasError):
        raise batch
    return batch


def micro_batches(data: PositionedData, positions: PositionBatchSampler, pin_memory: bool) -> Generator[dict[str, Tensor], None, None]:
    """Loads micro-batches in the order of `positions`.

    At the end, whether by the last batch, an error or `close`, all data loader workers are stopped.

    Raises:
        InputError: an image cannot be read; the message names it.
        DebiasError: a worker was killed.
    """
    if (shards := sharded(data.source)) and data.config.num_workers:
        shards.close()  # workers, which are forked, would keep files of the cache open that only this process has read
    loader = DataLoader(
        data,
        batch_sampler=positions,
        num_workers=data.config.num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )
    others = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    except BaseException:  # interrupted while workers were being started: the iterator does not exist yet
        _kill(set(multiprocessing.active_children()) - others)
        raise
    try:
        for batch in iterator:
            if isinstance(batch, DebiasError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:  # a worker was killed while it sent a batch
        raise DebiasError(LOST_WORKER) from error
    finally:
        _end_workers(iterator)


def _as_it_is(batch: Any) -> Any:
    """The dataset makes batches."""
    return batch


def _end_workers(iterator: Any) -> None:
    """Stops the workers of a data loader iterator and kills those that do not stop.

    Otherwise Python would join them without a timeout when the process ends, and they ignore the SIGTERM that it sends before. A raised
    error keeps the iterator alive, so its destructor does not stop them.
    """
    workers = getattr(iterator, "_workers", [])  # none if num_workers is 0
    if workers:
        with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler reports a killed worker here; that is known already
            iterator._shutdown_workers()
    _kill(workers)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()
        worker.join(5)  # seconds; even SIGKILL does not end a process that waits for a lost disk


def _prepare_worker(_: int) -> None:
    """Makes a worker ignore SIGINT and SIGTERM: a signal to the process group must not end it before the training process has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
