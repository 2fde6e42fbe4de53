"""Shards on a server or on the Hub: fetched into the cache on the disk, the next window while one is read. No torch.

Tar files are fetched whole, of parquet files those columns of row groups that are read, where the server answers ranges.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, cast

from ...errors import InputError
from ...remote import http
from ...remote.http import FileRange, RemoteFile
from ...remote.ranged_file import RangedFile, ranges
from ...remote.shard_cache import Entry, ShardCache
from .files import FileState, Unit

REQUESTS = 16  # for sizes, versions and footers, at once
TAIL = 1 << 16  # bytes at the end of a parquet file that are fetched together, because pyarrow reads them at once


class RowGroups(NamedTuple):
    """How a parquet file is fetched."""

    edges: list[int]  # of its ranges, as of `ranged_file.ranges`: one for each column of a row group, and the footer in one or two
    places: list[dict[str, tuple[int, int]]]  # as of `parquet.row_groups`


class RemoteFiles:
    """The shards of a data set by their addresses, as they were when it was opened; a `ShardFiles`."""

    folder = None

    def __init__(self, addresses: Sequence[str], cache_folder: Path, max_bytes: int, window: int | None) -> None:
        """Asks for the size and version of each file, and for the footers of parquet files that the cache has not.

        Args:
            addresses: of the files in their order.
            cache_folder: of all that is fetched.
            max_bytes: of the cache.
            window: shards that are read at once; one after the other if None.

        Raises:
            InputError: the cache holds less than two windows, or a file is no parquet file.
            FetchError: a file is not there, or its server cannot be reached.
        """
        common = posixpath.commonprefix([posixpath.dirname(address) + "/" for address in addresses])
        self.base = common[: common.rindex("/") + 1]
        self.names = [address.removeprefix(self.base) for address in addresses]
        self.cache = ShardCache(cache_folder, max_bytes)
        with ThreadPoolExecutor(REQUESTS) as pool:
            self._found = dict(zip(self.names, pool.map(http.find, addresses)))
            divided = [file for file in self._found.values() if file.ranges and file.name.lower().endswith(".parquet")]
            found = dict(zip(divided, pool.map(self._row_groups, divided)))
        self._groups = {name: found[file] for name, file in self._found.items() if file in found}
        largest = sorted((size for name in self.names for size in self._sizes(name)), reverse=True)
        if (needed := sum(largest[: 2 * (window or 1)])) > max_bytes:
            raise InputError(
                f"shard_cache_gb is {max_bytes / 1e9:g}, but two windows of {window or 1} shards take up to {needed / 1e9:.3g} GB; "
                f"raise it, or take a smaller shuffle_window"
            )

    def _row_groups(self, file: RemoteFile) -> RowGroups:
        from .parquet import row_groups

        tail = max(0, file.size - TAIL)
        with self.cache.open(FileRange(file, tail, file.size)) as opened:
            length = int.from_bytes(opened.read()[-8:-4], "little")
        footer = min(max(0, file.size - 8 - length), tail)
        places = row_groups(cast(IO[bytes], RangedFile(self.cache, file, sorted({0, footer, tail, file.size}))), file.name)
        firsts = sorted(first for group in places for first, _ in group.values() if first < footer)
        del firsts[:1]  # the first range begins with the file
        return RowGroups(sorted({0, *firsts, footer, tail, file.size}), places)

    def _sizes(self, name: str) -> list[int]:
        """Of the shards of a file, in bytes of the cache; of row groups with all columns, before it is known which are read."""
        if name not in self._groups:
            return [self._found[name].size]
        footer = min(TAIL, self._found[name].size)
        units = [Unit(name, group, 0) for group in range(len(self._groups[name].places))]
        return [footer + sum(map(len, self._ranges(unit))) for unit in units]

    def _ranges(self, unit: Unit, column: str | None = None) -> list[FileRange]:
        """What is fetched for a column of a row group, or for all of them."""
        edges, places = self._groups[unit.name]
        wanted = [place for name, place in places[unit.group].items() if column is None or name == column.partition(".")[0]]
        return list(dict.fromkeys(part for place in wanted for part in ranges(self._found[unit.name], edges, *place)))

    def state(self, name: str) -> FileState:
        """Size and version."""
        return FileState(self._found[name].size, self._found[name].version)

    def open(self, name: str) -> IO[bytes]:
        """A whole file of the cache, which stays there until it is closed; or one whose ranges are fetched as they are read.

        Errors as of `ShardCache.open`, also of reading.
        """
        file = self._found[name]
        if name in self._groups:
            return cast(IO[bytes], RangedFile(self.cache, file, self._groups[name].edges))
        return self.cache.open(file)

    def prefetch(self, units: Sequence[Unit], column: str | None) -> None:
        """Fetches in the background, in this order."""
        wanted: list[Entry] = []
        for unit in units:
            wanted += self._ranges(unit, column) if unit.name in self._groups else [self._found[unit.name]]
        self.cache.prefetch(list(dict.fromkeys(wanted)))

    def beside(self, name: str) -> bytes | None:
        """A small file beside the shards; None where there is none. Raises FetchError."""
        try:
            found = http.find(self.where(name))
        except http.AbsentError:
            return None
        return http.read_range(found, 0, found.size)

    def where(self, name: str) -> str:
        """The address."""
        return self.base + name
