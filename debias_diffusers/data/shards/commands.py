"""The commands `make`, `index` and `verify` of `python -m debias_diffusers.shards`. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ...config.schema.data import EMBEDDED, DataConfig, ShardsConfig, ShardsMakeConfig
from ...errors import InputError, raise_all
from ...utils.console import say
from ...utils.files import LOCK, acquire_lock, atomic_write, new_folder, read_json, remove, remove_temporary_files, write_file
from .. import images
from ..captions import Captions, captions_digest, read_captions
from ..sources.base import Source
from ..sources.checks import unreadable_images
from ..sources.opening import open_source
from ..sources.summary import summary
from . import tar
from .files import LocalFiles
from .source import CLASSES, ShardedSource
from .table_columns import NoCaptionsError

RECORD = "made_from.json"  # beside the shards: what they were made of
FORMAT = 1  # to be raised with every change of the bytes that `make` writes


def make(config: ShardsMakeConfig) -> None:
    """Writes the images of a data set, with labels and captions where it has them, as shards with an index.

    The same data give the same bytes. A command that was killed goes on after the last whole shard.

    Raises:
        InputError: the data cannot be read, or `out` has something else.
        CannotWriteError: a shard cannot be written; those before it stay.
    """
    source, captions = _with_labels_and_captions(config)
    out = Path(config.out)
    record = {"format": FORMAT, "shard_mb": config.shard_mb, **_made_from(source, captions)}
    before = read_json(out / RECORD)
    if before is None:
        new_folder(config.out)
    elif before != json.loads(json.dumps(record)):
        raise InputError(f"{out} has shards of other images, labels or captions, or of another size; name another folder")
    with acquire_lock(out):
        remove_temporary_files(out)
        write_file(out / RECORD, json.dumps(record).encode())
        if source.class_names:
            write_file(out / CLASSES, json.dumps(source.class_names).encode())
        shards = _write_shards(out, source, captions, config.shard_mb * 10**6)
        name = f"./{out}" if str(out) in EMBEDDED else str(out)
        made = open_source(DataConfig(dataset=name))
        remove(out / LOCK)
    labels = f", labels of {len(source.class_names)} classes" if source.class_names else ""
    what = f"{len(made)} images{labels}{', captions' if captions else ''}"
    say(f"{what} are in {shards} {'shards' if shards > 1 else 'shard'} in {out}; train with --dataset {shlex.quote(name)}")


def _made_from(source: Source, captions: Captions | None) -> dict[str, object]:
    """Identifies all that shards have of their data: the fingerprint of a folder says nothing of what its metadata and text files hold."""
    labels = json.dumps([source.class_names, list(source.labels())]) if source.class_names else ""
    return {
        "data": source.fingerprint(),
        "labels": hashlib.sha256(labels.encode()).hexdigest(),
        "captions": None if captions is None else captions_digest(captions),
    }


def _with_labels_and_captions(config: ShardsMakeConfig) -> tuple[Source, Captions | None]:
    """The data with labels and captions where they have some; both must be there where their column is named."""
    data = _data_config(config)
    labelled = dataclasses.replace(data, class_conditional=True)
    source = open_source(data if config.label_column is None else labelled)
    if source.unused_labels():
        source = open_source(labelled)
    captions = None
    try:
        captions = read_captions(source, config.caption_column)  # with labels the source leaves images out, which have captions, too
    except NoCaptionsError:
        if config.caption_column is not None:
            raise
    for sentence in summary(source, config.data):
        say(sentence)
    return source, captions


def _write_shards(out: Path, source: Source, captions: Captions | None, max_bytes: int) -> int:
    """Writes the shards that are missing; returns the number of all."""
    number, first = 0, 0
    while (path := _path(out, number)).exists():
        first += _count(path)
        number += 1
    with tqdm(total=len(source), initial=first, desc="writing the shards", delay=5, leave=False) as progress:
        while first < len(source):
            with atomic_write(_path(out, number)) as file:
                count = _fill(file, source, captions, first, max_bytes)
            first, number = first + count, number + 1
            progress.update(count)
    return number


def _path(out: Path, number: int) -> Path:
    return out / f"{number:06d}.tar"


def _count(path: Path) -> int:
    files = LocalFiles([path])
    with files.open(path.name) as file:
        return len(tar.samples(file, str(path)))


def _fill(shard: IO[bytes], source: Source, captions: Captions | None, first: int, max_bytes: int) -> int:
    """Writes a shard with the images from `first` on, one at least, as many as fit; returns how many."""
    with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(first, len(source)):
            members = list(_members(source, captions, index))
            end = archive.offset + sum(tar.BLOCK + _padded(len(content), tar.BLOCK) for _, content in members)
            if index > first and _padded(end + 2 * tar.BLOCK, tarfile.RECORDSIZE) > max_bytes:
                return index - first
            for name, content in members:
                member = tarfile.TarInfo(f"{index:09d}.{name}")  # of no time and no owner
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return len(source) - first


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _members(source: Source, captions: Captions | None, index: int) -> Iterator[tuple[str, bytes]]:
    """The rest of the name and the bytes of each member of an image."""
    content, label, where = source.read(index)
    yield images.extension_of(content, where), content
    if source.class_names:
        yield "cls", str(label).encode()
    texts: Sequence[str] = captions[index] if captions else ()
    if any("\n" in text for text in texts):  # a text file has a caption a line
        yield "json", json.dumps({"text": list(texts)}).encode()
    elif texts:
        yield "txt", "\n".join(texts).encode()


def index(config: ShardsConfig) -> None:
    """Indexes shards as they are, whatever an index says.

    Raises:
        InputError: the data are no shards, or a shard cannot be read; names all of them.
    """
    source = _shards(config, renew=True)
    for sentence in summary(source, config.data):
        say(sentence)
    say(f"index of {len(source.shard_files.names)} shards: {source.index.path}")


def verify(config: ShardsConfig) -> None:
    """Reads all shards, compares them with their index, and decodes every image.

    Raises:
        InputError: names all shards that have changed and all images that cannot be read.
    """
    from .index import changed_shards

    source = _shards(config)
    raise_all(changed_shards(source.shard_files, source.key, source.index, source.shard_files.names), f"data {config.data}")
    bad = unreadable_images(source, range(len(source)))
    raise_all(bad.values(), f"data {config.data}: {len(bad)} of {len(source)} images cannot be read")
    say(f"{len(source)} images in {len(source.shard_files.names)} shards are as they were indexed, and can be decoded")


def _shards(config: ShardsConfig, renew: bool = False) -> ShardedSource:
    source = open_source(dataclasses.replace(_data_config(config), shuffle_window=1), renew=renew)
    if not isinstance(source, ShardedSource):
        raise InputError(f"{config.data} has neither .tar nor .parquet files; python -m debias_diffusers.shards make makes shards of it")
    if config.caption_column is not None:
        source.captions(config.caption_column)
    return source


def _data_config(config: ShardsConfig | ShardsMakeConfig) -> DataConfig:
    return DataConfig(dataset=config.data, split=config.split, image_column=config.image_column, label_column=config.label_column)
