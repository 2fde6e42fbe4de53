"""Sources of images: the embedded data sets, a folder, a parquet file, a saved dataset, a data set on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from tqdm import tqdm

from ..config import shard_names
from ..config.hub_names import data_problems, is_dataset_id
from ..config.schema import EMBEDDED, DataConfig
from ..errors import CannotWriteError, InputError, raise_all, reason
from ..utils.files import read_file, require_writable
from . import image_folders, images
from .labels import ClassOrder, describe_classes, label_numbers, nonempty_classes, order_class_names, renumbered
from .shards.files import LocalFiles, ShardFiles, cache_folder
from .shards.source import ShardedSource, open_shards
from .shards.table_columns import check_column, holds_whole_numbers, only_column

MAX_PENDING = 10_000  # indices that are queued for threads at once
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")  # of .tar files
MAX_SKIPPED_SHARE = 0.01  # share of unreadable images that --skip_bad accepts; more mean another problem
BESIDE_SHARDS = re.compile(r"(^|/)(index-[0-9a-f]{12}\.arrow|classes\.json|made_from\.json)$")  # what this package writes beside shards
READER_THREADS = min(8, os.cpu_count() or 1)  # threads that read and decode images


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
        rows = image_folders.as_labels(
            {name: label for name, label in rows.items() if name.startswith(f"{split}/" if split else "")}, str(path)
        )
        there = set(self.names)
        self.passed_over += [(name, f"without a row in {path.name}") for name in self.names if name not in rows]
        self.passed_over += [(name, f"in {path.name} without an image") for name in rows if name not in there]
        self.passed_over = [(name, why) for name, why in self.passed_over if self.root / name != path]
        self.names = [name for name in self.names if name in rows]
        if not self.names:
            raise InputError(
                f"{path} has no row for any image of dataset {self.root}; its file_name must be a path relative to {path.parent}"
            )
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
        inner = [name.removeprefix(f"{self.split_folder}/" if self.split_folder else "") for name in self.names]
        found: set[Any] = {name.split("/")[0] for name in inner if "/" in name}
        with contextlib.suppress(InputError):
            if given := image_folders.read_metadata(self.root, self.split_folder, None):
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


class ImageTable:
    """A dataset of the `datasets` library with a column of images."""

    def __init__(self, table: Any, config: DataConfig, order: ClassOrder = "natural") -> None:
        import datasets

        self.name = config.dataset
        self.columns = table  # all of them
        splits = list(table.info.splits or ())
        self.split = f"split {config.split} of {', '.join(splits)}" if len(splits) > 1 else ""
        self.passed_over: list[tuple[str, str]] = []
        self.image_column = config.image_column or only_column(table.features, datasets.Image, "image")
        check_column(table.features, self.image_column, "image_column")
        self.label_column: str | None = None
        self.class_names: list[str] | None = None
        if config.class_conditional:
            self.label_column = config.label_column or only_column(table.features, datasets.ClassLabel, "label")
            check_column(table.features, self.label_column, "label_column")
            self.class_names, self._number = _classes_of(table, self.label_column, order)
        self._unused = [f"{len(f.names)} classes" for f in table.features.values() if isinstance(f, datasets.ClassLabel)]
        self.table = _undecoded(table.select_columns([c for c in (self.image_column, self.label_column) if c]), self.image_column)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[bytes, int, str]:
        row = self.table[index]
        cell = row[self.image_column]
        where = f"{index} of dataset {self.name}"
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise InputError(f"image {where} is missing")
        label = self._number.get(row[self.label_column], row[self.label_column]) if self.label_column else 0
        if label is None:
            raise InputError(f"image {where} has no label in column {self.label_column}")
        return cell["bytes"] if cell["bytes"] is not None else read_file(Path(cell["path"])), label, where

    def labels(self) -> Sequence[int | None]:
        if not self.label_column:
            return [0] * len(self)
        return [self._number.get(value, value) for value in self.table[self.label_column][:]]

    def unused_labels(self) -> str | None:
        return self._unused[0] if self._unused and not self.class_names else None

    def fingerprint(self) -> dict[str, Any]:
        columns = sorted(self.table.column_names)
        digest = hashlib.sha256(f"{columns} {len(self)} {self.table.data.nbytes}".encode())
        return {"images": len(self), "sha256": digest.hexdigest()}

    def files(self) -> list[str] | None:
        files = [file["filename"] for file in self.table.cache_files]  # empty for a table in memory
        cells = self.table.data.column(self.image_column)
        inside = all(chunk.field("bytes").null_count == 0 for chunk in cells.chunks)  # else cells have paths of other files
        return files if files and inside else None

    def shards(self) -> np.ndarray | None:
        """The record batches of its Arrow files."""
        if self.table._indices is not None:  # in another order than its files
            return None
        return np.cumsum([0, *(len(chunk) for chunk in self.table.data.column(0).chunks)])

    def sizes(self) -> np.ndarray | None:
        return None


class SourceSubset:
    """A source without some of its images."""

    def __init__(self, source: Source, skipped: Sequence[int]) -> None:
        self.source, self.skipped = source, sorted(skipped)
        self.class_names, self.split, self.passed_over = source.class_names, source.split, source.passed_over
        self.indices: Sequence[int] = _Kept(len(source), self.skipped)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int, str]:
        return self.source.read(self.indices[index])

    def labels(self) -> Sequence[int | None]:
        every = self.source.labels()
        return [every[index] for index in self.indices]

    def unused_labels(self) -> str | None:
        return self.source.unused_labels()

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | ({"skipped": self.skipped} if self.skipped else {})

    def files(self) -> list[str] | None:
        return self.source.files()

    def shards(self) -> np.ndarray | None:
        every = self.source.shards()
        return None if every is None else every - np.searchsorted(self.skipped, every)

    def sizes(self) -> np.ndarray | None:
        every = self.source.sizes()
        return None if every is None else np.delete(every, self.skipped, 0)


class _Kept(Sequence[int]):
    """The numbers 0 .. total - 1 without some, which are sorted: their memory is that of those that are left out."""

    def __init__(self, total: int, left_out: Sequence[int]) -> None:
        self._total, self._left_out = total, np.asarray(left_out, np.int64)
        self._len = total - len(left_out)
        self._before = self._left_out - np.arange(len(left_out))  # numbers that are kept before each that is not

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[k] for k in range(self._len)[index]]
        index = range(self._len)[index]
        return index + int(np.searchsorted(self._before, index, "right"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and np.array_equal(np.asarray(self), np.asarray(other))

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.delete(np.arange(self._total), self._left_out).astype(dtype or np.int64)


class RepeatedSource(SourceSubset):
    """A source whose images occur so many times, one after the other."""

    def __init__(self, source: Source, repeats: Sequence[int]) -> None:
        super().__init__(source, ())
        self.indices = [index for index, count in enumerate(repeats) for _ in range(count)]

    def shards(self) -> np.ndarray | None:
        return None

    def sizes(self) -> np.ndarray | None:
        return None


def folder_repeats(source: Source) -> list[int]:
    """How often each image of a folder is to occur in an epoch: N below a first-level folder named N_NAME, else once.

    Raises:
        InputError: the source is no folder of images.
    """
    if isinstance(source, SourceSubset):
        every = folder_repeats(source.source)
        return [every[index] for index in source.indices]
    inner = getattr(source, "source", source)  # of a source with captions
    if not isinstance(inner, ImageFolder):
        raise InputError("folder_repeats is on, but the dataset is no folder of images; leave it out")
    folders = [name.removeprefix(f"{inner.split_folder}/" if inner.split_folder else "").split("/")[:-1] for name in inner.names]
    found = [re.match(r"([0-9]{1,6})_", folder[0]) if folder else None for folder in folders]
    return [int(match[1]) if match else 1 for match in found]


def sharded(source: Source) -> ShardedSource | None:
    """The shards behind a source; None where there are none."""
    inner: Any = source
    while hasattr(inner, "source"):
        inner = inner.source
    return inner if isinstance(inner, ShardedSource) else None


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
    if not skip:
        raise_all(bad.values(), f"{count}; remove them, or add --skip_bad")
    if len(bad) > MAX_SKIPPED_SHARE * total:
        raise_all(bad.values(), f"{count}, and no more than {MAX_SKIPPED_SHARE:.0%} are skipped; remove them")


def open_readable(config: DataConfig, order: ClassOrder = "natural") -> Source:
    """Opens `config.dataset`; with `config.skip_bad`, without the images that cannot be read.

    Raises:
        InputError: as `open_source`; or more than `MAX_SKIPPED_SHARE` of the images cannot be read.
    """
    source = open_source(config, order)
    if not config.skip_bad:
        return source
    bad = unreadable_images(source, range(len(source)))
    require_skippable(bad, str(config.dataset), len(source), skip=True)
    return SourceSubset(source, list(bad))


def _undecoded(table: Any, column: str) -> Any:
    """The table with undecoded images: images.py decodes them and checks their limits."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # of pyarrow
        raise InputError(f"image_column {column} holds {table.features[column]} and no images; name another") from error


