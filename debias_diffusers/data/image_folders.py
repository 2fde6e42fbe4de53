"""Scans a folder of images: which files are images, its splits, its classes, metadata files, and the files that are ignored."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, reason
from ..utils.files import read_file
from . import images
from .labels import WHOLE_NUMBER, shortened_list

SETTINGS = ".sampling.json"  # settings with which the images of a folder were sampled
PREVIEW = "preview"
GRID = f"{PREVIEW}/grid.png"
TRAJECTORY = f"{PREVIEW}/trajectory.png"
METADATA = "metadata.jsonl"
HIDDEN = "hidden"  # why files whose names begin with a dot are ignored
READ_ALREADY = "link to a folder that is read already"
LABELS = ("label", "class")  # columns of metadata files that are labels
PACKED = "samples.npz"
PARTS = "parts"  # images that are not yet in PACKED

# Names of split folders, as the `datasets` library knows them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Listing:
    """The files below a folder, as paths relative to it."""

    root: Path
    images: list[str] = field(default_factory=list)  # sorted by path
    folders: list[str] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # ignored files: (path, reason)

    def below(self, folder: str) -> Listing:
        """The files of a sub-folder, as paths still relative to this folder; all files for ""."""
        start = f"{folder}/" if folder else ""
        return Listing(
            self.root,
            [name for name in self.images if name.startswith(start)],
            [name for name in self.folders if name.startswith(start)],
            [(name, why) for name, why in self.passed_over if name.startswith(start)],
        )


def scan_folder(root: Path) -> Listing:
    """Lists all files below a folder. Follows links and ignores hidden names."""

    def refuse(error: OSError) -> None:
        raise InputError(f"dataset {root}: {error.filename} cannot be read: {error.strerror}")

    found, seen = Listing(root), set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        here = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        kept = []
        # Sorted: if two links lead to one folder, the same link is followed on every file system.
        for name in sorted(folders):
            if why := _hidden(Path(folder), name, names):
                found.passed_over.append((here + name, why))
            elif os.path.realpath(os.path.join(folder, name)) in seen:
                found.passed_over.append((here + name, READ_ALREADY))
            else:
                kept.append(name)
        folders[:] = kept
        found.folders += [here + name for name in kept]
        for name in names:
            if why := _no_image(Path(folder, name)):
                found.passed_over.append((here + name, why))
            else:
                found.images.append(here + name)
    found.images.sort()
    return found


def _hidden(parent: Path, name: str, beside: Sequence[str]) -> str | None:
    """Why a folder is ignored; None if it is not. Folders that `sample.py` wrote have grids of their images in preview/."""
    if name.startswith(".") or name == "__MACOSX":
        return HIDDEN
    if name == PARTS and SETTINGS in beside:
        return "part of samples"
    if name != PREVIEW:
        return None
    ours = {Path(GRID).name, Path(TRAJECTORY).name}
    if SETTINGS in beside or (METADATA in beside and set(os.listdir(parent / name)) <= ours):
        return "preview of samples"
    return None


def _no_image(path: Path) -> str | None:
    """Why a file is not an image; None if it is one. The extension of an image suffices: a damaged image is reported when it is read."""
    if path.name.startswith("."):
        return HIDDEN
    if path.suffix.lower() in images.EXTENSIONS or (path.is_file() and images.is_image(path)):
        return None
    return f"{path.suffix.lower() or 'without extension'} (no image)"


def select_split(found: Listing, wanted: str, default: str) -> tuple[str, list[str]]:
    """The folder of the wanted split, and the folders of all splits; "" and [] if the first-level folders are not splits.

    They are splits if all first-level folders with images have names of splits, and one of them is a training split.

    Raises:
        InputError: the wanted split does not exist.
    """
    first = sorted({name.split("/")[0] for name in found.images if "/" in name})
    others = [name for name in first if _split_of(name) is None]
    if not others and any(_split_of(name) == "train" for name in first):
        same = [name for name in first if name == wanted] or [name for name in first if _split_of(name) == (_split_of(wanted) or wanted)]
        if len(same) != 1:
            raise InputError(f"split is {wanted}, but dataset {found.root} has the splits {', '.join(first)}; name one of them")
        return same[0], first
    if wanted != default:
        why = f" (its folder {others[0]} is no split)" if others else " (its folders are no splits: none is named train)" if first else ""
        raise InputError(f"split is {wanted}, but dataset {found.root} is a folder of images{why}; leave split out")
    return "", []


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def classes_of(found: Listing, split: str) -> dict[str, str]:
    """The class of each image by its path: its first-level folder, or, without such folders, the part of its name before the first "_".

    Images beside class folders have no class and are left out.

    Raises:
        InputError: there are no class folders, and an image has no "_" in its name.
    """
    inner = {name: name.removeprefix(f"{split}/") for name in found.images}
    if any("/" in rest for rest in inner.values()):
        return {name: rest.split("/")[0] for name, rest in inner.items() if "/" in rest}
    for name, rest in inner.items():
        if "_" not in rest:
            raise InputError(
                f"image {found.root / name} has no label; put it in a sub-folder named after its class, "
                f"name it CLASS_{rest}, or leave --class_conditional out"
            )
    return {name: rest.split("_")[0] for name, rest in inner.items()}


def class_folders(found: Listing, split: str) -> list[str]:
    """Names of the first-level folders of a split, with or without images."""
    inner = (name.removeprefix(f"{split}/") for name in found.folders)
    return [name for name in inner if "/" not in name]


def read_metadata(
    root: Path, split: str, column: str | None, usual: Sequence[str] = LABELS, field: str = "label_column"
) -> tuple[Path, dict[str, Any]] | None:
    """Values by the path of an image, from metadata.jsonl or metadata.csv in the folder of the split or in the root.

    The format is that of the `datasets` library: `file_name` is relative to the metadata file.

    Args:
        root: the folder of images.
        split: the folder of the split; "" where there are none.
        column: of the values; if None, the first of `usual` that there is.
        usual: names of columns.
        field: the flag that names the column, for messages.

    Returns:
        The metadata file and its values; None if there is no metadata file with one of the usual columns.

    Raises:
        InputError: it cannot be read, lacks the column, or has two values for one image; or there is no metadata file with the column.
    """
    for place, path in _metadata_files(root, split):
        rows = _rows(path)
        columns = _columns(rows)
        if column and column not in columns:
            raise InputError(f"{field} is {column}, but {path} has only: {', '.join(columns)}")
        if found := column or next((name for name in usual if name in columns), None):
            return path, _by_name(path, place, [(row["file_name"], row.get(found)) for row in rows], field.split("_")[0])
    if column:
        raise InputError(f"{field} is {column}, but dataset {root} is a folder of images without a metadata file; leave {field} out")
    return None


def only_text_column(root: Path, split: str) -> str | None:
    """The column of texts of the first metadata file, if it has one beside labels; arguments as of `read_metadata`."""
    for _, path in _metadata_files(root, split):
        rows = _rows(path)
        texts = [name for name in _columns(rows) if name not in ("file_name", *LABELS) and all(_is_text(row.get(name)) for row in rows)]
        return texts[0] if len(texts) == 1 else None
    return None


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _metadata_files(root: Path, split: str) -> list[tuple[str, Path]]:
    """The metadata files that there are, each with the folder that its paths are relative to: "" is the root."""
    places = [(place, root / place / name) for place in dict.fromkeys((split, "")) for name in (METADATA, "metadata.csv")]
    return [(place, path) for place, path in places if path.is_file()]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _by_name(path: Path, place: str, rows: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    """Values by the path of an image relative to the root, from (file_name, value) rows of a metadata file in the folder `place`."""
    found: dict[str, Any] = {}
    for name, value in rows:
        key = posixpath.normpath(posixpath.join(place, name))
        if found.setdefault(key, value) != value:
            raise InputError(f"{path} has two {what}s for {name}, {reprlib.repr(found[key])} and {reprlib.repr(value)}; keep one row")
    return found


def rows_of_split(
    path: Path, rows: Mapping[str, Any], root: Path, images: Collection[str], split: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The rows of a split, and those of them that have no image, as ignored files; other arguments as of `read_metadata`.

    Raises:
        InputError: none has an image.
    """
    found = {name: value for name, value in rows.items() if name.startswith(f"{split}/" if split else "")}
    there = set(images)
    if there.isdisjoint(found):
        raise InputError(f"{path} has no row for any image of dataset {root}; its file_name must be a path relative to {path.parent}")
    return found, [(name, f"in {path.name} without an image") for name in found if name not in there]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_file(path).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text)) if path.suffix == ".csv" else map(json.loads, filter(str.strip, text.split("\n")))
        rows: list[dict[Any, Any]] = list(lines)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    if not all(isinstance(row, dict) and isinstance(row.get("file_name"), str) for row in rows):
        raise InputError(f"{path} cannot be read: a row has no file_name")
    for row in rows:
        if any(row.pop(None, ())):  # where the module csv puts what is beyond the columns: the end of a text
            raise InputError(f"{path} has more values for {row['file_name']} than columns; put texts with commas into quotes")
    return rows


def packed_samples(path: Path) -> Path | None:
    """The `.npz` file of a folder that `sample.py` wrote with --format npz; None if there is none."""
    return path / PACKED if (path / SETTINGS).is_file() and (path / PACKED).is_file() else None


def count_by_reason(passed_over: Sequence[tuple[str, str]]) -> str:
    """The number of ignored files for each reason, such as "3 hidden, 2 .txt (no image)"."""
    return shortened_list(f"{count} {why}" for why, count in Counter(why for _, why in passed_over).most_common())


def as_labels(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Converts labels to int if all are whole numbers, else to str. Missing labels become None.

    Raises:
        InputError: a label is neither a whole number nor text.
    """
    known = {name: value for name, value in values.items() if value is not None and value != ""}
    if wrong := [value for value in known.values() if isinstance(value, bool) or not isinstance(value, int | str)]:
        raise InputError(f"{where} has label {reprlib.repr(wrong[0])}, but labels must be whole numbers or text")
    whole = all(WHOLE_NUMBER.fullmatch(str(value)) for value in known.values())
    return {name: None if name not in known else int(known[name]) if whole else str(known[name]) for name in values}
