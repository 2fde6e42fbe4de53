"""Shards on a server or on the Hub: fetched whole into the cache on the disk, the next window while one is read. No torch."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from ...errors import InputError
from ...remote import http
from ...remote.shard_cache import ShardCache
from .files import FileState

REQUESTS = 16  # for sizes and versions, at once


class RemoteFiles:
    """The shards of a data set by their addresses, as they were when it was opened; a `ShardFiles`."""

    folder = None

    def __init__(self, addresses: Sequence[str], cache_folder: Path, max_bytes: int, window: int | None) -> None:
        """Asks for the size and version of each file.

        Args:
            addresses: of the files in their order.
            cache_folder: of all fetched files.
            max_bytes: of the cache.
            window: shards that are read at once; one after the other if None.

        Raises:
            InputError: the cache holds less than two windows.
            FetchError: a file is not there, or its server cannot be reached.
        """
        common = posixpath.commonprefix([posixpath.dirname(address) + "/" for address in addresses])
        self.base = common[: common.rindex("/") + 1]
        self.names = [address.removeprefix(self.base) for address in addresses]
        self.cache = ShardCache(cache_folder, max_bytes)
        with ThreadPoolExecutor(REQUESTS) as pool:
            self._found = dict(zip(self.names, pool.map(http.find, addresses)))
        largest = sorted((file.size for file in self._found.values()), reverse=True)
        if (needed := sum(largest[: 2 * (window or 1)])) > max_bytes:
            raise InputError(
                f"shard_cache_gb is {max_bytes / 1e9:g}, but two windows of {window or 1} shards take up to {needed / 1e9:.3g} GB; "
                f"raise it, or take a smaller shuffle_window"
            )

    def state(self, name: str) -> FileState:
        """Size and version."""
        return FileState(self._found[name].size, self._found[name].version)

    def open(self, name: str) -> IO[bytes]:
        """A file of the cache, which stays there until it is closed. Errors as of `ShardCache.open`."""
        return self.cache.open(self._found[name])

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetches files in the background, in this order."""
        self.cache.prefetch([self._found[name] for name in names])

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
