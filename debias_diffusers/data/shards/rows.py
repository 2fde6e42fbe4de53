"""The rows of an index: where each image of a shard is, its size and checksum, its label and captions. No torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow

from ...config.prompts import MAX_CHARACTERS, broken_text
from ...errors import InputError
from .. import images
from .files import Unit

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),  # names the image within its shard
        ("offset", pyarrow.int64()),  # of a tar file in bytes; in a row group of a parquet file the number of the row
        ("size", pyarrow.int64()),  # of the image file in bytes
        ("crc32", pyarrow.uint32()),  # of its bytes
        ("height", pyarrow.int32()),  # pixels as decoded; 0 where the header cannot be read
        ("width", pyarrow.int32()),
        ("label", pyarrow.large_string()),  # as it is written
        ("captions", pyarrow.large_list(pyarrow.large_string())),
    ]
)


class Part(NamedTuple):
    """The rows of one shard."""

    table: pyarrow.Table  # of `SCHEMA`
    units: list[Unit]
    without_image: int  # samples that are not rows


class Rows:
    """The rows of a shard, in the making."""

    def __init__(self, where: str) -> None:
        """`where`: the shard for messages."""
        self.where = where
        self.labels: list[str | None] = []
        self.captions: list[list[str]] = []
        self._columns: dict[str, list[object]] = {name: [] for name in ("key", "offset", "size", "crc32", "height", "width")}

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, key: str, offset: int, content: bytes, label: str | None, captions: Iterable[str | None]) -> None:
        """Adds an image by the bytes of its file.

        Raises:
            InputError: a label or caption is not Unicode, or too long.
        """
        texts = [text.strip() for text in captions if text and text.strip()]
        _require_texts(texts if label is None else [label, *texts], f"{self.where}:{key}")
        try:
            height, width = images.size_of(content, key)
        except InputError:  # which is told when the image is decoded
            height, width = 0, 0
        for column, value in zip(self._columns.values(), (key, offset, len(content), zlib.crc32(content), height, width)):
            column.append(value)
        self.labels.append(label)
        self.captions.append(texts)

    def part(self, units: list[Unit], without_image: int = 0) -> Part:
        """The rows as a table."""
        table = pyarrow.table({**self._columns, "label": self.labels, "captions": self.captions}, schema=SCHEMA)
        return Part(table, units, without_image)


def _require_texts(texts: Sequence[str], where: str) -> None:
    for text in texts:
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"a text of image {where} has {len(text)} characters, {text[:40]!r}..., but at most {MAX_CHARACTERS} are read")
    if (broken := broken_text(texts)) is not None:
        raise InputError(f"text {broken!r:.80} of image {where} is not Unicode; write it anew")
