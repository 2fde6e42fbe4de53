"""A folder of image files, with labels from its sub-folders, its file names or a metadata file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...config.schema.data import DataConfig
from ...errors import InputError
from ...utils.files import read_file
from .. import image_folders
from ..labels import ClassOrder, label_numbers, order_class_names


class ImageFolder:
    """A folder of image files, sorted by path. If its first-level folders are splits, the images of one split.

    Labels come from metadata.jsonl or metadata.csv, else from the first-level folders, else from the file names before the first "_".
    """

    def __init__(self, found: image_folders.Listing, config: DataConfig, order: ClassOrder = "natural") -> None:
        self.root = found.root
        if image_folders.packed_samples(self.root):
            raise InputError(f"dataset {self.root} holds samples packed in one file; draw them with --format png to train on them")
        split, splits = image_folders.select_split(found, config.split, DataConfig().split)
        self.split = f"split {split} of {', '.join(splits)}" if split else ""
        beside = [(name, "beside the split folders") for name in found.images] + found.passed_over if split else []
        found = found.below(split)
        self.passed_over = found.passed_over + [(name, why) for name, why in beside if "/" not in name]
        self.names = found.images
        if not self.names:
            raise InputError(
                f"dataset {self.root} holds no images"
                + (f"; passed over: {image_folders.count_by_reason(self.passed_over)}" if self.passed_over else "")
            )
        given = (
            image_folders.read_metadata(self.root, split, config.label_column) if config.class_conditional and order != "plain" else None
        )
        self._refuse_columns(config, ("image_column",) if given else ("image_column", "label_column"))
        self.split_folder = split
        self.class_names: list[str] | None = None
        self._in_metadata = b""  # the labels as JSON, if they come from a metadata file
        if given:
            self._label_by_metadata(*given, split, order)
        elif config.class_conditional:
            self._label_by_folder(found, split, order)

    def _refuse_columns(self, config: DataConfig, columns: Sequence[str]) -> None:
        for name in columns:
            if (value := getattr(config, name)) is not None:
                raise InputError(f"{name} is {value}, but dataset {self.root} is a folder of images; leave {name} out")

    def _label_by_metadata(self, path: Path, rows: Mapping[str, Any], split: str, order: ClassOrder) -> None:
        found, without_image = image_folders.rows_of_split(path, rows, self.root, self.names, split)
        rows = image_folders.as_labels(found, str(path))
        self.passed_over += [(name, f"without a row in {path.name}") for name in self.names if name not in rows] + without_image
        self.passed_over = [(name, why) for name, why in self.passed_over if self.root / name != path]
        self.names = [name for name in self.names if name in rows]
        values = [rows[name] for name in self.names]
        self.class_names, number = label_numbers(values, order, str(path))
        self._labels = [number.get(value) for value in values]
        self._in_metadata = json.dumps(values).encode()

    def _label_by_folder(self, found: image_folders.Listing, split: str, order: ClassOrder) -> None:
        class_of = image_folders.classes_of(found, split)
        self.passed_over += [(name, "beside the class folders") for name in self.names if name not in class_of]
        self.names = list(class_of)
        empty = image_folders.class_folders(found, split) if "/" in self.names[0].removeprefix(f"{split}/") else []
        self.class_names = order_class_names(class_of.values(), empty, order, f"dataset {self.root}")
        number = {name: label for label, name in enumerate(self.class_names)}
        self._labels = [number[class_of[name]] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def labels(self) -> Sequence[int | None]:
        return self._labels if self.class_names else [0] * len(self)

    def unused_labels(self) -> str | None:
        if self.class_names:
            return None
        inner = [name.removeprefix(f"{self.split_folder}/") for name in self.names]
        found: set[Any] = {name.split("/")[0] for name in inner if "/" in name}
        try:
            given = image_folders.read_metadata(self.root, self.split_folder, None)
        except InputError:
            return "labels"  # with which something is wrong, as who uses them is told
        if given:
            found = {str(label) for label in given[1].values() if label is not None}
        return f"{len(found)} classes" if len(found) > 1 else None

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self.names[index]
        label = self._labels[index] if self.class_names else 0
        if label is None:
            raise InputError(f"image {path} has no label in its metadata")
        return read_file(path), label, str(path)

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def files(self) -> list[str] | None:
        return [str(self.root / name) for name in self.names]

    def shards(self) -> np.ndarray | None:
        return None

    def sizes(self) -> np.ndarray | None:
        return None

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:  # cached, because it reads the size of every file
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(f"{name}\0{_size(self.root / name)}\n"))
        digest.update(self._in_metadata)
        return {"images": len(self), "sha256": digest.hexdigest()}


class LegacyFolder(ImageFolder):
    """A folder as the first version read it, to resume its runs: fewer extensions, no splits, and a label for every image."""

    EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

    def __init__(self, root: Path, config: DataConfig, order: ClassOrder) -> None:
        found = image_folders.scan_folder(root)
        self.root, self.split, self.split_folder, self._in_metadata = root, "", "", b""
        self.names = [name for name in found.images if Path(name).suffix.lower() in self.EXTENSIONS]
        unknown = sorted(set(found.images) - set(self.names))
        self.passed_over = [(name, "not read by the version that began this run") for name in unknown] + found.passed_over
        self.class_names = None
        if config.class_conditional:
            classes = [name.split("/" if "/" in name else "_")[0] for name in self.names]
            self.class_names = order_class_names(classes, (), order, f"dataset {root}")
            number = {name: label for label, name in enumerate(self.class_names)}
            self._labels = [number[name] for name in classes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link, which may be skipped later
        return -1
