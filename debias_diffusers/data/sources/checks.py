"""Images that cannot be read, found before training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from ...errors import InputError, raise_all
from .. import images
from .base import Source

MAX_PENDING = 10_000  # indices that are queued for threads at once
MAX_SKIPPED_SHARE = 0.01  # share of unreadable images that --skip_bad accepts; more mean another problem
READER_THREADS = min(8, os.cpu_count() or 1)  # threads that read and decode images


def map_in_threads(work: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """Calls `work(index)` in threads; yields the results in order. Queues some thousand indices at a time, to limit memory."""
    with ThreadPoolExecutor(READER_THREADS) as pool:
        for first in range(0, len(indices), MAX_PENDING):
            yield from pool.map(work, indices[first : first + MAX_PENDING])


def check_images(source: Source, indices: Sequence[int]) -> tuple[dict[int, str], int]:
    """Decodes images and checks their labels before training.

    Returns:
        An error message by index for each image that cannot be decoded or has no valid label; the number of valid images in colour.
    """

    def seen(index: int) -> str | bool:
        try:
            data, label, where = source.read(index)
            require_class(label, source.class_names, where)
            return images.decode(data, where).mode == "RGB"
        except InputError as error:
            return str(error)

    found = list(tqdm(map_in_threads(seen, indices), "looking at the images", len(indices), leave=False, delay=5))
    return {index: answer for index, answer in zip(indices, found) if isinstance(answer, str)}, sum(answer is True for answer in found)


def unreadable_images(source: Source, indices: Sequence[int]) -> dict[int, str]:
    """An error message by index for each image that cannot be decoded or has no valid label."""
    return check_images(source, indices)[0]


def require_class(label: int, class_names: Sequence[str] | None, where: str) -> None:
    """Raises InputError if a label is not one of the classes."""
    if class_names is not None and not 0 <= label < len(class_names):
        raise InputError(f"image {where} has label {label}, but there are {len(class_names)} classes, from 0 on")


def require_skippable(bad: Mapping[int, str], name: str, total: int, skip: bool) -> None:
    """Raises an InputError that names all bad images, unless `skip` is set and they are at most `MAX_SKIPPED_SHARE` of all."""
    count = f"dataset {name}: {len(bad)} of {total} images cannot be read"
    if len(bad) > MAX_SKIPPED_SHARE * total:
        raise_all(bad.values(), f"{count}, and no more than {MAX_SKIPPED_SHARE:.0%} can be skipped; remove them")
    if not skip:
        raise_all(bad.values(), f"{count}; remove them, or add --skip_bad")
