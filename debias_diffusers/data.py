"""Where images come from, and which of them, with which draws, stands at position p of a run.

Position p is the p-th image the run ever sees. Its epoch, its place in the epoch's permutation, its flip, its dropped
label, its u (which becomes the timestep) and its noise follow from (seed, p) alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from . import chance, images
from .config import DIGITS, DataConfig
from .errors import DebiasError, InputError

# ---- sources ---------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Images in a fixed order."""

    class_names: list[str] | None  # None where the images have no labels

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int, str]:
        """The image file's bytes, its label (0 without labels), and its name for messages."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data between runs: the number of images, and a hash of their names and sizes."""


class Folder:
    """A folder of image files, in the order of their paths.

    Labels are the first-level sub-folders; without sub-folders, what stands before the first "_" of the file name.
    """

    def __init__(self, root: Path, with_labels: bool) -> None:
        self.root = root
        names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in images.EXTENSIONS)
        self.names = sorted(names)
        if not self.names:
            raise InputError(f"dataset {root} holds no images ({', '.join(images.EXTENSIONS)})")
        self.class_names: list[str] | None = None
        if with_labels:
            self.labels = [self._label(name) for name in self.names]
            self.class_names = sorted(set(self.labels))
            self._index = {name: k for k, name in enumerate(self.class_names)}

    def _label(self, name: str) -> str:
        if "/" in name:
            return name.split("/")[0]
        if "_" in name:
            return name.split("_")[0]
        raise InputError(
            f"image {self.root / name} has no label; put it in a sub-folder named after its class, "
            f"name it CLASS_{name}, or leave --class_conditional out"
        )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self.names[index]
        label = self._index[self.labels[index]] if self.class_names else 0
        return read_file(path), label, str(path)

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{(self.root / name).stat().st_size}\n".encode())
        return {"images": len(self), "sha256": digest.hexdigest()}


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error


