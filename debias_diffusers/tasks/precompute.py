"""Latents and text embeddings that are computed before the first step: shared by the processes, and kept in a folder that runs share.

In the folder each entry has a key of all that it depends on, so that no entry can be stale: another picture, crop, VAE or version has
another key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..data import images
from ..data.sources.base import Source
from ..data.sources.checks import map_in_threads
from ..errors import CannotWriteError, InputError, StoppedError
from ..utils.console import say
from ..utils.distributed import broadcast_from_first, gather_from_all, in_each_process, told_by_the_first
from ..utils.files import free_bytes, remove, require_writable
from ..utils.signals import asked_to_stop
from .tensor_store import DAMAGED, E, Place, ShardWriter, StoredTensors, TensorStore

FORMAT = 1  # to be raised with every change of how images are decoded and resized, and of how images and captions are encoded
FILES_AT_ONCE, SHARDS_AT_ONCE = 1024, 4  # that a process reads before it tells the others

T = TypeVar("T")
Encode = Callable[[Sequence[E]], Mapping[str, Tensor]]  # entries to tensors by name, on any device, a row for each
Group = tuple[Sequence[E], int]  # entries whose tensors have one shape, and how many are encoded at once


def key_of(**ingredients: Any) -> bytes:
    """The key of an entry (32 bytes): the sha256 of all that it depends on, and of our format."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **ingredients}, sort_keys=True).encode()).digest()


def shared(work: Callable[[int], T], count: int, at_once: int, accelerator: Accelerator, what: str) -> list[T]:
    """`work(k)` of all k < count, in all processes, which share the calls and exchange the results every `at_once` of them.

    All processes must call it, and none waits for another longer than so many calls take.

    Raises:
        DebiasError: in all processes, what `work` raised in one.
        StoppedError: in all processes, where one was asked to stop.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    found: list[T] = []
    for first in tqdm(range(0, count, at_once * processes), what, leave=False, delay=5, disable=rank > 0):
        _stop_if_asked(accelerator)
        mine = range(first + rank * at_once, min(first + (rank + 1) * at_once, count))
        with told_by_the_first():
            found += gather_from_all(lambda mine=mine: list(map_in_threads(work, mine)), processes)  # type: ignore[misc]
    return found


def _stop_if_asked(accelerator: Accelerator) -> None:
    """Raises StoppedError in all processes where a signal asks one to stop: what follows may take hours, and no step is lost."""
    if signum := max(gather_from_all(lambda: [asked_to_stop()], accelerator.num_processes)):
        raise StoppedError(f"stopped by {signal.Signals(signum).name} before the first step; the same command continues", signum)


def picture_hashes(source: Source, accelerator: Accelerator) -> list[str]:
    """The sha256 of the bytes of every image of a source."""

    def hash_of(index: int) -> str:
        return hashlib.sha256(source.read(index)[0]).hexdigest()

    return shared(hash_of, len(source), FILES_AT_ONCE, accelerator, "hashing the images")


def image_sizes(source: Source, accelerator: Accelerator, skip_bad: bool = False) -> Sequence[tuple[int, int]] | np.ndarray:
    """Height and width of every image of a source, from its index where it has one.

    Raises:
        InputError: an image cannot be read; with `skip_bad` it counts as a square.
    """

    def size_of(index: int) -> tuple[int, int]:
        try:
            content, _, where = source.read(index)
            return images.size_of(content, where)
        except InputError:
            if skip_bad:
                return (1, 1)
            raise

    known = source.sizes()
    if known is None:
        return shared(size_of, len(source), FILES_AT_ONCE, accelerator, "measuring the images")
    found = known.copy()
    for index in np.flatnonzero(~known.all(1)).tolist():  # whose header could not be read
        found[index] = size_of(index)
    return found


def encoded(
    groups: Sequence[Group[E]], encode: Encode[E], what: str, accelerator: Accelerator
) -> Iterator[tuple[list[E], dict[str, Tensor]]]:
    """Encodes all entries, and yields in every process the same parts: entries, and their tensors on the CPU.

    In every round each process encodes a batch; a process that has none left repeats the last one, so that all go through the same
    rounds. A batch always has the full size (the last entry of a group is repeated), because how numbers are rounded depends on it: an
    entry has the same bits, whichever entries are encoded with it.

    Raises:
        DebiasError: in all processes, what `encode` raised in one.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    total = sum(len(entries) for entries, _ in groups)
    with tqdm(total=total, desc=f"computing the {what}", leave=False, delay=5, disable=rank > 0) as progress:
        for entries, size in groups:
            last = len(entries) - 1
            batches = [[entries[min(k, last)] for k in range(first, first + size)] for first in range(0, len(entries), size)]
            for first in range(0, len(batches), processes):
                _stop_if_asked(accelerator)
                together = [min(k, len(batches) - 1) for k in range(first, first + processes)]
                tensors = _gathered(partial(encode, batches[together[rank]]), accelerator)
                flat = [entry for k in together for entry in batches[k]]
                rows = {entry: row for row, entry in reversed(list(enumerate(flat)))}
                done = list(dict.fromkeys(flat))
                yield done, {name: tensor[[rows[entry] for entry in done]] for name, tensor in tensors.items()}
                progress.update(len(done))