def _classes_of(table: Any, column: str, order: ClassOrder) -> tuple[list[str], dict[Any, int | None]]:
    """Names of the classes of a column, and a mapping from its values to labels. A value that is not in the mapping is its own label."""
    feature, where = table.features[column], f"label_column {column}"
    if not hasattr(feature, "names"):
        holds_whole_numbers(feature, column)
        return label_numbers(table.unique(column), order, where)
    return renumbered(list(feature.names), table.unique(column), order, where)


def class_counts(source: Source) -> list[int] | None:
    """The number of images of each class; None if there are no labels."""
    if not source.class_names:
        return None
    count = Counter(source.labels())
    return [count[label] for label in range(len(source.class_names))]


def summary(source: Source, name: str | None) -> list[str]:
    """Lines for the user: what a source has, and which files are ignored for which reasons."""
    parts = [f"{len(source)} images"]
    if source.class_names:
        parts.append(describe_classes(source.class_names, class_counts(source) or []))
    found = f"dataset {name}: {', '.join([*parts, source.split] if source.split else parts)}"
    passed_over = [f"passed over: {image_folders.count_by_reason(source.passed_over)}"] if source.passed_over else []
    shards = sharded(source)
    return [found, *passed_over, *(f"warning: {warning}" for warning in (shards.warnings if shards else ()))]


