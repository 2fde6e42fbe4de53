"""Opens the data that a configuration names: which kind of source they are."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...config import shard_names
from ...config.hub_names import data_problems, is_dataset_id
from ...config.schema.data import EMBEDDED, DataConfig
from ...errors import InputError
from .. import image_folders
from ..labels import ClassOrder, nonempty_classes
from ..shards.files import LocalFiles, ShardFiles, cache_folder
from ..shards.source import open_shards
from .base import Source
from .checks import require_skippable, unreadable_images
from .folder import ImageFolder, LegacyFolder
from .subset import SourceSubset
from .summary import class_counts
from .table import ImageTable, embedded_table, files_by_split, load_saved_table, load_table

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")  # of .tar files
BESIDE_SHARDS = re.compile(r"(^|/)(index-[0-9a-f]{12}\.arrow|classes\.json|made_from\.json)$")  # what this package writes beside shards


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
        path = Path(str(resources.files("debias_diffusers.data").joinpath(f"{config.dataset}.parquet")))
        if config.split == DataConfig().split:
            return ImageTable(embedded_table(path), config, order)
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
    return ImageTable(load_table(repo, config, revision=revision or None), config, order)


def _open_folder(path: Path, config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return ImageTable(load_saved_table(path, config), config, order)
    found = image_folders.scan_folder(path)
    for suffix in (".tar", ".parquet"):
        shards = {name for name, why in found.passed_over if name.lower().endswith(suffix) and why != image_folders.HIDDEN}
        if len(shards) > len(found.images):  # a few pictures beside parquet files are not data, nor a parquet file beside images
            splits = files_by_split(path, shards)
            in_splits = {name for names in splits.values() for name in names}
            source = _open_folder_of_shards(path, suffix, splits, config, order, renew)
            beside = [(name, f"beside the {suffix[1:]} files") for name in found.images]
            others = [
                (name, "in no split" if name in shards else why)
                for name, why in found.passed_over
                if name not in in_splits and not BESIDE_SHARDS.search(name)
            ]
            source.passed_over = beside + others + source.passed_over
            return source
    return ImageFolder(found, config, order)


def _open_folder_of_shards(
    path: Path, suffix: str, splits: Mapping[str, list[str]], config: DataConfig, order: ClassOrder, renew: bool
) -> Source:
    files = {split: [str(path.resolve() / name) for name in names] for split, names in splits.items()}
    if suffix == ".parquet" and config.shuffle_window is None:
        patterns = {split: _patterns(paths) for split, paths in files.items()}
        return ImageTable(load_table("parquet", config, data_files=patterns), config, order)
    if config.split not in splits:
        raise InputError(f"split is {config.split}, but dataset {path} has only: {', '.join(splits)}")
    source = open_shards(LocalFiles(files[config.split]), config, order, [config.split], renew)
    source.split = f"split {config.split} of {', '.join(splits)}" if len(splits) > 1 else ""
    return source


def _open_files(paths: list[str], config: DataConfig, order: ClassOrder, renew: bool) -> Source:
    """The files of a name or pattern. Parquet files are read by row groups where the order is made for it."""
    if paths[0].lower().endswith(".parquet") and config.shuffle_window is None and not shard_names.is_remote(paths[0]):
        return ImageTable(load_table("parquet", config, data_files=_patterns(paths)), config, order)
    if config.split != DataConfig().split:
        raise InputError(f"split is {config.split}, but dataset {config.dataset} names files; leave split out, and name those of the split")
    return open_shards(_shard_files(paths, config), config, order, renew=renew)


def _patterns(paths: Sequence[str]) -> list[str]:
    """Paths as `datasets` takes them: for it they are patterns, which follow no links to folders."""
    places = [os.path.split(os.path.expanduser(path)) for path in paths]
    return [glob.escape(os.path.join(os.path.realpath(folder), name)) for folder, name in places]


def _shard_files(paths: list[str], config: DataConfig) -> ShardFiles:
    if not shard_names.is_remote(paths[0]):
        return LocalFiles(paths)
    from ..shards.remote_files import RemoteFiles

    return RemoteFiles(paths, cache_folder(), round(config.shard_cache_gb * 1e9), config.shuffle_window)
