"""Tensors on the disk under keys, in safetensors files ("shards") that several runs and processes read and write at once.

A shard is named by the sha256 of its bytes and written atomically: it is whole or absent, and a damaged one is recognized.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..utils.files import hash_of, remove_old_temporary_files, write_file

SHARD_BYTES = 256 << 20  # of tensors, after which a shard is written
WRITE_AFTER = 60.0  # seconds of computing that a killed process loses at most
KEYS = "keys"  # the tensor (N, 32) uint8 of a shard; row k of every other tensor belongs to key k
OURS = {"debias_diffusers": "tensors"}  # metadata of a shard
DAMAGED = "is damaged"  # a fault
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")

E = TypeVar("E", bound=Hashable)  # an entry: an image as it is or mirrored, or a caption
Place = tuple[str, int]  # name of a shard, and row in it


class TensorStore:
    """The shards of a folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist."""
        self.folder = folder

    def keys(self) -> dict[str, list[bytes] | None]:
        """The keys of each shard, of 32 bytes, by its name; None of one that cannot be read as safetensors."""
        if not self.folder.is_dir():
            return {}
        remove_old_temporary_files(self.folder)
        return {path.name: _keys_of(path) for path in sorted(self.folder.iterdir()) if _NAME.fullmatch(path.name)}

    def fault(self, name: str) -> str | None:
        """What is wrong with a shard, whose bytes should be those of its name: `DAMAGED`, or why it cannot be read. Reads all of it."""
        try:
            return None if f"{hash_of(self.folder / name)}.safetensors" == name else DAMAGED
        except OSError as error:
            return f"cannot be read: {error.strerror}"


def _keys_of(path: Path) -> list[bytes] | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return [bytes(row) for row in file.get_tensor(KEYS).numpy()] if file.metadata() == OURS else []
    except (SafetensorError, OSError, ValueError):
        return None


class ShardWriter:
    """Writes tensors to a store, in shards of about `SHARD_BYTES`."""

    def __init__(self, store: TensorStore) -> None:
        self.folder = store.folder
        self.places = dict[bytes, Place]()  # of all that is written
        self._keys: list[bytes] = []
        self._parts: list[Mapping[str, Tensor]] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors by name, on the CPU, whose row k belongs to `keys[k]`.

        Raises:
            CannotWriteError: a shard that was due cannot be written.
        """
        if self._parts and any(value.shape[1:] != self._parts[0][name].shape[1:] for name, value in tensors.items()):
            self.flush()
        self._keys += keys
        self._parts.append(tensors)
        self._bytes += sum(value.nbytes for value in tensors.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since > WRITE_AFTER:
            self.flush()

    def flush(self) -> None:
        """Writes what was added.

        Raises:
            CannotWriteError: the shard cannot be written.
        """
        if self._keys:
            tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
            tensors[KEYS] = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, len(self._keys[0]))
            content = safetensors.torch.save(tensors, OURS)
            name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
            write_file(self.folder / name, content)
            self.places |= {key: (name, row) for row, key in enumerate(self._keys)}
        self._keys, self._parts, self._bytes, self._since = [], [], 0, time.monotonic()


class StoredTensors(Mapping[E, Mapping[str, Tensor]]):
    """Tensors of entries by name: views of files, to be copied and never written.

    The system reads them from the disk when they are used (mmap), and keeps them in memory as long as there is room.
    """

    def __init__(self, store: TensorStore, places: Mapping[E, Place]) -> None:
        """`places` of all entries. Shards are open from now on: they stay readable if they are removed."""
        self.store, self.places = store, places
        self._shards = {name: _mapped(store.folder / name) for name in sorted({name for name, _ in places.values()})}

    def __getitem__(self, entry: E) -> dict[str, Tensor]:
        name, row = self.places[entry]
        return {part: tensor[row] for part, tensor in self._shards[name].items() if part != KEYS}

    def __iter__(self) -> Iterator[E]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> Any:  # to data loader workers that are not forked
        return StoredTensors, (self.store, self.places)


def _mapped(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
