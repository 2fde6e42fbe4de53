"""Parquet files by their row groups, of which one is read at once. No torch."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ...errors import InputError, reason
from .files import Columns, ShardFiles, Unit
from .rows import Part, Rows

# A process drops row groups that it still needs only when it has more than so many, of more bytes.
KEPT_GROUPS, KEPT_BYTES = 64, 2 * 10**9


def read_schema(file: IO[bytes], where: str) -> pyarrow.Schema:
    """The columns of a file. Raises InputError where it is no parquet file."""
    with _explained_errors(where):
        return pyarrow.parquet.ParquetFile(file).schema_arrow


def row_groups(file: IO[bytes], where: str) -> list[dict[str, tuple[int, int]]]:
    """Of each row group the first byte of each column, and that after its last, by the footer.

    Columns are by their names up to the first dot: those of a struct, such as bytes and path of an image, are one.

    Raises:
        InputError: it is no parquet file.
    """
    with _explained_errors(where):
        metadata = pyarrow.parquet.ParquetFile(file).metadata
        return [_places(metadata.row_group(group)) for group in range(metadata.num_row_groups)]


def _places(group: Any) -> dict[str, tuple[int, int]]:
    found = dict[str, tuple[int, int]]()
    for column in map(group.column, range(group.num_columns)):
        # Some writers set the offset of a dictionary page that is not there to 0, which is where the file begins.
        first = max(0, min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset))
        stop, name = first + column.total_compressed_size, column.path_in_schema.partition(".")[0]
        before = found.get(name, (first, stop))
        found[name] = min(first, before[0]), max(stop, before[1])
    return found


def read_rows(file: IO[bytes], name: str, where: str, columns: Columns) -> Part:
    """The rows of the index of a shard; reads all images.

    Args:
        file: opened.
        name: of the shard in the data set.
        where: the shard for messages.
        columns: that of the images, and those of labels and captions where there are any.

    Raises:
        InputError: it is truncated, damaged, lacks a column, or has no images in itself; names it.
    """
    rows, units = Rows(where), list[Unit]()
    with _explained_errors(where):
        opened = pyarrow.parquet.ParquetFile(file)
        wanted = [column for column in columns if column is not None]
        if absent := [column for column in wanted if column not in opened.schema_arrow.names]:
            raise InputError(f"shard {where} has no column {absent[0]}, which the first shard has")
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, wanted, use_threads=False)
            first = len(rows)
            for row, content in enumerate(_cells(table, columns.image).to_pylist()):
                if content is None and _elsewhere(table, columns.image, row):
                    raise InputError(f"shard {where} has paths of images in place of images; leave shuffle_window out")
                label, caption = (table[column][row].as_py() if column else None for column in columns[1:])
                texts = caption if isinstance(caption, list) else [caption]
                if not all(text is None or isinstance(text, str) for text in texts):
                    raise InputError(f"shard {where} has {table[columns.caption].type} in place of captions in column {columns.caption}")
                rows.add(str(len(rows)), row, content or b"", None if label is None else str(label), texts)
            units.append(Unit(name, group, len(rows) - first))
    if not len(rows):
        raise InputError(f"shard {where} holds no images; leave it out")
    return rows.part(units)


def _cells(table: pyarrow.Table, column: str | None) -> pyarrow.ChunkedArray:
    """The bytes of the images: of a column of bytes, or of the struct of bytes and path that `datasets` writes."""
    found = table[column]  # in several chunks where they have more than 2 GB
    if pyarrow.types.is_struct(found.type) and found.type.get_field_index("bytes") >= 0:
        return pyarrow.compute.struct_field(found, "bytes")  # null where the struct is
    if pyarrow.types.is_binary(found.type) or pyarrow.types.is_large_binary(found.type):
        return found
    raise InputError(f"image_column {column} holds {found.type} and no images; name another")


def _elsewhere(table: pyarrow.Table, column: str | None, row: int) -> bool:
    """Whether a cell has the path of a file in place of bytes."""
    cell = table[column][row].as_py()
    return isinstance(cell, dict) and cell.get("path") is not None


@contextlib.contextmanager
def _explained_errors(where: str) -> Iterator[None]:
    """Errors of pyarrow as an InputError that names the shard."""
    try:
        yield
    except pyarrow.ArrowNotImplementedError as error:  # such as a struct of more than 2 GB
        raise InputError(f"shard {where} cannot be read by pyarrow ({reason(error)}); write it anew, with smaller row groups") from error
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"shard {where} is no whole parquet file ({reason(error)}); write or fetch it anew") from error


def memory_warning(sizes: np.ndarray, window: int) -> list[str]:
    """A sentence where the row groups of a window take much memory. `sizes`: of all row groups, in bytes, decoded."""
    largest = np.sort(sizes)[::-1][:window]
    if (size := int(largest.sum())) <= KEPT_BYTES:
        return []
    what = f"the row groups of shuffle_window {window} take up to {size / 1e9:.3g} GB of memory in each data loader worker"
    if len(largest) <= KEPT_GROUPS:
        return [f"{what}; a smaller one takes less"]
    kept = f"which keeps {KEPT_BYTES / 1e9:g} GB, or {KEPT_GROUPS} row groups, and reads others anew for each image"
    return [f"{what}, {kept}; take a smaller one, or make .tar shards with python -m debias_diffusers.shards make"]


class RowGroupReader:
    """Images of parquet files; keeps row groups in memory, so that each is read once while images of it are needed."""

    def __init__(self, files: ShardFiles, image_column: str, groups: int) -> None:
        """Keeps so many row groups beside those that `prefetch` has named."""
        self.files, self.image_column, self.groups = files, image_column, groups
        self._lock = threading.Lock()  # a parquet file is read by one thread at once
        self._soon: set[tuple[str, int]] = set()  # what the last `prefetch` has named
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()  # images by file and row group, those used last at the end
        self._opened = lru_cache(16)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:  # for data loader workers that are not forked
        return RowGroupReader, (self.files, self.image_column, self.groups)

    def content(self, unit: Unit, offset: int, size: int) -> bytes:
        """As of `source.Reader`; the offset is the number of the row."""
        with self._lock, _explained_errors(self.files.where(unit.name)):
            cells = self._group(unit.name, unit.group)
            return cells[offset].as_py() or b"" if offset < len(cells) else b""

    def prefetch(self, units: Sequence[Unit]) -> None:
        """As of `source.Reader`; drops all others."""
        with self._lock:
            self._soon = {(unit.name, unit.group) for unit in units}
            for group in self._kept.keys() - self._soon:
                del self._kept[group]

    def close(self) -> None:
        """As of `source.Reader`."""
        self._opened.cache_clear()

    def _group(self, *group: Any) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        others = [key for key in self._kept if key not in self._soon]
        if group not in self._soon and len(others) >= self.groups:
            del self._kept[others[0]]
        if len(self._kept) >= KEPT_GROUPS and sum(cells.nbytes for cells in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        self._kept[group] = found = self._read(*group)
        return found

    def _read(self, name: str, group: int) -> Any:
        # A file that a forked process has open, too, has one place for both.
        return _cells(self._opened(name, os.getpid()).read_row_group(group, [self.image_column], use_threads=False), self.image_column)

    def _open(self, name: str, _: int) -> Any:
        return pyarrow.parquet.ParquetFile(self.files.open(name))
