"""Captions of images: of a column, of a metadata file, or of a text file beside each image. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..config.prompts import MAX_CHARACTERS, broken_text
from ..config.schema.data import DIGITS
from ..errors import InputError
from ..utils.files import read_file
from . import image_folders
from .shards.source import IndexedCaptions, LazyCaptions, ShardedSource
from .shards.table_columns import COLUMNS, NoCaptionsError, caption_column
from .sources.base import Source
from .sources.folder import ImageFolder
from .sources.subset import SourceSubset
from .sources.table import ImageTable

Captions = Sequence[tuple[str, ...]]  # by image; () where it has none

MANY, SAMPLE = 100_000, 1000  # different captions of which only a sample is counted, and how many it has
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = ("a handwritten {}", "the digit {}", "a handwritten digit {}")


class CaptionedSource:
    """A source whose images have captions, which belong to its fingerprint: a run whose captions have changed is another run."""

    def __init__(self, source: Source, column: str | None) -> None:
        """Reads the captions; arguments and errors as of `read_captions`."""
        self.source, self.captions = source, read_captions(source, column)
        self.class_names, self.split, self.passed_over = source.class_names, source.split, source.passed_over

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int, str]:
        return self.source.read(index)

    def labels(self) -> Sequence[int | None]:
        return self.source.labels()

    def unused_labels(self) -> str | None:
        return None

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | {"captions": captions_digest(self.captions)}

    def shards(self) -> np.ndarray | None:
        return self.source.shards()

    def sizes(self) -> np.ndarray | None:
        return self.source.sizes()

    def files(self) -> list[str] | None:
        return None  # where the captions are is not known, and what is derived from them must not be taken for unchanged


def captions_digest(captions: Captions) -> str:
    """A hash of what `read_captions` returns."""
    if isinstance(captions, IndexedCaptions):
        return captions.rows.captions_sha256
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def captions_of(source: Source) -> Captions:
    """The captions of every image of a `CaptionedSource`, or of some of its images."""
    if isinstance(source, SourceSubset):
        every = captions_of(source.source)
        return SubsetCaptions(every, source.indices) if isinstance(every, LazyCaptions) else [every[index] for index in source.indices]
    assert isinstance(source, CaptionedSource)
    return source.captions


def read_captions(source: Source, column: str | None) -> Captions:
    """The captions of every image of a source, without surrounding white space; empty ones are none.

    The embedded digits have three each, with the name of the digit.

    Args:
        source: of images.
        column: of the captions; if None, the first of `COLUMNS` that there is, else the only column of texts. In a folder whose metadata
            file has none of `COLUMNS`, the lines of `NAME.txt` beside `NAME.png` come before another column of texts.

    Raises:
        NoCaptionsError: there are none.
        InputError: the column holds something else, or a file of captions cannot be read.
    """
    if isinstance(source, ShardedSource):
        return _of_shards(source, column)
    found = [tuple(text.strip() for text in each if text.strip()) for each in _texts(source, column)]
    if not any(found):
        where = "put NAME.txt beside NAME.png, or metadata.jsonl with file_name and text into the folder, or " * isinstance(
            source, ImageFolder
        )
        raise NoCaptionsError(f"none of {len(found)} images has a caption; {where}name their column with --caption_column")
    if (longest := max((text for each in found for text in each), key=len, default="")) and len(longest) > MAX_CHARACTERS:
        raise InputError(f"a caption has {len(longest)} characters, {longest[:40]!r}..., but at most {MAX_CHARACTERS} are read; shorten it")
    if (broken := broken_text(text for each in found for text in each)) is not None:
        raise InputError(f"caption {broken!r} is not Unicode; write it anew")
    return found


class SubsetCaptions(LazyCaptions):
    """Those of some images."""

    def __init__(self, every: LazyCaptions, indices: Sequence[int]) -> None:
        self.every, self.indices = every, indices

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> tuple[str, ...]:
        return self.every[self.indices[index]]

    def array(self) -> Any:
        return self.every.array().take(np.asarray(self.indices))


def _of_shards(source: ShardedSource, column: str | None) -> Captions:
    """The captions of an index, which were looked at when it was built."""
    captions = source.captions(column)
    if not len(captions.array().flatten()):
        raise NoCaptionsError(f"none of {len(captions)} images has a caption; name their member, field or column with --caption_column")
    return captions


class Texts(Sequence[str]):
    """An Arrow array of texts, of which each is made a `str` when it is read."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return list(self.array[index].to_pylist()) if isinstance(index, slice) else str(self.array[index])

    def __iter__(self) -> Iterator[str]:
        return iter(self.array.to_pylist())


def different_captions(captions: Captions) -> Sequence[str]:
    """All different captions, sorted."""
    if isinstance(captions, LazyCaptions):
        return Texts(captions.array().flatten().unique().sort())
    return sorted({caption for each in captions for caption in each})


