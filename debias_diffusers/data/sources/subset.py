"""Sources made of another one: without some of its images, or with repeated images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from ...errors import InputError
from ..shards.source import ShardedSource
from .base import Source
from .folder import ImageFolder


class SourceSubset:
    """A source without some of its images."""

    def __init__(self, source: Source, skipped: Sequence[int]) -> None:
        self.source, self.skipped = source, sorted(skipped)
        self.class_names, self.split, self.passed_over = source.class_names, source.split, source.passed_over
        self.indices: Sequence[int] = _Kept(len(source), self.skipped)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int, str]:
        return self.source.read(self.indices[index])

    def labels(self) -> Sequence[int | None]:
        every = self.source.labels()
        return [every[index] for index in self.indices]

    def unused_labels(self) -> str | None:
        return self.source.unused_labels()

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | ({"skipped": self.skipped} if self.skipped else {})

    def files(self) -> list[str] | None:
        return self.source.files()

    def shards(self) -> np.ndarray | None:
        every = self.source.shards()
        return None if every is None else every - np.searchsorted(self.skipped, every)

    def sizes(self) -> np.ndarray | None:
        every = self.source.sizes()
        return None if every is None else np.delete(every, self.skipped, 0)


class _Kept(Sequence[int]):
    """The numbers 0 .. total - 1 without some, which are sorted: their memory is that of those that are left out."""

    def __init__(self, total: int, left_out: Sequence[int]) -> None:
        self._total, self._left_out = total, np.asarray(left_out, np.int64)
        self._len = total - len(left_out)
        self._before = self._left_out - np.arange(len(left_out))  # numbers that are kept before each that is not

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[k] for k in range(self._len)[index]]
        index = range(self._len)[index]
        return index + int(np.searchsorted(self._before, index, "right"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and np.array_equal(np.asarray(self), np.asarray(other))

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.delete(np.arange(self._total), self._left_out).astype(dtype or np.int64)


class RepeatedSource(SourceSubset):
    """A source whose images occur so many times, one after the other."""

    def __init__(self, source: Source, repeats: Sequence[int]) -> None:
        super().__init__(source, ())
        self.indices = [index for index, count in enumerate(repeats) for _ in range(count)]

    def shards(self) -> np.ndarray | None:
        return None

    def sizes(self) -> np.ndarray | None:
        return None


def folder_repeats(source: Source) -> list[int]:
    """How often each image of a folder is to occur in an epoch: N below a first-level folder named N_NAME, else once.

    Raises:
        InputError: the source is no folder of images.
    """
    if isinstance(source, SourceSubset):
        every = folder_repeats(source.source)
        return [every[index] for index in source.indices]
    inner = getattr(source, "source", source)  # of a source with captions
    if not isinstance(inner, ImageFolder):
        raise InputError("folder_repeats is on, but the dataset is no folder of images; leave it out")
    folders = [name.removeprefix(f"{inner.split_folder}/").split("/")[:-1] for name in inner.names]
    found = [re.match(r"([0-9]{1,6})_", folder[0]) if folder else None for folder in folders]
    return [int(match[1]) if match else 1 for match in found]


def sharded(source: Source) -> ShardedSource | None:
    """The shards behind a source; None where there are none."""
    inner: Any = source
    while hasattr(inner, "source"):
        inner = inner.source
    return inner if isinstance(inner, ShardedSource) else None
