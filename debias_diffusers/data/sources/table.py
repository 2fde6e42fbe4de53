"""Tables of the `datasets` library: the embedded data sets, parquet files, a saved dataset, a data set on the Hub."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config.schema.data import DataConfig
from ...errors import CannotWriteError, InputError, reason
from ...utils.files import read_file, require_writable
from ..labels import ClassOrder, label_numbers, renumbered
from ..shards.table_columns import check_column, holds_whole_numbers, only_column


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


def embedded_table(path: Path) -> Any:
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


def load_table(path: str, config: DataConfig, **kwargs: Any) -> Any:
    """The split of a data set on the Hub, or of parquet files: `datasets.load_dataset(path, **kwargs)`.

    Raises:
        InputError: it cannot be loaded.
    """
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


def load_saved_table(path: Path, config: DataConfig) -> Any:
    """The split of a folder that `save_to_disk` of the `datasets` library wrote.

    Raises:
        InputError: it cannot be loaded, or lacks the split.
    """
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


def files_by_split(root: Path, names: Collection[str]) -> dict[str, list[str]]:
    """Some files of a folder by split, which `datasets` finds in their names, as paths relative to the folder.

    It is shown a folder of empty files of these names. In the real one, files of other kinds would decide what the splits are, links to
    folders would not be followed, and brackets in the path would be a pattern.

    Raises:
        InputError: it finds no split.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    with tempfile.TemporaryDirectory() as shown:
        for name in names:
            file = Path(shown, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        try:
            found = DataFilesDict.from_patterns(get_data_patterns(shown), base_path=shown)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"the names of the files of dataset {root} give no splits; rename them or their folders") from error
        return {str(split): [str(Path(file).relative_to(shown)) for file in files] for split, files in found.items() if files}
