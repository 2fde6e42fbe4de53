"""Sets of images to evaluate: a data set, a folder, an `.npz` in ADM's layout, or samples of a model."""

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
from ..data.sources.base import Source
from ..data.sources.checks import READER_THREADS, map_in_threads
from ..data.sources.folder import ImageFolder
from ..errors import InputError, reason
from ..sampling.job import MAX_BATCH, Job
from ..utils import seeding
from ..utils.files import hash_of

MAX_NPZ_BYTES = 2**40  # size of the array in an .npz
CHUNK_BYTES = 2**24  # read from a file at once
# What zipfile and numpy raise for a damaged file; RuntimeError for an encrypted file or an unknown compression.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, as batches.

    `batches(size, part, parts)` yields (index of the batch, images (B, 3, H, W) uint8) for every `parts`-th batch, from the `part`-th
    on: the share of process `part` of `parts`.
    """

    name: str
    count: int
    side: int | None  # resolution in pixels; None if the images are resized to any resolution
    key: str | None  # identifies the images in the feature cache; None for samples of a model, which are not cached
    batches: Callable[[int, int, int], Iterator[tuple[int, Tensor]]]
    total: int | None = None  # the size of the set of which these are a random subset; None for samples of a model
    prompts: Sequence[str] | None = None  # of each image, where they are known and wanted
    batch_size: int = MAX_BATCH  # where the command does not say


def generated_images(job: Job, count: int, name: str) -> ImageSet:
    """`count` samples of a model, in memory only. Image k is the same as that of `sample.py` with the same seed."""
    height, width = job.size

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        for number, indices in process_batches(range(count), batch_size, part, parts):
            yield number, to_rgb(job.draw(indices))

    prompts = job.conditions(range(count)).prompts
    return ImageSet(name, count, height if height == width else None, None, batches, prompts=prompts, batch_size=job.batch_size)


def images_of_source(
    source: Source,
    name: str,
    side: int,
    count: int | None = None,
    check: Callable[[Image, str], None] | None = None,
    channels: int | None = None,
    key: str | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> ImageSet:
    """The images of a data set, resized to `side` pixels as in training, converted to grey if `channels` is 1; without flips.

    Args:
        source: of the images.
        name: for messages.
        side: resolution in pixels.
        count: take a random subset of this size, a function of the seed; None for all images.
        check: called with each decoded image and its name; may raise.
        channels: 1 for grey.
        key: the `content_key` if known; else all images are read to compute it.
        seed: of the subset.
        prompts: of every image of the source, where they are wanted.

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

    # `check` is part of the key: cached features of unchecked images must not be used for checked ones.
    key = key or content_key(transform_name(side, channels, check is not None), content_hashes(source, chosen))
    of_chosen = [prompts[k] for k in chosen] if prompts else None
    return ImageSet(name, len(chosen), side, key, _reader(read, chosen), total=len(source), prompts=of_chosen)


def transform_name(side: int, channels: int | None = None, as_they_are: bool = False) -> str:
    """The preprocessing of images as text, part of their cache key."""
    return f"{side}{' as they are' if as_they_are else ''}{' grey' if channels == 1 else ''}"


def content_hashes(source: Source, indices: Sequence[int]) -> Iterator[bytes]:
    """The sha256 of the files of some images, in order."""
    yield from map_in_threads(lambda k: hashlib.sha256(source.read(k)[0]).digest(), indices)


def content_key(how: str, hashes: Iterable[bytes]) -> str:
    """A cache key from the preprocessing (`transform_name`) and the `content_hashes` of images."""
    digest = hashlib.sha256(how.encode())
    for own in hashes:
        digest.update(own)
    return digest.hexdigest()