def training_summary(source: Source, name: str | None) -> list[str]:
    """`summary`, and whether the data have classes that the training does not use."""
    unused = source.unused_labels()
    return summary(source, name) + (
        [f"its {unused} are not used: an unconditional model is trained; --class_conditional trains one that knows them"] if unused else []
    )


def open_source(config: DataConfig, order: ClassOrder = "natural", renew: bool = False) -> Source:
    """Opens `config.dataset`: "digits", "emoji", a folder, .tar or .parquet files, or a Hub id.

    Args:
        config: dataset, split and columns.
        order: of the labels; for images that are used with a model, its class names.
        renew: index shards as they are, whatever an index says.

    Raises:
        InputError: it does not exist, is empty, or lacks the split, columns or labels asked for.
    """
    source = _open(config, order, renew)
    if len(source) == 0:
        raise InputError(f"dataset {config.dataset} is empty")
    names = _with_images(source, source.class_names) if isinstance(order, str) and source.class_names else []
    if len(names) == 1 and len(set(source.labels())) == 1:  # other labels belong to no class; checking the images names them
        raise InputError(
            f"class_conditional is on, but dataset {config.dataset} has a single class, {names[0]}; "
            f"name the folder that holds one folder for each class, or leave --class_conditional out"
        )
    return source


def reopen_source(config: DataConfig, order: ClassOrder, known: Mapping[str, Any]) -> Source:
    """Opens the data of a run that resumes; `known` is the saved fingerprint. If only the first version's reading gives it, uses that.

    Raises:
        InputError: as `open_source`.
    """

    def same(source: Source) -> bool:
        return SourceSubset(source, known.get("skipped", [])).fingerprint() == known

    path = Path(str(config.dataset)).expanduser()
    with contextlib.suppress(InputError):
        if same(source := open_source(config, order)):
            return source
    with contextlib.suppress(InputError):
        if path.is_dir() and same(source := LegacyFolder(path, config, order)):
            return source
    return open_source(config, order)


def _with_images(source: Source, names: list[str]) -> list[str]:
    """Names of the classes; of an image folder only those with images, because an empty folder need not be a class."""
    return [names[label] for label in nonempty_classes(class_counts(source) or [])] if isinstance(source, ImageFolder) else names


