"""Captions of images: of a column, of a metadata file, or of a text file beside each image. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.prompts import broken_text
from ..config.schema import DIGITS
from ..errors import InputError
from ..utils.files import read_file
from . import image_folders
from .sources import ImageFolder, ImageTable, Source, SourceSubset

Captions = Sequence[tuple[str, ...]]  # by image; () where it has none

COLUMNS = ("text", "caption", "prompt")  # in this order, where no column is named
MOST_CHARACTERS = 100_000  # of a caption: a text encoder reads some hundred, and millions take minutes to split into tokens
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
        digest = hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()
        return self.source.fingerprint() | {"captions": digest}

    def files(self) -> list[str] | None:
        return None  # where the captions are is not known, and what is derived from them must not be taken for unchanged


def captions_of(source: Source) -> Captions:
    """The captions of every image of a `CaptionedSource`, or of some of its images."""
    if isinstance(source, SourceSubset):
        every = captions_of(source.source)
        return [every[index] for index in source.indices]
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
        InputError: there are no captions, or the column holds something else.
    """
    found = [tuple(text.strip() for text in each if text.strip()) for each in _texts(source, column)]
    if not any(found):
        where = "put NAME.txt beside NAME.png, or metadata.jsonl with file_name and text into the folder, or " * isinstance(
            source, ImageFolder
        )
        raise InputError(f"none of {len(found)} images has a caption; {where}name their column with --caption_column")
    if (longest := max((text for each in found for text in each), key=len, default="")) and len(longest) > MOST_CHARACTERS:
        raise InputError(
            f"a caption has {len(longest)} characters, {longest[:40]!r}..., but at most {MOST_CHARACTERS} are read; shorten it"
        )
    if (broken := broken_text(text for each in found for text in each)) is not None:
        raise InputError(f"caption {broken!r} is not Unicode; write it anew")
    return found


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
    import datasets

    table = source.columns
    if column is None:
        kinds = {name: getattr(feature, "dtype", None) for name, feature in table.features.items()}
        texts = [name for name, dtype in kinds.items() if dtype in ("string", "large_string")]
        usual = [name for name in COLUMNS if name in table.column_names]
        if not usual and len(texts) != 1:
            which = (
                f"several columns of texts: {', '.join(texts)}" if texts else f"no column of texts among {', '.join(table.column_names)}"
            )
            raise InputError(f"dataset {source.name} has {which}; name that of the captions with --caption_column")
        column = (usual or texts)[0]
    if column not in table.column_names:
        raise InputError(f"caption_column is {column}, but dataset {source.name} has only: {', '.join(table.column_names)}")
    feature = table.features[column]
    inner = getattr(feature, "feature", feature if not isinstance(feature, list) else feature[0])  # of a list of texts
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        raise InputError(f"caption_column {column} of dataset {source.name} holds {feature} and no texts; name another")
    return [_as_list(value) for value in table[column]]


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


def summary(captions: Captions, tokens: Mapping[str, int], most: int) -> str:
    """A line for the user: how many captions there are, how many images have none, and how many tokens are cut.

    Args:
        captions: of all images.
        tokens: the number of tokens of each caption, without those that begin and end a text.
        most: tokens of a caption that the text encoders read.
    """
    without = sum(not each for each in captions)
    long = {text: count - most for text, count in tokens.items() if count > most}
    parts = [f"{len(tokens)} different captions of {len(captions) - without} images"]
    if without:
        parts.append(f'{without} images without one, which learn "no caption"')
    if long:
        worst = max(long, key=lambda text: long[text])
        cut = f"{len(long)} have more than {most} tokens, of which {sum(long.values())} are cut ({long[worst]} of {worst[:40]!r}...)"
        parts.append(f"{cut}; --caption_chunks {-(-(most + long[worst]) // most)} reads all")
    return "captions: " + "; ".join(parts)
