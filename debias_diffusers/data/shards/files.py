"""The files of a sharded data set, and which index belongs to them. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from ...errors import CannotWriteError, InputError, reason
from ...utils.files import read_file

FORMAT = 1  # of the index; to be raised with every change of what it holds


class FileState(NamedTuple):
    """What changes when a file is written anew."""

    size: int  # bytes
    version: str  # of a local file the time of its last change in nanoseconds


class Columns(NamedTuple):
    """What is read of a sample, as the flags name it; None finds it."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


class Unit(NamedTuple):
    """Images that are read together: a tar file, or a row group of a parquet file."""

    name: str  # of the file
    group: int  # number of the row group; -1 in a tar file
    images: int


@dataclass(frozen=True)
class IndexKey:
    """What decides the name of an index."""

    columns: Columns
    kind: str  # of the files: tar or parquet
    which: Sequence[str]  # the names of the shards as they were typed; of a folder its split
    class_names: list[str] | None = None  # of the classes that labels count; None where labels are names, or numbers without names
    whole_numbers: bool | None = None  # whether labels are numbers; None if their values decide it

    @property
    def file_name(self) -> str:
        """The name of the file."""
        text = json.dumps([FORMAT, *dataclasses.astuple(self)])
        return f"index-{hashlib.sha256(text.encode()).hexdigest()[:12]}.arrow"


class ShardFiles(Protocol):
    """Files by their names, in the order of the data set; a name is relative to the folder that has them all."""

    @property
    def names(self) -> Sequence[str]:
        """Of all files, in the order of the data set."""

    @property
    def folder(self) -> Path | None:
        """On this disk, where the index is written; None for files of a server."""

    def state(self, name: str) -> FileState:
        """Size and version. Raises DebiasError where the file is not there."""

    def open(self, name: str) -> IO[bytes]:
        """A file opened for reading. Raises DebiasError, and so may reading from it."""

    def prefetch(self, units: Sequence[Unit], column: str | None) -> None:
        """Says of which units images are read next, in this order, and from which column."""

    def beside(self, name: str) -> bytes | None:
        """A small file in the folder of the shards; None where there is none. Raises DebiasError where it cannot be read."""

    def where(self, name: str) -> str:
        """A file for messages."""


def cache_folder() -> Path:
    """Of indices that cannot be beside their shards, and of fetched shards. Raises CannotWriteError where the user has no home folder."""
    try:
        return Path.home() / ".cache" / "debias_diffusers" / "shards"
    except RuntimeError as error:
        raise CannotWriteError(f"there is no home folder for the cache of shards ({error}); set HOME") from error


class LocalFiles:
    """Shards on this disk."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """The paths of the files in their order.

        Raises:
            InputError: a file occurs twice.
        """
        absolute = [os.path.abspath(os.path.expanduser(path)) for path in paths]
        self.folder = Path(os.path.commonpath([os.path.dirname(path) for path in absolute]))
        self.names = [Path(path).relative_to(self.folder).as_posix() for path in absolute]
        if len(set(self.names)) < len(self.names):
            twice = next(name for k, name in enumerate(self.names) if name in self.names[:k])
            raise InputError(f"shard {self.where(twice)} is named twice; name it once")

    def state(self, name: str) -> FileState:
        """Size and version. Raises InputError where the file is not there."""
        try:
            found = os.stat(self.folder / name)
        except OSError as error:
            raise InputError(f"shard {self.where(name)} cannot be read: {error.strerror}") from error
        return FileState(found.st_size, str(found.st_mtime_ns))

    def open(self, name: str) -> IO[bytes]:
        """A file opened for reading. Raises InputError where it cannot be."""
        try:
            return open(self.folder / name, "rb", buffering=0)
        except OSError as error:
            raise InputError(f"shard {self.where(name)} cannot be read: {reason(error)}") from error

    def prefetch(self, units: Sequence[Unit], column: str | None) -> None:
        """Nothing: the files are here."""

    def beside(self, name: str) -> bytes | None:
        """A small file in the folder of the shards; None where there is none. Raises InputError where it cannot be read."""
        path = self.folder / name
        return read_file(path) if path.exists() else None

    def where(self, name: str) -> str:
        """The path."""
        return str(self.folder / name)