def _open(config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    assert config.dataset is not None
    path = Path(config.dataset).expanduser()
    if config.dataset in EMBEDDED:
        path = Path(str(resources.files(__package__).joinpath(f"{config.dataset}.parquet")))
        if config.split == DataConfig().split:
            return ImageTable(_embedded(path), config, order)
    if path.is_dir():
        return _open_folder(path, config, order, renew)
    if absent := data_problems("dataset", config.dataset):
        raise InputError(absent[0])
    if path.suffix.lower() in (".tar", ".parquet"):
        return _open_files(shard_names.expand(config.dataset), config, order, renew)
    if path.suffix.lower() in COMPRESSED and path.is_file():
        raise InputError(f"dataset {config.dataset} is compressed, so that its images cannot be read at random; decompress it")
    if not is_dataset_id(config.dataset):
        raise InputError(f"dataset {config.dataset} is neither {', '.join(EMBEDDED)}, a folder, a .tar or .parquet file nor a Hub id")
    repo, _, revision = config.dataset.partition("@")
    return ImageTable(_load(repo, config, revision=revision or None), config, order)


def _open_folder(path: Path, config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return ImageTable(_load_saved(path, config), config, order)
    found = image_folders.scan_folder(path)
    for suffix in (".tar", ".parquet"):
        shards = {name for name, _ in found.passed_over if name.lower().endswith(suffix)}
        if len(shards) > len(found.images):  # a few pictures beside parquet files are not data, nor a parquet file beside images
            source = _open_folder_of_shards(path, suffix, config, order, renew)
            beside = [(name, f"beside the {suffix[1:]} files") for name in found.images]
            others = [(name, why) for name, why in found.passed_over if name not in shards and not BESIDE_SHARDS.search(name)]
            source.passed_over = beside + others + source.passed_over
            return source
    return ImageFolder(found, config, order)


def _open_folder_of_shards(path: Path, suffix: str, config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    splits = _shards(path, suffix)
    if suffix == ".parquet" and config.shuffle_window is None:
        return ImageTable(_load("parquet", config, data_files=splits), config, order)
    if config.split not in splits:
        raise InputError(f"split is {config.split}, but dataset {path} has only: {', '.join(splits)}")
    source = open_shards(LocalFiles(splits[config.split]), config, order, [config.split], renew)
    source.split = f"split {config.split} of {', '.join(splits)}" if len(splits) > 1 else ""
    return source


def _open_files(paths: list[str], config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    """The files of a name or pattern. Parquet files are read by row groups where the order is made for it."""
    if paths[0].lower().endswith(".parquet") and config.shuffle_window is None and not shard_names.is_remote(paths[0]):
        data_files = [str(Path(path).expanduser()) for path in paths]
        return ImageTable(_load("parquet", config, data_files=data_files), config, order)
    if config.split != DataConfig().split:
        raise InputError(f"split is {config.split}, but dataset {config.dataset} names files; leave split out, and name those of the split")
    return open_shards(_shard_files(paths, config), config, order, renew=renew)


def _shard_files(paths: list[str], config: DataConfig) -> ShardFiles:
    if not shard_names.is_remote(paths[0]):
        return LocalFiles(paths)
    from .shards.remote_files import RemoteFiles

    return RemoteFiles(paths, cache_folder(), round(config.shard_cache_gb * 1e9), config.shuffle_window)


def _shards(path: Path, suffix: str) -> dict[str, list[str]]:
    """The files of a folder with a suffix, by split; `datasets` finds the split in their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = str(path.resolve())
    files = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base, allowed_extensions=[suffix, suffix.upper()])
    return {str(split): list(names) for split, names in files.items() if names}


def _embedded(path: Path) -> Any:
    """An embedded data set in memory, without the cache of `datasets`, whose folder may not be writable.

    It is in chunks of 100 rows, as in that cache, because the fingerprints of existing runs are of this form.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    form = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(form, file.schema_arrow) as writer:
        for chunk in file.iter_batches(100):
            writer.write_batch(chunk)
    return datasets.Dataset(pyarrow.ipc.open_stream(form.getvalue()).read_all())


def _load(path: str, config: DataConfig, **kwargs: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, split=config.split, **kwargs)
    # load_dataset raises whatever its builders, the Hub client and the network raise.
    except Exception as error:
        cause = error.__cause__ or error  # of a wrapped error, the cause has the useful message
        advice = _cache_folder_advice(datasets.config.HF_DATASETS_CACHE)
        absent = "there is no such folder here, and " if kwargs.get("revision", "") is None else ""  # of a name on the Hub
        raise InputError(f"{absent}dataset {config.dataset} with split {config.split} cannot be loaded: {reason(cause)}{advice}") from error


def _cache_folder_advice(folder: Any) -> str:
    """Advice if the cache folder of `datasets` is not writable; else empty."""
    try:
        require_writable(Path(folder) / "file")
    except CannotWriteError:
        return f"; its cache {folder} cannot be written: name a folder that can with the environment variable HF_HOME"
    return ""


def _load_saved(path: Path, config: DataConfig) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"dataset {path} cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(saved, datasets.DatasetDict):
        if config.split != DataConfig().split:
            raise InputError(f"split is {config.split}, but dataset {path} has no splits; leave split out")
        return saved
    if config.split not in saved:
        raise InputError(f"split is {config.split}, but dataset {path} has only: {', '.join(saved)}")
    return saved[config.split]
