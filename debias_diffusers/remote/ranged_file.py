"""A file on a server as an open file that fetches only those of its ranges that are read. No torch."""

from __future__ import annotations

import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from .http import FileRange, RemoteFile
from .shard_cache import ShardCache


def ranges(file: RemoteFile, edges: Sequence[int], start: int, stop: int) -> list[FileRange]:
    """The ranges between edges that have the bytes from `start` to `stop` (not included).

    Args:
        file: on its server.
        edges: ascending, from 0 to the size of the file.
        start: first byte.
        stop: after the last byte.
    """
    first, last = bisect_right(edges, start) - 1, bisect_left(edges, min(stop, edges[-1]))
    return [FileRange(file, edges[k], edges[k + 1]) for k in range(first, last)]


class RangedFile(io.RawIOBase):
    """A file opened for reading at any place. A range is fetched when one of its bytes is read, unless the cache has it."""

    def __init__(self, cache: ShardCache, file: RemoteFile, edges: Sequence[int]) -> None:
        """`edges`: of the ranges, as of `ranges`."""
        super().__init__()
        self.cache, self.file, self.edges = cache, file, edges
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.file.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills all of a buffer, but for what is after the end of the file. Raises DebiasError as of `ShardCache.open`."""
        begin, view = self._place, memoryview(buffer).cast("B")
        for part in ranges(self.file, self.edges, begin, begin + len(view)):
            with self.cache.open(part) as opened:
                opened.seek(self._place - part.start)
                self._place += opened.readinto(view[self._place - begin : part.stop - begin])  # type: ignore[attr-defined]
        return self._place - begin
