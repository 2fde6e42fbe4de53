"""Sets of images to be compared: a data set, a folder, an `.npz` in ADM's layout, or what a model draws."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tokenize
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ..data import images
from ..data.sources import READERS, Folder, Source, in_threads
from ..errors import InputError, reason
from ..sampling.generate import Job
from ..utils import seeding

MOST_BYTES = 2**40  # that an .npz may claim to hold
READ_AT_ONCE = 2**24  # bytes of a file
# What zipfile and numpy raise of a damaged file; RuntimeError of one that is encrypted or compressed by other means.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, as batches.

    `batches(size, part, parts)` yields every `parts`-th batch, from the `part`-th: (number of the batch, (B, 3, H, W) uint8).
    """

    name: str
    count: int
    side: int | None  # pixels of a side; None where the images are brought to whatever is asked for
    key: str | None  # what identifies the images, for a cache; None of what a model draws, which is seldom drawn again
    batches: Callable[[int, int, int], Iterator[tuple[int, Tensor]]]
    total: int | None = None  # images that there are, of which these are a random subset; None of what a model draws


def drawn(job: Job, count: int, name: str) -> ImageSet:
    """What a model draws, image k as `sample.py` draws it with the same seed; nothing touches the disk."""
    size = job.pipeline.unet.config.sample_size

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        for number, indices in numbered(range(count), batch_size, part, parts):
            yield number, coloured(job.draw(indices))

    return ImageSet(name, count, size if isinstance(size, int) else None, None, batches)


def of_source(
    source: Source,
    name: str,
    side: int,
    count: int | None = None,
    check: Callable[[Image, str], None] | None = None,
    channels: int | None = None,
    key: str | None = None,
    seed: int = 0,
) -> ImageSet:
    """The images of a data set, brought to a size as training does it, and to grey if of one channel; without flips.

    Of a smaller `count` they are a random subset, a function of the seed.

    `key`: as of `content_key`, where it is known; else all images are read for it.

    Raises:
        InputError: an image cannot be read; names it.
    """
    chosen = seeding.subset(seed, len(source), count or len(source))

    def read(k: int) -> Tensor:
        data, _, where = source.read(k)
        image = images.decode(data, where)
        if check:
            check(image, where)
        image = images.fit(image.convert("L" if channels == 1 else "RGB"), side)
        return torch.from_numpy(images.to_array(image.convert("RGB")))

    # Features that are kept of images without the check must not stand for those with it.
    key = key or content_key(transform(side, channels, check is not None), content_hashes(source, chosen))
    return ImageSet(name, len(chosen), side, key, _reader(read, chosen), total=len(source))


def transform(side: int, channels: int | None = None, as_they_are: bool = False) -> str:
    """What is done to the images, as a part of their key."""
    return f"{side}{' as they are' if as_they_are else ''}{' grey' if channels == 1 else ''}"


def content_hashes(source: Source, indices: Sequence[int]) -> Iterator[bytes]:
    """Of the files of some images."""
    yield from in_threads(lambda k: hashlib.sha256(source.read(k)[0]).digest(), indices)


def content_key(how: str, hashes: Iterable[bytes]) -> str:
    """What identifies images by their content and by what is done to them (as of `transform`)."""
    digest = hashlib.sha256(how.encode())
    for own in hashes:
        digest.update(own)
    return digest.hexdigest()


def of_folder(source: Folder, name: str, count: int | None = None, channels: int | None = None, seed: int = 0) -> ImageSet:
    """The images of a folder as they are, which must be squares of one size; of a smaller `count` a random subset as of `of_source`.

    Raises:
        InputError: one cannot be read, or has another size; names it.
    """
    data, _, where = source.read(0)
    first = images.decode(data, where)
    if first.width != first.height:
        raise InputError(f"image {where} has {first.width}x{first.height} pixels; the images to be scored must be squares")

    def require_same_size(image: Image, where: str) -> None:
        if image.size != first.size:
            size = f"{image.width}x{image.height}"
            raise InputError(f"image {where} has {size} pixels, the first {first.width}x{first.height}; remove one kind")

    return of_source(source, name, first.width, count, require_same_size, channels, seed=seed)


