"""A source of images in shards, read at random by their index. No torch; pyarrow only where there are shards."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, overload

import numpy as np

from ...config.schema.data import DataConfig
from ...errors import InputError, reason
from ..image_folders import as_labels
from ..labels import ClassOrder, label_numbers, renumbered
from .files import Columns, IndexKey, ShardFiles, Unit
from .table_columns import Features, caption_column, features_of, find_columns

if TYPE_CHECKING:
    from .index import Index

OPEN_FILES = 16  # that a process keeps open
NO_LABEL = -(2**31)
CLASSES = "classes.json"  # beside tar files: the names of the classes that their labels count


def open_shards(
    files: ShardFiles, config: DataConfig, order: ClassOrder = "natural", which: Sequence[str] = (), renew: bool = False
) -> ShardedSource:
    """Tar files, or parquet files by their row groups.

    Args:
        files: the shards.
        config: columns, classes and window.
        order: of the labels.
        which: names the files of a folder in the index; the names of all files if left out.
        renew: index the shards as they are, whatever an index says.

    Raises:
        InputError: as of `ShardedSource`.
    """
    key = _key(files, config, list(which or files.names))
    if renew:
        from .index import renew_index

        renew_index(files, key)
    return ShardedSource(files, key, config.class_conditional, order, config.shuffle_window)


def _key(files: ShardFiles, config: DataConfig, which: list[str]) -> IndexKey:
    kinds = {Path(name).suffix.lower() for name in files.names}
    if len(kinds) > 1:
        raise InputError(f"dataset {config.dataset} has both .tar and .parquet files; name files of one kind")
    if kinds == {".tar"}:
        return IndexKey(Columns(config.image_column, config.label_column), "tar", which, _class_names(files))
    found = find_columns(_features(files), config)
    return IndexKey(Columns(found.image, found.label, found.caption), "parquet", which, found.class_names, found.whole_numbers)


def _features(files: ShardFiles) -> Features:
    """The columns of parquet files, by the first one."""
    from .parquet import read_schema

    where = files.where(files.names[0])
    with files.open(files.names[0]) as file:
        return features_of(read_schema(file, where), where)


def _class_names(files: ShardFiles) -> list[str] | None:
    """The names of the classes that labels of tar files count, where a file beside them lists them."""
    content = files.beside(CLASSES)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{files.where(CLASSES)} cannot be read: {reason(error)}") from error
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found) or len(set(found)) < len(found):
        raise InputError(f"{files.where(CLASSES)} holds no list of different class names")
    return found


class Reader(Protocol):
    """Reads the bytes of images."""

    def content(self, unit: Unit, offset: int, size: int) -> bytes:
        """The bytes of the image at an offset of a unit, as the index has it. Raises DebiasError where the shard cannot be read."""

    def prefetch(self, units: Sequence[Unit]) -> None:
        """Says which units are read next."""

    def close(self) -> None:
        """Closes the files that it has opened."""


class TarReader:
    """Images of tar files."""

    def __init__(self, files: ShardFiles, open_files: int) -> None:
        """Keeps so many files open."""
        self.files = files
        self._opened = lru_cache(open_files)(files.open)  # closed as soon as the last reader lets go of it

    def __reduce__(self) -> tuple[Any, ...]:  # for data loader workers that are not forked
        return TarReader, (self.files, self._opened.cache_parameters()["maxsize"])

    def content(self, unit: Unit, offset: int, size: int) -> bytes:
        """As of `Reader`."""
        file: IO[bytes] = self._opened(unit.name)
        return os.pread(file.fileno(), size, offset)

    def prefetch(self, units: Sequence[Unit]) -> None:
        """As of `Reader`; nothing."""

    def close(self) -> None:
        """As of `Reader`."""
        self._opened.cache_clear()


class ShardedSource:
    """Images in tar files or in row groups of parquet files; a `Source`.

    Labels and captions are those of the index. The bytes of each image are compared with its checksum.
    """

    def __init__(
        self, files: ShardFiles, key: IndexKey, class_conditional: bool = False, order: ClassOrder = "natural", window: int | None = None
    ) -> None:
        """Opens the index.

        Args:
            files: the shards.
            key: of the index.
            class_conditional: read the labels.
            order: of the labels.
            window: row groups whose images are shuffled together; each is read by itself if None.

        Raises:
            InputError: as of `open_index`; there are no labels where they are asked for.
        """
        from .index import open_index

        self.shard_files, self.key, self.index = files, key, open_index(files, key)
        self.split, self.passed_over = "", self.index.passed_over
        self.class_names: list[str] | None = None
        self._labels = np.empty(0, np.int32)  # of each image, or NO_LABEL
        if class_conditional:
            self._read_labels(order)
        # Files of a server that are open stay in the cache: no more than are needed.
        self._reader: Reader = TarReader(files, OPEN_FILES if files.folder else window or 2)
        self.warnings: list[str] = []  # of the memory that reading takes
        if key.kind == "parquet":
            from .parquet import RowGroupReader, memory_warning

            self._reader = RowGroupReader(files, str(key.columns.image), (window or 1) + 1)
            ends = np.concatenate([[0], np.cumsum(self.index.size, dtype=np.int64)])[self.index.starts]
            self.warnings = memory_warning(np.diff(ends), window or 1)

    def _read_labels(self, order: ClassOrder) -> None:
        folder = self.shard_files.where("")
        where = f"label_column of {folder}"
        numbers, texts = self.index.labels()
        if not texts:
            raise InputError(f"class_conditional is on, but no image of {folder} has a label, a whole number or text; name their column")
        values: list[Any] = texts
        if self.key.whole_numbers is not False:
            values = _whole_numbers(texts, where) if self.key.whole_numbers else [*as_labels(dict(zip(texts, texts)), where).values()]
        if self.key.class_names is not None and any(isinstance(value, str) for value in values):
            raise InputError(f"{self.shard_files.where(CLASSES)} names classes by numbers, but labels are text, such as {texts[0]!r}")
        if self.key.class_names is not None:
            self.class_names, of_value = renumbered(self.key.class_names, values, order, where)
        else:
            self.class_names, of_value = label_numbers(values, order, where)
        labels = [NO_LABEL if label is None else max(label, NO_LABEL + 1) for label in (of_value.get(value, value) for value in values)]
        self._labels = np.array([*labels, NO_LABEL], np.int32)[numbers]  # an image without a label has the number -1, of the last

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[bytes, int, str]:
        index = range(len(self))[index]
        unit = self.index.units[int(np.searchsorted(self.index.starts, index, "right")) - 1]
        where = f"{self.index.key(index)} of {self.shard_files.where(unit.name)}"
        offset, size = int(self.index.offset[index]), int(self.index.size[index])
        content = self._reader.content(unit, offset, size)
        if zlib.crc32(content) != self.index.crc32[index]:
            raise InputError(f"image {where} is not as it was when the shard was indexed: the shard is damaged or has changed")
        if not content:
            raise InputError(f"image {where} is missing")
        label = int(self._labels[index]) if self.class_names else 0
        if label == NO_LABEL:
            raise InputError(f"image {where} has no label")
        return content, label, where

    def labels(self) -> Sequence[int | None]:
        if not self.class_names:
            return [0] * len(self)
        return [None if label == NO_LABEL else label for label in self._labels.tolist()]

    def unused_labels(self) -> str | None:
        if self.class_names:
            return None
        count = len(self.key.class_names or self.index.labels()[1])
        return f"{count} classes" if count > 1 else None

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "sha256": self.index.sha256}

    def files(self) -> list[str] | None:
        return [self.shard_files.where(name) for name in self.shard_files.names] if self.shard_files.folder else None

    def shards(self) -> np.ndarray:
        """As of `Source`."""
        return self.index.starts

    def close(self) -> None:
        """Closes the files that reading has opened; the next reading opens them again."""
        self._reader.close()

    def prefetch(self, shards: Sequence[int] | np.ndarray) -> None:
        """Says which shards are read next, in this order."""
        units = [self.index.units[shard] for shard in shards]
        self._reader.prefetch(units)
        self.shard_files.prefetch(units, self.key.columns.image)

    def sizes(self) -> np.ndarray:
        """As of `Source`."""
        return np.stack([self.index.height, self.index.width], 1)

    def captions(self, column: str | None) -> IndexedCaptions:
        """The captions of all images; of another column than the index has, by another index."""
        columns = self.key.columns
        if column in (None, columns.caption):
            return IndexedCaptions(self.index)
        if self.key.kind == "parquet":
            caption_column(_features(self.shard_files), column, self.shard_files.where(self.shard_files.names[0]))
        from .index import open_index

        key = dataclasses.replace(self.key, columns=columns._replace(caption=column))
        return IndexedCaptions(open_index(self.shard_files, key))


def _whole_numbers(texts: Sequence[str], where: str) -> list[int]:
    """Labels as numbers. Raises InputError where a later shard has others than the first one, which decides what labels are."""
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise InputError(f"{where} holds whole numbers in the first shard, but not in all ({reason(error)}); write them anew") from error


class LazyCaptions(Sequence[tuple[str, ...]], ABC):
    """The captions of each image, read as they are needed; () where it has none."""

    @abstractmethod
    def at(self, index: int) -> tuple[str, ...]:
        """The captions of the image at an index from 0 on."""

    @abstractmethod
    def array(self) -> Any:
        """All of them as an Arrow array of lists of texts."""

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        if isinstance(index, slice):
            return [self.at(k) for k in range(len(self))[index]]
        return self.at(range(len(self))[index])


class IndexedCaptions(LazyCaptions):
    """The captions of an index."""

    def __init__(self, rows: Index) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> tuple[str, ...]:
        return self.rows.captions(index)

    def array(self) -> Any:
        return self.rows.all_captions
