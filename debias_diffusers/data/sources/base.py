"""What every source of images offers, and whether its files have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Images in a fixed order."""

    class_names: list[str] | None  # None if the images have no labels
    split: str  # for the user, such as "split train of train, test"; empty if there is only one
    passed_over: list[tuple[str, str]]  # ignored files: (path, reason)

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int, str]:
        """The bytes of the image file, the label (0 without labels), and the image's name for messages."""

    def labels(self) -> Sequence[int | None]:
        """The label of every image; None for an image without one."""

    def unused_labels(self) -> str | None:
        """What the data have for class-conditional training, such as "2 classes", where they were opened without labels."""

    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data when a run resumes: the number of images, and a hash of their names and sizes."""

    def files(self) -> list[str] | None:
        """The files that hold the images, in a fixed order; None if not all are known."""

    def shards(self) -> np.ndarray | None:
        """The first image of each shard (images that are read together), and the number of images, int64; None of a folder of images."""

    def sizes(self) -> np.ndarray | None:
        """Height and width (N, 2) of the images as decoded, 0 where they cannot be read; None where only their files tell them."""


def file_state_hash(source: Source) -> str | None:
    """A hash of path, size, times and inode of all files of a source: it changes when a file is written. None if not all are known."""
    digest = hashlib.sha256(repr(source.fingerprint()).encode())
    files = source.files()
    for path in files or []:
        try:
            found = os.stat(path)
        except OSError:
            return None
        facts = (os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        digest.update(repr(facts).encode())
    return digest.hexdigest() if files else None
