"""The index of a sharded data set: a memory-mapped Arrow file with a row for each image. No torch.

It is built once, by several processes, and written beside the shards, or into the cache folder where that cannot be. Each start compares
sizes and times of the shards with it; shards that differ are read again, and must have the same images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from tqdm import tqdm

from ...config.schema.data import DataConfig
from ...errors import CannotWriteError, DebiasError, InputError, raise_all
from ...utils.console import say
from ...utils.files import atomic_write, remove_old_temporary_files
from ...utils.signals import stop_with_parent
from . import parquet, tar
from .files import FORMAT, FileState, IndexKey, ShardFiles, Unit, cache_folder
from .rows import SCHEMA, Part

_ENTRY = b"index"  # of the metadata of the Arrow file
# Columns that the fingerprint covers, and those that it does not: an image may be elsewhere within its shard.
_OF_IMAGES, _PLACES = ("key", "size", "crc32", "label"), ("offset", "height", "width")
SMALL = 1 << 26  # bytes of shards that are indexed without other processes


class Index:
    """The rows of all images in their order, and the units in which they are read.

    Attributes:
        units: tar files, or row groups of parquet files, in their order.
        starts: (len(units) + 1,) int64, the first image of each unit, and the number of images.
        offset, size, crc32, height, width: (N,) as in `rows.SCHEMA`, memory-mapped.
    """

    def __init__(self, table: pyarrow.Table, about: dict[str, Any], path: Path | None = None) -> None:
        """`about`: the metadata. `path`: the file that the table is mapped from."""
        self.path, self.about, self.table = path, about, table
        self.units = [Unit(about["files"][file][0], group, images) for file, group, images in about["units"]]
        self.starts = np.cumsum([0, *(unit.images for unit in self.units)])
        numbers = ("offset", "size", "crc32", "height", "width")  # not by `to_numpy`, which imports pandas
        self.offset, self.size, self.crc32, self.height, self.width = (np.from_dlpack(_array(table[name])) for name in numbers)
        self._key, self._label, self._captions = (_array(table[name]) for name in ("key", "label", "captions"))

    def __reduce__(self) -> tuple[Any, ...]:  # for data loader workers that are not forked: they map the file, too
        return read, (self.path,)

    def __len__(self) -> int:
        return len(self.size)

    @property
    def files(self) -> dict[str, FileState]:
        """The shards as they were when they were read."""
        return {name: FileState(size, version) for name, size, version, _ in self.about["files"]}

    @property
    def passed_over(self) -> list[tuple[str, str]]:
        """What is no image, with the reason, as of `Source`."""
        return [(name, "without an image") for name, *_, count in self.about["files"] for _ in range(count)]

    @property
    def sha256(self) -> str:
        """Of the names of the shards, and the keys, sizes, checksums and labels of the images."""
        return str(self.about["sha256"])

    @property
    def captions_sha256(self) -> str:
        """Of all captions."""
        return str(self.about["captions_sha256"])

    def key(self, index: int) -> str:
        """The name of an image in its shard."""
        return str(self._key[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image."""
        return tuple(self._captions[index].as_py() or ())

    @property
    def all_captions(self) -> pyarrow.LargeListArray:
        """The captions of all images."""
        return self._captions

    def labels(self) -> tuple[np.ndarray, list[str]]:
        """The label of each image as a number (N,) int32 that counts in the list of all different labels; -1 for an image without one."""
        encoded = self._label.dictionary_encode()
        return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32), encoded.dictionary.to_pylist()

    def part(self, name: str) -> Part:
        """The rows of a shard."""
        numbers = [k for k, unit in enumerate(self.units) if unit.name == name]
        first, last = self.starts[numbers[0]], self.starts[numbers[-1] + 1]
        without = next(count for file, *_, count in self.about["files"] if file == name)
        return Part(self.table.slice(first, last - first), [self.units[k] for k in numbers], without)


# ---- files -----------------------------------------------------------------------------------------------------------


def open_index(files: ShardFiles, key: IndexKey) -> Index:
    """The index of a data set, built where there is none.

    Raises:
        InputError: a shard is missing, damaged or truncated, or has changed since it was indexed; names all of them.
        CannotWriteError: a new index can be written neither beside the shards nor into the cache folder.
    """
    now = _states(files)
    if found := _up_to_date(files, key, now):
        return found
    with _one_at_a_time(key, files):
        if found := _up_to_date(files, key, now):  # another process has built it
            return found
        before = next(_found(files, key), None)
        if before is None and (there := _on_the_server(files, key, now)):
            return _write(files, key, there)
        if before is None:
            say(f"indexing {len(now)} {'shards' if len(now) > 1 else 'shard'}, once")
            return _write(files, key, _build(files, key, now))
        return _write(files, key, _same_images(files, key, now, before))