def of_npz(path: Path, count: int | None = None, seed: int = 0) -> ImageSet:
    """`arr_0` of an `.npz`, (N, H, W, C) uint8 with one or three channels, read as a stream.

    Of a smaller `count` they are a random subset, a function of the seed.

    Raises:
        InputError: there is no such array, or it is damaged.
    """
    total, *shape = npz_shape(path)
    size = math.prod(shape)
    chosen = seeding.subset(seed, total, count or total)

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        with _npz_array(path) as (_, member):
            place = 0
            for number, own in numbered(chosen, batch_size, part, parts):
                data = bytearray()
                for k in own:
                    _skip(member, (k - place) * size, path)
                    data += _exactly(member, size, path)
                    place = k + 1
                yield number, coloured(torch.frombuffer(data, dtype=torch.uint8).view(-1, *shape).permute(0, 3, 1, 2))
            _skip(member, (total - place) * size, path)  # at the end its checksum is compared

    which = f"{len(chosen)} {seed} of {total}" if len(chosen) < total else f"{total}"
    return ImageSet(str(path), len(chosen), shape[0], _hash(f"{which} {_file_hash(path)}".encode()), batches, total=total)


def npz_shape(path: Path) -> tuple[int, ...]:
    """(N, H, W, C) of `arr_0`, from its header alone.

    Raises:
        InputError: as of `of_npz`.
    """
    with _npz_array(path) as (shape, _):
        return shape


def holds_images(path: Path) -> bool:
    """Whether an `.npz` has `arr_0`, and not statistics only."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def read_npz_statistics(path: Path) -> dict[str, np.ndarray]:
    """Those of `mu`, `sigma`, `mu_s`, `sigma_s` that are there, as ADM's reference files have them.

    Raises:
        InputError: they are no numbers, or there are neither statistics nor images.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: np.asarray(archive[name], dtype=np.float64) for name in ("mu", "sigma", "mu_s", "sigma_s") if name in archive}
    except (*UNREADABLE, TypeError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    if not found and not holds_images(path):
        raise InputError(f"{path} has neither arr_0 (images) nor mu and sigma (statistics)")
    return found


@contextlib.contextmanager
def _npz_array(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """The shape of `arr_0`, and a file that stands behind its header."""
    with contextlib.ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            member = opened.enter_context(archive.open("arr_0.npy"))
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except UNREADABLE as error:
            raise InputError(f"{path} cannot be read: {reason(error)}") from error
        squares = len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2] and 0 < math.prod(shape) < MOST_BYTES
        if dtype != np.uint8 or fortran or not squares:
            raise InputError(f"{path} has arr_0 of {dtype} {shape}, but must have squares (N, H, W, 3) or (N, H, W, 1) of uint8")
        yield shape, member


def _exactly(member: IO[bytes], size: int, path: Path) -> bytes:
    try:
        data = member.read(size)
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged: {reason(error)}") from error
    if len(data) < size:
        raise InputError(f"{path} is damaged: it ends before its last image")
    return data


def _skip(member: IO[bytes], size: int, path: Path) -> None:
    """Reads over so many bytes, a few at a time."""
    for place in range(0, size, READ_AT_ONCE):
        _exactly(member, min(READ_AT_ONCE, size - place), path)


def _reader(read: Callable[[int], Tensor], chosen: Sequence[int]) -> Callable[[int, int, int], Iterator[tuple[int, Tensor]]]:
    """Batches of images that are decoded by a few threads, some batches ahead of whoever takes them."""

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque[tuple[int, list[Any]]] = deque()
            for number, indices in numbered(chosen, batch_size, part, parts):
                waiting.append((number, [pool.submit(read, k) for k in indices]))
                if len(waiting) > 2:
                    yield _stacked(*waiting.popleft())
            while waiting:
                yield _stacked(*waiting.popleft())

    return batches


def _stacked(number: int, futures: list[Any]) -> tuple[int, Tensor]:
    return number, torch.stack([future.result() for future in futures])


def numbered(chosen: Sequence[int], batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Sequence[int]]]:
    """(number, indices) of every `parts`-th batch of some indices."""
    for number, first in enumerate(range(0, len(chosen), batch_size)):
        if number % parts == part:
            yield number, chosen[first : first + batch_size]


def coloured(batch: Tensor) -> Tensor:
    """(B, 3, H, W), grey as three equal channels."""
    return batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