class Table:
    """A dataset of the `datasets` library with a column of images."""

    def __init__(self, table: Any, config: DataConfig) -> None:
        import datasets

        self.name = config.dataset
        self.image_column = config.image_column or _only_column(table, datasets.Image, "image")
        _check_column(table, self.image_column, "image_column")
        self.label_column: str | None = None
        self.class_names = None
        if config.class_conditional:
            self.label_column = config.label_column or _only_column(table, datasets.ClassLabel, "label")
            _check_column(table, self.label_column, "label_column")
            self.class_names = _class_names(table, self.label_column)
        self.table = table.select_columns([c for c in (self.image_column, self.label_column) if c])
        # Undecoded: decoding, with its limits and refusals, is the business of images.py.
        self.table = self.table.cast_column(self.image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[bytes, int, str]:
        row = self.table[index]
        cell = row[self.image_column]
        where = f"{index} of dataset {self.name}"
        if cell is None:
            raise InputError(f"image {where} is missing")
        data = cell["bytes"] if cell["bytes"] is not None else read_file(Path(cell["path"]))
        return data, row[self.label_column] if self.label_column else 0, where

    def fingerprint(self) -> dict[str, Any]:
        columns = sorted(self.table.column_names)
        digest = hashlib.sha256(f"{columns} {len(self)} {self.table.data.nbytes}".encode())
        return {"images": len(self), "sha256": digest.hexdigest()}


def _only_column(table: Any, kind: type, role: str) -> str:
    found: list[str] = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if not found and role in table.column_names:
        found = [role]
    if len(found) != 1:
        which = (
            f"several columns of {role}s: {', '.join(found)}" if found else f"no column of {role}s among {', '.join(table.column_names)}"
        )
        raise InputError(f"the dataset has {which}; name one with --{role}_column")
    return found[0]


def _check_column(table: Any, column: str, field: str) -> None:
    if column not in table.column_names:
        raise InputError(f"{field} is {column}, but the dataset has only: {', '.join(table.column_names)}")


def _class_names(table: Any, column: str) -> list[str]:
    feature = table.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = table.unique(column)
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise InputError(f"label_column {column} holds other things than whole numbers from 0, such as {labels[0]!r}")
    return [str(k) for k in range(max(labels) + 1)]


def open_source(config: DataConfig) -> Source:
    """Opens what `config.dataset` names.

    Raises:
        InputError: it does not exist, is empty, or lacks the split or columns asked for.
    """
    assert config.dataset is not None
    if config.dataset == DIGITS:
        return Table(_load("parquet", config, data_files=str(resources.files(__package__).joinpath("digits.parquet"))), config)
    path = Path(config.dataset).expanduser()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise InputError(f"dataset {path} does not exist")
        return Table(_load("parquet", config, data_files=str(path)), config)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return Table(_load_saved(path, config), config) if saved else Folder(path, config.class_conditional)
    if path.exists() or config.dataset.count("/") > 1 or config.dataset.startswith((".", "/", "~")):
        raise InputError(f"dataset {config.dataset} is neither digits, a folder, a .parquet file nor a Hub id")
    return Table(_load(config.dataset, config), config)


def _load(path: str, config: DataConfig, **kwargs: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, split=config.split, **kwargs)
    # load_dataset raises whatever its builders, the Hub client and the network raise.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"dataset {config.dataset} with split {config.split} cannot be loaded: {reason}") from error


def _load_saved(path: Path, config: DataConfig) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset {path} cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if config.split not in saved:
        raise InputError(f"split is {config.split}, but dataset {path} has only: {', '.join(saved)}")
    return saved[config.split]


KEEP_BYTES = 2**26  # a data set whose decoded pixels take no more is decoded once

# ---- what stands at a position ---------------------------------------------------------------------------------------


class TrainingData(Dataset):
    """The samples of a run by position: 0, 1, 2, ... through all epochs.

    Each is a dict: `image` (C, H, W) uint8, `label` int64, `u` float64 in [0, 1), `noise` (C, H, W) float32. A label of
    `num_classes` means that it was dropped. An image that cannot be read is returned as the error that says so, because a
    loader's worker would turn a raised one into a traceback.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int) -> None:
        assert config.resolution is not None
        if len(source) == 0:
            raise InputError(f"dataset {config.dataset} is empty")
        self.source, self.config, self.seed = source, config, seed
        self.resolution = config.resolution
        self.num_classes = len(source.class_names) if source.class_names else 0
        self.channels = config.channels or (3 if images.decode(*self._first()).mode == "RGB" else 1)
        self.shape = (self.channels, self.resolution, self.resolution)
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def _first(self) -> tuple[bytes, str]:
        data, _, where = self.source.read(0)
        return data, where

    def index(self, position: int) -> int:
        """The source's index of the image at a position: each epoch is a permutation of (seed, epoch)."""
        epoch, place = divmod(position, len(self.source))
        if epoch != self._epoch:
            order = torch.randperm(len(self.source), generator=chance.generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, order.numpy()
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, Any] | DebiasError:
        try:
            return self._sample(position)
        except DebiasError as error:
            return error

    def _sample(self, position: int) -> dict[str, Any]:
        pixels, label = self._decoded(self.index(position))
        if self.config.random_flip and chance.uniform(self.seed, "flip", position) < 0.5:
            pixels = pixels.flip(-1)
        if self.num_classes and chance.uniform(self.seed, "label", position) < self.config.label_dropout:
            label = self.num_classes
        return {
            "image": pixels,
            "label": label,
            "u": chance.uniform(self.seed, "timestep", position),
            "noise": torch.randn(self.shape, generator=chance.generator(self.seed, "noise", position)),
        }

    def _decoded(self, index: int) -> tuple[Tensor, int]:
        """Pixels (C, H, W) uint8 and label of one image; kept in memory where all of them fit."""
        if index not in self._kept:
            decoded = self._decode(index)
            if len(self.source) * math.prod(self.shape) > KEEP_BYTES:
                return decoded
            self._kept[index] = decoded
        return self._kept[index]

    def _decode(self, index: int) -> tuple[Tensor, int]:
        data, label, where = self.source.read(index)
        image = images.decode(data, where)
        if image.mode == "RGB" and self.channels == 1:
            raise InputError(f"image {where} has colours, but the model learns grey ones; add --channels 3")
        if self.num_classes and not 0 <= label < self.num_classes:
            raise InputError(f"image {where} has label {label}, but there are {self.num_classes} classes")
        image = images.fit(image.convert("L" if self.channels == 1 else "RGB"), self.resolution)
        return torch.from_numpy(images.to_array(image)), label


class PositionBatches(Sampler[list[int]]):
    """The positions of each forward of one process, from a step to the last.

    Step k has the positions k B .. (k+1) B - 1; process r of n has the r-th of n equal parts of them, in pieces of at most
    `micro_batch_size`.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int, num_processes: int, steps: range) -> None:
        self.batch_size, self.micro_batch_size, self.steps = batch_size, micro_batch_size, steps
        self.share = batch_size // num_processes
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            start = step * self.batch_size + self.offset
            for first in range(start, start + self.share, self.micro_batch_size):
                yield list(range(first, min(first + self.micro_batch_size, start + self.share)))

    def __len__(self) -> int:
        return len(self.steps) * -(-self.share // self.micro_batch_size)


def collate(samples: list[dict[str, Any] | DebiasError]) -> dict[str, Tensor] | DebiasError:
    """Samples stacked to a batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, DebiasError):
            return sample
    batch: dict[str, Tensor] = default_collate(samples)
    return batch


def batches(data: TrainingData, positions: PositionBatches, pin_memory: bool) -> Iterator[dict[str, Tensor]]:
    """Micro-batches in the order of `positions`.

    Raises:
        InputError: an image cannot be read; the message names it.
    """
    loader = DataLoader(
        data,
        batch_sampler=positions,
        num_workers=data.config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )
    for batch in loader:
        if isinstance(batch, DebiasError):
            raise batch
        yield batch


def _prepare_worker(_: int) -> None:
    """A worker leaves stopping to the process that trains: Ctrl-C reaches it too, but must not end it before the save."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