def caption_counts(captions: Captions) -> np.ndarray:
    """How many captions each image has (N,)."""
    if isinstance(captions, LazyCaptions):
        return np.diff(np.from_dlpack(captions.array().offsets))
    return np.fromiter(map(len, captions), np.int64, len(captions))


def first_captions(captions: Captions, count: int) -> list[str]:
    """The first captions of images, so many different ones."""
    found = dict[str, None]()
    for each in captions:
        if each and len(found) < count:
            found[each[0]] = None
        elif len(found) == count:
            break
    return list(found)


def require_captions(trained: Source) -> None:
    """Raises InputError where none of the images that are trained has a caption."""
    if not any(captions_of(trained)):
        raise InputError(f"none of the {len(trained)} images that are trained has a caption; hold out others, or repeat them")


def _texts(source: Source, column: str | None) -> Sequence[Sequence[str]]:
    if isinstance(source, ImageFolder):
        return _of_folder(source, column)
    assert isinstance(source, ImageTable)
    if source.name == DIGITS:
        if column is not None:
            raise InputError(f"caption_column is {column}, but the digits have the captions of the package; leave it out")
        return [[text.format(DIGIT_NAMES[digit]) for text in DIGIT_CAPTIONS] for digit in source.columns["label"]]
    return _of_table(source, column)


def _of_table(source: ImageTable, column: str | None) -> Sequence[Sequence[str]]:
    found = caption_column(source.columns.features, column, source.name)
    return [_as_list(value) for value in source.columns[found]]


def _as_list(value: Any) -> list[str]:
    """One text, several, or none."""
    return [] if value is None else [value] if isinstance(value, str) else [text for text in value if text is not None]


def _of_folder(source: ImageFolder, column: str | None) -> Sequence[Sequence[str]]:
    given = image_folders.read_metadata(source.root, source.split_folder, column, COLUMNS, "caption_column")
    if given is None:
        beside = [_beside(source.root / name) for name in source.names]
        column = None if any(beside) else image_folders.only_text_column(source.root, source.split_folder)
        if column is None:
            read = {_text_file(name) for name in source.names}
            source.passed_over = [(name, why) for name, why in source.passed_over if name not in read]
            return beside
        return _of_folder(source, column)
    path, rows = given
    rows, without_image = image_folders.rows_of_split(path, rows, source.root, source.names, source.split_folder)
    others = [(name, why) for name, why in source.passed_over if source.root / name != path]
    source.passed_over = [*dict.fromkeys(others + without_image)]  # rows that the labels passed over already count once
    return [_checked(rows.get(name), path, name) for name in source.names]


def _checked(value: Any, path: Path, name: str) -> list[str]:
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    if wrong := [each for each in values if not isinstance(each, str)]:
        raise InputError(f"{path} has caption {wrong[0]!r} for {name}, but captions must be texts")
    return values


def _text_file(image: str | Path) -> str:
    """The name of the text file beside an image."""
    return Path(image).with_suffix(".txt").as_posix()


def _beside(image: Path) -> list[str]:
    """The lines of the text file beside an image, one caption each."""
    path = Path(_text_file(image))
    if not path.is_file():
        return []
    try:
        return read_file(path).decode("utf-8-sig").split("\n")  # not splitlines(), which also ends lines at signs within a text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error


def counted_captions(different: Sequence[str]) -> Sequence[str]:
    """Those whose tokens are counted before a training: all, or of many a sample."""
    if len(different) <= MANY:
        return different
    from ..utils import seeding  # which needs torch

    return [different[k] for k in seeding.subset(0, len(different), SAMPLE)]


def summary(captions: Captions, tokens: Mapping[str, int], most: int, different: int | None = None) -> str:
    """A line for the user: how many captions there are, how many images have none, and how many tokens are cut.

    Args:
        captions: of all images.
        tokens: the number of tokens of each caption, without those that begin and end a text; or of a sample of them.
        most: tokens of a caption that the text encoders read.
        different: the number of different captions, where `tokens` are those of a sample.
    """
    different = different or len(tokens)
    without = int((caption_counts(captions) == 0).sum())
    long = {text: count - most for text, count in tokens.items() if count > most}
    parts = [f"{different} different captions of {len(captions) - without} images"]
    if without:
        parts.append(f'{without} images without one, which learn "no caption"')
    if long:
        worst = max(long, key=lambda text: long[text])
        of = f" of a sample of {len(tokens)}" if len(tokens) < different else ""
        cut = f"{len(long)}{of} have more than {most} tokens, of which {sum(long.values())} are cut ({long[worst]} of {worst[:40]!r}...)"
        parts.append(f"{cut}; --caption_chunks {-(-(most + long[worst]) // most)} reads all")
    return "captions: " + "; ".join(parts)