def renew_index(files: ShardFiles, key: IndexKey) -> Index:
    """The index of the shards as they are; those that have not changed since it was written are not read again. Errors as `open_index`."""
    with _one_at_a_time(key, files):
        now = _states(files)
        before = next(_found(files, key), None)
        if before and before.files == now:
            return before
        return _write(files, key, _build(files, key, now, before))


def read(path: Path) -> Index:
    """The index in a file, memory-mapped.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    return _parsed(lambda: pyarrow.memory_map(str(path)), path)


def _parsed(content: Callable[[], Any], path: Path | None) -> Index:
    try:
        table = pyarrow.ipc.open_file(content()).read_all()
        about = json.loads(table.schema.metadata[_ENTRY])
        index = Index(table, about, path)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    if about["format"] != FORMAT or table.schema.remove_metadata() != SCHEMA or index.starts[-1] != len(index):
        raise ValueError("another format")
    if any(about[name] != digest for name, digest in _digests(table, about).items()):
        raise ValueError("another digest")
    return index


def _places(files: ShardFiles, key: IndexKey) -> list[Path]:
    """Where the index may be: beside the shards, else in the cache folder."""
    here = hashlib.sha256(os.fsencode(files.where(""))).hexdigest()[:12]  # of two folders with the same names
    cached = cache_folder() / f"{here}-{key.file_name}"
    return [cached] if files.folder is None else [files.folder / key.file_name, cached]


def _found(files: ShardFiles, key: IndexKey) -> Iterator[Index]:
    """The indices that there are; a damaged one counts as none."""
    for path in _places(files, key):
        if path.is_file():
            with contextlib.suppress(ValueError):
                yield read(path)


def _on_the_server(files: ShardFiles, key: IndexKey, now: dict[str, FileState]) -> Index | None:
    """The index that lies beside the shards of a server, for the same shards by name and size; None where there is none.

    It was built elsewhere, of files with other versions: whether they have the same bytes shows each image by its checksum.
    """
    if files.folder is not None:
        return None
    for which in (key.which, [DataConfig().split]):  # of named files, and of a folder
        content = files.beside(dataclasses.replace(key, which=which).file_name)
        with contextlib.suppress(ValueError):
            found = _parsed(partial(pyarrow.BufferReader, content), None) if content else None
            if found and {name: state.size for name, state in found.files.items()} == {name: state.size for name, state in now.items()}:
                states = [[name, *now[name], count] for name, *_, count in found.about["files"]]
                return Index(found.table, {**found.about, "files": states})
    return None


def _up_to_date(files: ShardFiles, key: IndexKey, now: dict[str, FileState]) -> Index | None:
    return next((index for index in _found(files, key) if index.files == now), None)


def _states(files: ShardFiles) -> dict[str, FileState]:
    """Sizes and versions of all shards. Raises InputError with all that are not there."""
    found, problems = {}, []
    for name in files.names:
        try:
            found[name] = files.state(name)
        except InputError as error:
            problems.append(str(error))
    raise_all(problems, "data set")
    return found


@contextlib.contextmanager
def _one_at_a_time(key: IndexKey, files: ShardFiles) -> Iterator[None]:
    """Of several processes of a machine that need the same index one builds it, and the others wait."""
    lock = _places(files, key)[-1].with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115
    except OSError:  # then each builds it
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(files: ShardFiles, key: IndexKey, index: Index) -> Index:
    *beside, cached = _places(files, key)
    schema = SCHEMA.with_metadata({_ENTRY: json.dumps(index.about).encode()})
    table = index.table.replace_schema_metadata(schema.metadata)
    for path in beside:
        try:
            return _written(path, table)
        except CannotWriteError:
            say(f"the index is written to {cached}, because {path.parent} cannot be written to")
    return _written(cached, table)


def _written(path: Path, table: pyarrow.Table) -> Index:
    remove_old_temporary_files(path.parent)
    with atomic_write(path) as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)  # one batch, because its columns are in one piece
    return read(path)


# ---- building --------------------------------------------------------------------------------------------------------


def _build(files: ShardFiles, key: IndexKey, now: dict[str, FileState], before: Index | None = None) -> Index:
    """The index of shards as they are now, with the rows of `before` of those that are the same."""
    known = before.files if before else {}
    changed = [name for name in files.names if known.get(name) != now[name]]
    fresh = dict(zip(changed, _read_all(files, key, changed, sum(now[name].size for name in changed))))
    parts = {name: fresh[name] if name in fresh else before.part(name) for name in files.names}  # type: ignore[union-attr]
    table = pyarrow.concat_tables([part.table for part in parts.values()]).replace_schema_metadata(None).combine_chunks()
    about: dict[str, Any] = {
        "format": FORMAT,
        "class_names": key.class_names,
        "whole_numbers": key.whole_numbers,
        "files": [[name, *now[name], part.without_image] for name, part in parts.items()],
        "units": [[number, unit.group, unit.images] for number, part in enumerate(parts.values()) for unit in part.units],
    }
    return Index(table, about | _digests(table, about))


def _same_images(files: ShardFiles, key: IndexKey, now: dict[str, FileState], before: Index) -> Index:
    """An index in place of one whose shards have other sizes or times of change, where they have the same images.

    Raises:
        InputError: names the shards that have not.
    """
    remedy = "put back what the index has, or index the shards as they are with python -m debias_diffusers.shards index"
    known = before.files
    problems = [f"shard {files.where(name)} is missing: the index has it" for name in known if name not in now]
    problems += [f"shard {files.where(name)} is new: the index has it not" for name in now if name not in known]
    raise_all(problems, "data set", remedy)
    changed = [name for name in files.names if known[name] != now[name]]
    say(f"{len(changed)} of {len(now)} shards have another size or time of change than when they were indexed; reading them again")
    index = _build(files, key, now, before)
    problems = _differences(files, before, {name: index.part(name) for name in changed})
    raise_all(problems, "data set", remedy)
    return index


def changed_shards(files: ShardFiles, key: IndexKey, index: Index, names: Sequence[str]) -> list[str]:
    """A sentence for each shard whose bytes are not as they were indexed. Raises InputError with all that cannot be read."""
    parts = _read_all(files, key, names, sum(index.files[name].size for name in names))
    return _differences(files, index, dict(zip(names, parts)))


def _differences(files: ShardFiles, before: Index, now: Mapping[str, Part]) -> list[str]:
    """A sentence for each shard that has other images, labels or captions than an index."""
    problems = []
    for name, part in now.items():
        old, new = before.part(name).table, part.table
        if any(not _combined(old[column]).equals(_combined(new[column])) for column in (*_OF_IMAGES, "captions")):
            problems.append(f"shard {files.where(name)} has changed since it was indexed ({len(old)} images then, {len(new)} now)")
    return problems


def _read_all(files: ShardFiles, key: IndexKey, names: Sequence[str], total: int) -> list[Part]:
    """The rows of shards, read by several processes.

    Raises:
        InputError: names all shards that cannot be read.
        DebiasError: a process was killed.
    """
    work = partial(_read_one, files, key)
    processes = min(len(names), os.cpu_count() or 1)
    with contextlib.ExitStack() as opened:
        each: Callable[..., Any] = map
        if processes > 1 and total > SMALL:
            # Without a parent they would wait forever for work, and hold its lock, which they inherit.
            end = partial(stop_with_parent, os.getpid(), signal.SIGKILL)
            pool = opened.enter_context(ProcessPoolExecutor(processes, initializer=end))
            each = partial(pool.map, chunksize=-(-len(names) // (8 * processes)))  # of which each comes with all of `files`
        try:
            answers = list(tqdm(each(work, names), "indexing the shards", len(names), leave=False, delay=5))
        except BrokenProcessPool as error:
            raise DebiasError("a process that indexed the shards was killed, as where memory runs out; start again") from error
    raise_all([answer for answer in answers if isinstance(answer, str)], "data set")
    return answers


def _read_one(files: ShardFiles, key: IndexKey, name: str) -> Part | str:
    """The rows of a shard, or what is wrong with it."""
    try:
        with files.open(name) as file:
            read_rows = tar.read_rows if key.kind == "tar" else parquet.read_rows
            return read_rows(file, name, files.where(name), key.columns)
    except InputError as error:
        return str(error)


# ---- digests ---------------------------------------------------------------------------------------------------------


def _digests(table: pyarrow.Table, about: dict[str, Any]) -> dict[str, str]:
    """The hashes of what identifies the images, of their captions, and of where they are."""
    names = [name for name, *_ in about["files"]]
    of_all = json.dumps([names, about["units"], about["class_names"], about["whole_numbers"]]).encode()
    parts = {"sha256": (of_all, _OF_IMAGES), "captions_sha256": (b"", ("captions",)), "places_sha256": (b"", _PLACES)}
    found = {}
    for part, (start, columns) in parts.items():
        digest = hashlib.sha256(start)
        for column in columns:
            _update(digest, _array(table[column]))
        found[part] = digest.hexdigest()
    return found


def _update(digest: Any, array: pyarrow.Array) -> None:
    """Hashes the values of an array, whatever is in the unused bits of its buffers."""
    if array.null_count:
        digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)))
    if pyarrow.types.is_large_list(array.type):
        digest.update(np.diff(np.from_dlpack(array.offsets)))
        _update(digest, array.flatten())
    elif pyarrow.types.is_large_string(array.type):
        ends = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1, int)
        digest.update(np.diff(ends))
        if ends[-1] > ends[0]:
            digest.update(memoryview(array.buffers()[2])[ends[0] : ends[-1]])
    else:
        digest.update(np.ascontiguousarray(np.from_dlpack(array)))


def _array(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """A column of an index, which is in one piece."""
    return column.chunk(0)


def _combined(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    return pyarrow.concat_arrays(column.chunks)