def images_of_folder(
    source: ImageFolder,
    name: str,
    count: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> ImageSet:
    """The images of a folder without resizing; they must be squares of one size. `count`, `seed`, `prompts` as in `images_of_source`.

    Raises:
        InputError: an image cannot be read, or has another size; names it.
    """
    side = side_of_folder(source)

    def require_same_size(image: Image, where: str) -> None:
        if image.size != (side, side):
            raise InputError(f"image {where} has {image.width}x{image.height} pixels, the first {side}x{side}; remove one kind")

    return images_of_source(source, name, side, count, require_same_size, channels, seed=seed, prompts=prompts)


def side_of_folder(source: ImageFolder) -> int:
    """The side in pixels of the first image of a folder.

    Raises:
        InputError: it cannot be read, or is no square.
    """
    data, _, where = source.read(0)
    first = images.decode(data, where)
    if first.width != first.height:
        raise InputError(f"image {where} has {first.width}x{first.height} pixels; the images to be scored must be squares")
    return first.width


def images_of_npz(path: Path, count: int | None = None, seed: int = 0) -> ImageSet:
    """The images `arr_0` (N, H, W, C) uint8 of an `.npz`, with one or three channels, read as a stream.

    With `count` a random subset of that size, a function of the seed.

    Raises:
        InputError: there is no such array, or it is damaged.
    """
    total, *shape = npz_shape(path)
    size = math.prod(shape)
    chosen = seeding.subset(seed, total, count or total)

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        with _npz_array(path) as (_, member):
            place = 0
            for number, own in process_batches(chosen, batch_size, part, parts):
                data = bytearray()
                for k in own:
                    _skip(member, (k - place) * size, path)
                    data += _exactly(member, size, path)
                    place = k + 1
                yield number, to_rgb(torch.frombuffer(data, dtype=torch.uint8).view(-1, *shape).permute(0, 3, 1, 2))
            _skip(member, (total - place) * size, path)  # zipfile compares the checksum at the end of the array

    which = f"{len(chosen)} {seed} of {total}" if len(chosen) < total else f"{total}"
    return ImageSet(str(path), len(chosen), shape[0], hashlib.sha256(f"{which} {hash_of(path)}".encode()).hexdigest(), batches, total=total)


def npz_shape(path: Path) -> tuple[int, ...]:
    """The shape (N, H, W, C) of `arr_0`, from its header.

    Raises:
        InputError: as `images_of_npz`.
    """
    with _npz_array(path) as (shape, _):
        return shape


def holds_images(path: Path) -> bool:
    """Whether an `.npz` has images (`arr_0`), and not only statistics."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def read_npz_statistics(path: Path) -> dict[str, np.ndarray]:
    """The float64 arrays among `mu` (D,), `sigma` (D, D), `mu_s`, `sigma_s` in an `.npz`, as in ADM's reference files.

    Raises:
        InputError: they are not numeric, or the file has neither statistics nor images.
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
    """The shape of `arr_0`, and a file object at the first byte after its header."""
    with contextlib.ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            member = opened.enter_context(archive.open("arr_0.npy"))
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
        except UNREADABLE as error:
            raise InputError(f"{path} cannot be read: {reason(error)}") from error
        squares = len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2] and 0 < math.prod(shape) < MAX_NPZ_BYTES
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
    """Skips `size` bytes by reading them in chunks."""
    for place in range(0, size, CHUNK_BYTES):
        _exactly(member, min(CHUNK_BYTES, size - place), path)


def _reader(read: Callable[[int], Tensor], chosen: Sequence[int]) -> Callable[[int, int, int], Iterator[tuple[int, Tensor]]]:
    """Batches of images, decoded by threads that prefetch two batches."""

    def batches(batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Tensor]]:
        with ThreadPoolExecutor(READER_THREADS) as pool:
            waiting: deque[tuple[int, list[Any]]] = deque()
            for number, indices in process_batches(chosen, batch_size, part, parts):
                waiting.append((number, [pool.submit(read, k) for k in indices]))
                if len(waiting) > 2:
                    yield _stacked(*waiting.popleft())
            while waiting:
                yield _stacked(*waiting.popleft())

    return batches


def _stacked(number: int, futures: list[Any]) -> tuple[int, Tensor]:
    return number, torch.stack([future.result() for future in futures])


def process_batches(chosen: Sequence[int], batch_size: int, part: int, parts: int) -> Iterator[tuple[int, Sequence[int]]]:
    """The batches of process `part` of `parts`: yields (index of the batch, indices of its images) for every `parts`-th batch."""
    for number, first in enumerate(range(0, len(chosen), batch_size)):
        if number % parts == part:
            yield number, chosen[first : first + batch_size]


def to_rgb(batch: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) as (B, 3, H, W), grey as three equal channels."""
    return batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
