"""Where images come from: the embedded digits, a folder, a parquet file, a saved dataset, the Hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from . import images
from .config import DIGITS, DataConfig
from .errors import InputError, raise_all
from .files import read_file

MOST_CLASSES = 100_000
WAITING = 10_000  # images that threads have before them
MOST_SKIPPED = 0.01  # share of unreadable images: with more of them, something else is wrong
READERS = min(8, os.cpu_count() or 1)  # threads that decode beside whatever else is done


class Source(Protocol):
    """Images in a fixed order."""

    class_names: list[str] | None  # None where the images have no labels

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int, str]:
        """The image file's bytes, its label (0 without labels), and its name for messages."""

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data between runs: the number of images, and a hash of their names and sizes."""

    def files(self) -> list[str] | None:
        """The files that hold the images, in an order that follows from theirs; None where not all are known."""


class Folder:
    """A folder of image files, in the order of their paths.

    Labels are the first-level sub-folders; without sub-folders, what stands before the first "_" of the file name.
    """

    def __init__(self, root: Path, config: DataConfig) -> None:
        default = DataConfig()
        for name in ("split", "image_column", "label_column"):
            if getattr(config, name) != getattr(default, name):
                raise InputError(f"{name} is {getattr(config, name)}, but dataset {root} is a folder of images; leave {name} out")
        self.root = root
        self.names = sorted(_image_files(root))
        if not self.names:
            raise InputError(f"dataset {root} holds no images ({', '.join(images.EXTENSIONS)})")
        self.class_names: list[str] | None = None
        if config.class_conditional:
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
        return self._fingerprint

    def files(self) -> list[str] | None:
        return [str(self.root / name) for name in self.names]

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:  # looks at every file, and is asked for more than once
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(f"{name}\0{_size(self.root / name)}\n"))
        return {"images": len(self), "sha256": digest.hexdigest()}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere, which may be skipped
        return -1


def _image_files(root: Path) -> Iterator[str]:
    """Paths of image files below a folder, relative to it; links are followed, hidden names are not looked at."""

    def refuse(error: OSError) -> None:
        raise InputError(f"dataset {root}: {error.filename} cannot be read: {error.strerror}")

    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        # A folder that sample.py wrote keeps a picture of all its images in preview/.
        hidden = {"preview"} if "metadata.jsonl" in names else set()
        # Sorted: where two links lead to one folder, the same one is followed everywhere.
        folders[:] = [
            f
            for f in sorted(folders)
            if not f.startswith(".") and f not in hidden and os.path.realpath(os.path.join(folder, f)) not in seen
        ]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in images.EXTENSIONS and not name.startswith("."):
                yield path.relative_to(root).as_posix()


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
        self.table = _undecoded(table.select_columns([c for c in (self.image_column, self.label_column) if c]), self.image_column)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> tuple[bytes, int, str]:
        row = self.table[index]
        cell = row[self.image_column]
        where = f"{index} of dataset {self.name}"
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise InputError(f"image {where} is missing")
        label = row[self.label_column] if self.label_column else 0
        if label is None:
            raise InputError(f"image {where} has no label in column {self.label_column}")
        return cell["bytes"] if cell["bytes"] is not None else read_file(Path(cell["path"])), label, where

    def fingerprint(self) -> dict[str, Any]:
        columns = sorted(self.table.column_names)
        digest = hashlib.sha256(f"{columns} {len(self)} {self.table.data.nbytes}".encode())
        return {"images": len(self), "sha256": digest.hexdigest()}

    def files(self) -> list[str] | None:
        files = [file["filename"] for file in self.table.cache_files]  # none of a table in memory
        cells = self.table.data.column(self.image_column)
        inside = all(chunk.field("bytes").null_count == 0 for chunk in cells.chunks)  # else cells name files elsewhere
        return files if files and inside else None


class Without:
    """A source less some of its images."""

    def __init__(self, source: Source, skipped: Sequence[int]) -> None:
        self.source, self.skipped = source, sorted(skipped)
        self.class_names = source.class_names
        left_out = set(skipped)
        self.indices = [k for k in range(len(source)) if k not in left_out]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int, str]:
        return self.source.read(self.indices[index])

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | ({"skipped": self.skipped} if self.skipped else {})

    def files(self) -> list[str] | None:
        return self.source.files()


def state_of_files(source: Source) -> str | None:
    """A hash of what the file system says of all files of a source, which changes when one is written to; None where that is not known."""
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


def in_threads(work: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """What `work` returns for each index, in order; some thousands at a time, because one that waits takes memory, too."""
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(indices), WAITING):
            yield from pool.map(work, indices[first : first + WAITING])


def unreadable(source: Source, indices: Sequence[int]) -> dict[int, str]:
    """The images among these that cannot be decoded, or whose label is missing: a sentence for each index."""

    def problem(index: int) -> str | None:
        try:
            data, _, where = source.read(index)
            images.decode(data, where)
        except InputError as error:
            return str(error)
        return None

    found = tqdm(in_threads(problem, indices), "looking at the images", len(indices), leave=False, delay=5)
    return {index: sentence for index, sentence in zip(indices, found) if sentence}


def require_skippable(bad: Mapping[int, str], name: str, total: int, skip: bool) -> None:
    """Raises InputError, which names all, where there are unreadable images that are not to be skipped, or more than `MOST_SKIPPED`."""
    count = f"dataset {name}: {len(bad)} of {total} images cannot be read"
    if not skip:
        raise_all(bad.values(), f"{count}; remove them, or add --skip_bad")
    if len(bad) > MOST_SKIPPED * total:
        raise_all(bad.values(), f"{count}, and no more than {MOST_SKIPPED:.0%} are skipped; remove them")


def open_readable(config: DataConfig) -> Source:
    """Opens what `config.dataset` names, without what cannot be read if that is to be skipped.

    Raises:
        InputError: as `open_source`; more than `MOST_SKIPPED` of the images cannot be read.
    """
    source = open_source(config)
    if not config.skip_bad:
        return source
    bad = unreadable(source, range(len(source)))
    require_skippable(bad, str(config.dataset), len(source), skip=True)
    return Without(source, list(bad))


def _only_column(table: Any, kind: type, role: str) -> str:
    found: list[str] = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if not found and role in table.column_names:
        found = [role]
    if len(found) == 1:
        return found[0]
    several = f"several columns of {role}s: {', '.join(found)}"
    which = several if found else f"no column of {role}s among {', '.join(table.column_names)}"
    raise InputError(f"the dataset has {which}; name one with --{role}_column")


def _check_column(table: Any, column: str, field: str) -> None:
    if column not in table.column_names:
        raise InputError(f"{field} is {column}, but the dataset has only: {', '.join(table.column_names)}")


def _undecoded(table: Any, column: str) -> Any:
    """The table with its images as bytes: decoding, with its limits and refusals, is the business of images.py."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # of pyarrow
        raise InputError(f"image_column {column} holds {table.features[column]} and no images; name another") from error


