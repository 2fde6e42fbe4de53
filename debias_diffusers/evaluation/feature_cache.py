"""Features that are kept between commands, in a bounded folder that several processes share.

An entry is a file named by the hash of what it was computed from. Whatever goes wrong here, the work goes on without the cache.
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
from ..utils.files import read_file, read_json, remove_old_drafts, write_file

MOST_BYTES = 4 << 30  # of all entries; the newest one stays even where it alone has more
OURS = {"debias_diffusers": "features"}  # metadata of an entry
_NAME = re.compile(r"[0-9a-f]{64}\.(safetensors|json)")


def key_of(*parts: str) -> str:
    """The hash that names an entry."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_cache(cache_dir: str | None) -> FeatureCache:
    """The cache of a `--cache_dir`: the user's if left out, none where it is empty or the user has no home."""
    if cache_dir is not None:
        return FeatureCache(Path(cache_dir) if cache_dir else None)
    try:
        return FeatureCache(Path.home() / ".cache" / "debias_diffusers" / "features")
    except RuntimeError:
        say("warning: features are not kept, since there is no home folder; name a folder with --cache_dir")
        return FeatureCache(None)


class FeatureCache:
    """Entries by key (as of `key_of`): named tensors, or a JSON value. Reading an entry makes it the newest."""

    def __init__(self, folder: Path | None, most_bytes: int = MOST_BYTES) -> None:
        """`folder` need not exist; without one nothing is kept."""
        self.folder, self.most_bytes = folder, most_bytes
        self._warned = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry; None where it is not there or damaged."""
        content = self._read(f"{key}.safetensors")
        try:
            return None if content is None else safetensors.torch.load(content)
        except SafetensorError:
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors, if that is possible."""
        if self.folder:
            self._write(f"{key}.safetensors", safetensors.torch.save(dict(tensors), metadata=OURS))

    def get_json(self, key: str) -> Any:
        """The value of a JSON entry; None where it is not there or damaged."""
        try:
            found = json.loads(self._read(f"{key}.json") or b"")
            return found["value"] if {**found, **OURS} == found else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def put_json(self, key: str, value: Any) -> None:
        """Keeps a value that JSON has, if that is possible."""
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
        except (CannotWriteError, OSError, ValueError) as error:  # ValueError: a name that no folder can have
            if not self._warned:
                say(f"warning: features are not kept: {error}; name another folder with --cache_dir")
            self._warned = True

    def _remove_oldest(self, folder: Path, newest: str) -> None:
        """Removes the oldest entries beyond the bound. Files that are no entries of a cache stay, whatever their names are."""
        remove_old_drafts(folder)
        found = sorted(_entries(folder))
        if sum(size for _, size, _ in found) <= self.most_bytes:
            return
        ours = [(size, path) for _, size, path in found if _is_ours(path)]
        excess = sum(size for size, _ in ours) - self.most_bytes
        for size, path in ours:
            if excess > 0 and path.name != newest:
                path.unlink(missing_ok=True)
                excess -= size


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each was last used, its bytes, and where it is."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            found = path.lstat()
            if _NAME.fullmatch(path.name) and stat.S_ISREG(found.st_mode):
                yield found.st_mtime, found.st_size, path


def _is_ours(path: Path) -> bool:
    """Whether a cache wrote a file; the first version wrote no metadata, but the mean colours of images into each."""
    try:
        if path.suffix == ".json":
            found = read_json(path)
            return bool({**found, **OURS} == found)
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() == OURS or (file.metadata() is None and "colour" in list(file.keys()))
    except (SafetensorError, InputError, ValueError, TypeError, RecursionError, OSError):
        return False
