"""A folder of drawn images: which are there, with what they were drawn, and how they are written."""

from __future__ import annotations

import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.schema import ImageFormat
from ..data import images
from ..data.image_folders import GRID, METADATA, PACKED, PARTS, SETTINGS
from ..errors import InputError
from ..utils.files import contents, drafted, read_file, read_json, remove, remove_drafts, said_if_not_writable, write_file

GRID_IMAGES = 100
PNG_END = b"IEND\xaeB`\x82"
WRITERS = min(8, os.cpu_count() or 1)  # threads; more of them would only take turns on the interpreter with the drawing
BATCHES_WAITING = 2  # to be written, before drawing waits for them

ENCODERS: dict[ImageFormat, tuple[str, Callable[[Image.Image], bytes]]] = {
    "png": (".png", images.png),
    "webp": (".webp", images.webp),
    "npz": (".png", images.png),
}


class Album:
    """The images 0 .. num_images - 1 in a folder: files of their own, or at last one `.npz`."""

    def __init__(self, folder: Path, kind: ImageFormat, num_images: int) -> None:
        self.folder = folder
        self.kind = kind
        self.num_images = num_images
        self.files = folder / PARTS if kind == "npz" else folder
        self.suffix, self._encoded = ENCODERS[kind]

    def name(self, k: int) -> str:
        """Of the file of image k."""
        return f"{k:06d}{self.suffix}"

    def begin(self, settings: dict[str, Any]) -> list[int]:
        """Makes the folder that of these settings and returns the images that are not there whole. Only for one process.

        Raises:
            InputError: it holds other files, images of other settings, or more of them.
        """
        remove_drafts(self.folder)
        remove_drafts(self.files)
        if (self.folder / SETTINGS).exists():
            self._require_same(settings)
        else:
            write_file(self.folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        if self._is_packed():
            return []
        found = {p.name: p for p in self.files.glob(f"*{self.suffix}")}
        wanted = dict.fromkeys(map(self.name, range(self.num_images)))
        if beyond := sorted(found.keys() - wanted.keys()):
            kind = f"more than {self.num_images} images" if beyond[0][: -len(self.suffix)].isdecimal() else "other files"
            raise InputError(f"output_dir {self.folder} holds {kind}, such as {beyond[0]}; name another --output_dir")
        return [k for k, name in enumerate(wanted) if name not in found or not is_whole(found[name])]

    def _is_packed(self) -> bool:
        """Whether all is done. A packed file that is damaged is drawn again; what lay in wait for a sound one is left over."""
        packed = self.folder / PACKED
        if not packed.exists():
            return False
        with said_if_not_writable(self.folder):
            if not is_whole(packed):
                packed.unlink()
                return False
            remove(self.files)
        return True

    def _require_same(self, settings: dict[str, Any]) -> None:
        before = read_json(self.folder / SETTINGS)
        if not isinstance(before, dict) or not before:
            raise InputError(f"{self.folder / SETTINGS} is damaged; remove its folder, or name another --output_dir")
        if before.get("seed") and "seed_factor" not in before:
            raise InputError(
                f"output_dir {self.folder} holds images of seed {before['seed']} by an older version, which drew image k from seed + k "
                f"and not from seed * 2654435761 + k; name another --output_dir"
            )
        changed = [
            f"{name} was {before.get(name)}, now {settings.get(name)}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise InputError(f"output_dir {self.folder} holds images of other settings ({'; '.join(changed)}); name another --output_dir")

    def write(self, k: int, array: np.ndarray) -> None:
        """Image k, (C, H, W) uint8; whole or absent after a kill. After a power cut `begin` finds those that are not."""
        write_file(self.files / self.name(k), self._encoded(images.from_array(array)), wait=False)

    def read(self, k: int) -> Image.Image:
        """Image k as it was written.

        Raises:
            InputError: it is not there, or damaged.
        """
        path = self.files / self.name(k)
        return images.decode(read_file(path), str(path))

    def finish(self, labels: Sequence[int] | None, seeds: Sequence[int]) -> None:
        """What makes the folder a data set (metadata, or the one file), and a picture of the first images."""
        if (self.folder / PACKED).exists():
            return
        first = [self.read(k) for k in range(min(self.num_images, GRID_IMAGES))]
        write_file(self.folder / GRID, images.png(images.grid(first)))
        if self.kind == "npz":
            self._pack(labels)
            return
        rows = [{"file_name": self.name(k), **({"label": labels[k]} if labels else {}), "seed": seeds[k]} for k in range(self.num_images)]
        write_file(self.folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _pack(self, labels: Sequence[int] | None) -> None:
        """`arr_0` (N, H, W, C) uint8 and `arr_1` (N,) labels, one image in memory at a time."""
        first = _channels_last(self.read(0))
        with drafted(self.folder / PACKED) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *first.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for k in range(self.num_images):
                    member.write(_channels_last(self.read(k)).tobytes())
            if labels:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))
        with said_if_not_writable(self.files):
            remove(self.files)


def is_whole(path: Path) -> bool:
    """Whether a file ends as its format does; without decoding, for a folder may hold many."""
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return "arr_0.npy" in archive.namelist()
        except (OSError, zipfile.BadZipFile):
            return False
    with open(path, "rb") as file:
        head = file.read(8)
        size = file.seek(0, 2)
        if path.suffix == ".webp":
            return size == 8 + int.from_bytes(head[4:8], "little")
        file.seek(max(0, size - 8))
        return file.read() == PNG_END


def require_place(folder: Path) -> None:
    """Raises InputError where images cannot go, because somebody's other files lie there. Nothing is written."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link to nowhere"
        raise InputError(f"output_dir {folder} is {kind}; name a new or empty folder")
    if folder.is_dir():
        there = contents(folder)
        if there and SETTINGS not in there:
            raise InputError(f"output_dir {folder} holds other files, such as {there[0]}; name a new or empty folder")


def _channels_last(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


class Writer:
    """Encodes and writes batches of images beside what the caller does; what goes wrong is raised in a later call, or at the end."""

    def __init__(self, album: Album) -> None:
        self.album = album
        self._pool = ThreadPoolExecutor(max_workers=WRITERS)
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> Writer:
        return self

    def put(self, indices: Sequence[int], batch: Any) -> None:
        """Images (B, C, H, W) uint8, a tensor on any device."""
        fetched = self._pool.submit(lambda: batch.cpu().numpy())
        self._waiting.append([self._pool.submit(self._write, k, fetched, place) for place, k in enumerate(indices)])
        while len(self._waiting) > BATCHES_WAITING:
            self._wait_for_the_oldest()

    def _write(self, k: int, fetched: Future[np.ndarray], place: int) -> None:
        self.album.write(k, fetched.result()[place])

    def _wait_for_the_oldest(self) -> None:
        for done in self._waiting.popleft():
            done.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is not None:
            return
        while self._waiting:
            self._wait_for_the_oldest()
        os.sync()  # once for all images: to wait for each takes longer than to encode it
