"""A cache of features on the disk, of bounded size, shared by processes and commands.

An entry is a file whose name is the hash of its inputs. Errors of the cache never stop a command: it continues without the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CannotWriteError, InputError
from ..utils.console import say
from ..utils.files import read_file, read_json, remove_old_temporary_files, write_file

MAX_BYTES = 4 << 30  # of all entries; the newest entry stays even if it is larger
OURS = {"debias_diffusers": "features"}  # metadata of an entry
_NAME = re.compile(r"[0-9a-f]{64}\.(safetensors|json)")


def cache_key(*parts: str) -> str:
    """The hash of some texts, which is the name of an entry."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_cache(cache_dir: str | None) -> FeatureCache:
    """The cache in `cache_dir`; in the user's home if None; no cache if empty or if the user has no home folder."""
    if cache_dir is not None:
        return FeatureCache(Path(cache_dir) if cache_dir else None)
    try:
        return FeatureCache(Path.home() / ".cache" / "debias_diffusers" / "features")
    except RuntimeError:
        say("warning: features are not kept, since there is no home folder; name a folder with --cache_dir")
        return FeatureCache(None)


class FeatureCache:
    """Entries by key (see `cache_key`): named tensors, or a JSON value. Reading an entry makes it the newest."""

    def __init__(self, folder: Path | None, max_bytes: int = MAX_BYTES) -> None:
        """`folder` need not exist; if None, nothing is cached. `max_bytes` limits the size of all entries."""
        self.folder, self.max_bytes = folder, max_bytes
        self._warned = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry by name; None if it is missing or damaged."""
        content = self._read(f"{key}.safetensors")
        try:
            return None if content is None else safetensors.torch.load(content)
        except SafetensorError:
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores tensors by name; prints a warning if that fails."""
        if self.folder:
            self._write(f"{key}.safetensors", safetensors.torch.save(dict(tensors), metadata=OURS))

    def get_json(self, key: str) -> Any:
        """The value of a JSON entry; None if it is missing or damaged."""
        try:
            found = json.loads(self._read(f"{key}.json") or b"")
            return found["value"] if {**found, **OURS} == found else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def put_json(self, key: str, value: Any) -> None:
        """Stores a JSON value; prints a warning if that fails."""
        if self.folder:
            self._write(f"{key}.json", json.dumps({**OURS, "value": value}).encode())

    def _read(self, name: str) -> bytes | None:
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            content = read_file(path)
        except InputError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def _write(self, name: str, content: bytes) -> None:
        assert self.folder
        try:
            write_file(self.folder / name, content)
            self._remove_oldest(self.folder, name)
        except (CannotWriteError, OSError, ValueError) as error:  # ValueError: an invalid folder name
            if not self._warned:
                say(f"warning: features are not kept: {error}; name another folder with --cache_dir")
            self._warned = True

    def _remove_oldest(self, folder: Path, newest: str) -> None:
        """Removes the oldest entries beyond `max_bytes`. Never removes files of others, whatever their names are."""
        remove_old_temporary_files(folder)
        found = sorted(_entries(folder))
        if sum(size for _, size, _ in found) <= self.max_bytes:
            return
        ours = [(size, path) for _, size, path in found if _is_ours(path)]
        excess = sum(size for size, _ in ours) - self.max_bytes
        for size, path in ours:
            if excess > 0 and path.name != newest:
                path.unlink(missing_ok=True)
                excess -= size


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yields (time of last use, size in bytes, path) for each entry."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            found = path.lstat()
            if _NAME.fullmatch(path.name) and stat.S_ISREG(found.st_mode):
                yield found.st_mtime, found.st_size, path


def _is_ours(path: Path) -> bool:
    """Whether this package wrote a cache file. The first version wrote no metadata, but a tensor "colour" into each."""
    try:
        if path.suffix == ".json":
            found = read_json(path)
            return bool({**found, **OURS} == found)
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() == OURS or (file.metadata() is None and "colour" in list(file.keys()))
    except (SafetensorError, InputError, ValueError, TypeError, RecursionError, OSError):
        return False