def _gathered(encode: Callable[[], Mapping[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """What all processes encode, one after the other, on the CPU."""
    tensors = in_each_process(encode, accelerator)
    if accelerator.num_processes == 1:
        return {name: tensor.cpu() for name, tensor in tensors.items()}
    return {name: accelerator.gather(tensor.to(accelerator.device)).cpu() for name, tensor in tensors.items()}


class Precomputation(Generic[E]):
    """What a folder has of some entries, and what is still to be computed. All processes must make and fill it together.

    Shards that are damaged or cannot be read are named, and what they held is computed anew. Damaged ones are removed.
    """

    def __init__(self, folder: Path, what: str, keys: Mapping[E, bytes], accelerator: Accelerator) -> None:
        """`what` the entries are, for messages, such as "latents"; `keys` of all entries, as of `key_of`."""
        self.store, self.what, self.keys, self.accelerator = TensorStore(folder), what, keys, accelerator
        self._places = self._found()
        self.missing = [entry for entry, key in keys.items() if key not in self._places]

    def _found(self) -> dict[bytes, Place]:
        # The first process alone lists the folder: other runs may write to it meanwhile.
        shards = broadcast_from_first(self.store.keys, self.accelerator)
        wanted = set(self.keys.values())
        names = [name for name, keys in shards.items() if keys is None or not wanted.isdisjoint(keys)]
        found = shared(lambda k: self.store.fault(names[k]), len(names), SHARDS_AT_ONCE, self.accelerator, f"verifying the {self.what}")
        faults = {name: fault for name, fault in zip(names, found) if fault}
        for name, fault in faults.items() if self.accelerator.is_main_process else ():
            say(f"{self.store.folder / name} {fault}; what it held is computed anew")
            if fault == DAMAGED:
                with contextlib.suppress(OSError):  # in a folder that cannot be written to
                    remove(self.store.folder / name)
        used = {name: shards[name] or [] for name in names if name not in faults}
        return {key: (name, row) for name, keys in used.items() for row, key in enumerate(keys) if key in wanted}

    def filled(self, groups: Sequence[Group[E]], encode: Encode[E]) -> StoredTensors[E]:
        """All entries, after what is missing was encoded and written by the first process.

        Args:
            groups: of all entries; those that are there are left out.
            encode: encodes a batch of them.

        Raises:
            CannotWriteError: a shard cannot be written; those that were written before stay.
        """
        if self.missing:
            absent, first = set(self.missing), self.accelerator.is_main_process
            writer = ShardWriter(self.store)
            left = [([entry for entry in entries if entry in absent], size) for entries, size in groups]
            try:
                for entries, tensors in encoded(left, encode, self.what, self.accelerator):
                    self._in_first(partial(writer.add, [self.keys[entry] for entry in entries], tensors))
            except StoppedError:  # in all processes
                self._in_first(writer.flush)
                raise
            self._in_first(writer.flush)
            self._places |= broadcast_from_first(lambda: writer.places if first else {}, self.accelerator)
        return StoredTensors(self.store, {entry: self._places[key] for entry, key in self.keys.items()})

    def _in_first(self, work: Callable[[], None]) -> None:
        """Does something in the first process; where it fails, all processes end."""
        in_each_process(lambda: work() if self.accelerator.is_main_process else None, self.accelerator)


def say_size(folder: str, missing: Mapping[str, tuple[int, int]], accelerator: Accelerator) -> None:
    """Prints what will be computed, and what it takes.

    Args:
        folder: `precompute_dir`.
        missing: number of entries, and bytes of each, by what they are.
        accelerator: of the processes.

    Raises:
        CannotWriteError: the folder cannot be written to, or its disk has not enough room.
    """
    with told_by_the_first():
        (free,) = gather_from_all(lambda: [_free_in(folder)] if accelerator.is_main_process else [], accelerator.num_processes)
        needed = sum(count * each for count, each in missing.values())
        parts = " and ".join(f"{count} {what} ({count * each / 1e6:.1f} MB)" for what, (count, each) in missing.items() if count)
        if needed > free:
            raise CannotWriteError(
                f"precompute_dir {folder} would need {needed / 1e6:.1f} MB more, for {parts}, but its disk has {free / 1e6:.1f} MB free; "
                f"name a folder on another disk"
            )
    if accelerator.is_main_process:
        say(f"precompute_dir {folder}: computing {parts}; {free / 1e6:.1f} MB are free")


def _free_in(folder: str) -> int:
    require_writable(Path(folder) / "latents")
    return free_bytes(Path(folder))