def _class_names(table: Any, column: str) -> list[str]:
    feature = table.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise InputError(f"label_column {column} holds {feature} and no whole numbers; name another")
    labels = [label for label in table.unique(column) if label is not None]
    if not labels or min(labels) < 0 or max(labels) >= MOST_CLASSES:
        raise InputError(f"label_column {column} must hold classes from 0, fewer than {MOST_CLASSES}, but holds {labels[:5]}")
    return [str(k) for k in range(max(labels) + 1)]


def open_source(config: DataConfig) -> Source:
    """Opens what `config.dataset` names.

    Raises:
        InputError: it does not exist, is empty, or lacks the split, columns or labels asked for.
    """
    source = _open(config)
    if len(source) == 0:
        raise InputError(f"dataset {config.dataset} is empty")
    if source.class_names and len(source.class_names) == 1:
        raise InputError(
            f"class_conditional is on, but dataset {config.dataset} has a single class, {source.class_names[0]}; "
            f"name the folder that holds one folder for each class, or leave --class_conditional out"
        )
    return source


def _open(config: DataConfig) -> Source:
    assert config.dataset is not None
    path = Path(config.dataset).expanduser()
    if config.dataset == DIGITS:
        path = Path(str(resources.files(__package__).joinpath("digits.parquet")))
    if path.suffix == ".parquet":
        if not path.is_file():
            raise InputError(f"dataset {path} does not exist")
        return Table(_load("parquet", config, data_files=str(path)), config)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return Table(_load_saved(path, config), config) if saved else Folder(path, config)
    if not is_hub_id(config.dataset):
        raise InputError(f"dataset {config.dataset} is neither digits, a folder, a .parquet file nor a Hub id")
    repo, _, revision = config.dataset.partition("@")
    return Table(_load(repo, config, revision=revision or None), config)


def is_hub_id(dataset: str) -> bool:
    """Whether a name is that of a dataset on the Hub: user/name or name, and nothing of the sort on this disk."""
    path = Path(dataset).expanduser()
    foreign = dataset.split("@")[0].count("/") > 1 or dataset.startswith((".", "/", "~"))
    return not (foreign or dataset == DIGITS or path.suffix == ".parquet" or path.exists())


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
        if config.split != DataConfig().split:
            raise InputError(f"split is {config.split}, but dataset {path} has no splits; leave split out")
        return saved
    if config.split not in saved:
        raise InputError(f"split is {config.split}, but dataset {path} has only: {', '.join(saved)}")
    return saved[config.split]
