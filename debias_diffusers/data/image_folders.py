"""What a folder holds: which of its files are images, its splits, the classes of its images, and what is passed over."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, reason
from ..utils.files import read_file
from . import images
from .labels import WHOLE_NUMBER, shortened_list

SETTINGS = ".sampling.json"  # what the images of a folder were drawn with
PREVIEW = "preview"
GRID = f"{PREVIEW}/grid.png"
TRAJECTORY = f"{PREVIEW}/trajectory.png"
METADATA = "metadata.jsonl"
PACKED = "samples.npz"
PARTS = "parts"  # images on their way into PACKED

# Names of split folders, as the `datasets` library knows them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Listing:
    """Everything below a folder, by paths relative to it."""

    root: Path
    images: list[str] = field(default_factory=list)  # in the plain order of their paths
    folders: list[str] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # (path, why)

    def below(self, folder: str) -> Listing:
        """What is in one of its folders, still relative to this one; all for ""."""
        start = f"{folder}/" if folder else ""
        return Listing(
            self.root,
            [name for name in self.images if name.startswith(start)],
            [name for name in self.folders if name.startswith(start)],
            [(name, why) for name, why in self.passed_over if name.startswith(start)],
        )


def scan_folder(root: Path) -> Listing:
    """Looks at all files below a folder. Links are followed, hidden names are not looked at."""

    def refuse(error: OSError) -> None:
        raise InputError(f"dataset {root}: {error.filename} cannot be read: {error.strerror}")

    found, seen = Listing(root), set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        here = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        kept = []
        # Sorted: where two links lead to one folder, the same one is followed everywhere.
        for name in sorted(folders):
            if why := _hidden(Path(folder), name, names):
                found.passed_over.append((here + name, why))
            elif os.path.realpath(os.path.join(folder, name)) not in seen:
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
    """Why a folder is not looked at. Where `sample.py` has written, preview/ has pictures of all images."""
    if name.startswith(".") or name == "__MACOSX":
        return "hidden"
    if name == PARTS and SETTINGS in beside:
        return "part of samples"
    if name != PREVIEW:
        return None
    ours = {Path(GRID).name, Path(TRAJECTORY).name}
    if SETTINGS in beside or (METADATA in beside and set(os.listdir(parent / name)) <= ours):
        return "preview of samples"
    return None


def _no_image(path: Path) -> str | None:
    """Why a file is no image. One with the extension of an image is taken for it: if it is damaged, this is said when it is read."""
    if path.name.startswith("."):
        return "hidden"
    if path.suffix.lower() in images.EXTENSIONS or (path.is_file() and images.is_image(path)):
        return None
    return f"{path.suffix.lower() or 'without extension'} (no image)"


def select_split(found: Listing, wanted: str, default: str) -> tuple[str, list[str]]:
    """The folder of a split, and those of all splits; "" and none where the first-level folders are no splits.

    They are splits where all that hold images have names of splits, and one of them that of a training split.

    Raises:
        InputError: there is no such split.
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
    """The class of each image: its first-level folder, or what stands before the first "_" of its name where there are no such folders.

    Images beside class folders have no class.

    Raises:
        InputError: there are no class folders, and an image has no "_" in its name.
    """
    start = len(split) + 1 if split else 0
    inner = {name: name[start:] for name in found.images}
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
    """Names of the folders right below a split, with images or without."""
    start = len(split) + 1 if split else 0
    return [name[start:] for name in found.folders if len(name) > start and "/" not in name[start:]]


def read_metadata(root: Path, split: str, column: str | None) -> tuple[Path, dict[str, Any]] | None:
    """Labels by the path of an image, from metadata.jsonl or metadata.csv in the folder of the split or in the root.

    As `datasets` reads them: `file_name` is relative to the file. The labels are in `column`, or in `label` or `class`.

    Returns:
        The file and its labels; None where there is no such file, or none with labels.

    Raises:
        InputError: it cannot be read, lacks the column, or has two labels for one image.
    """
    for place in dict.fromkeys((split, "")):
        for path in (root / place / METADATA, root / place / "metadata.csv"):
            if not path.is_file():
                continue
            rows = _rows(path)
            columns = list(dict.fromkeys(str(name) for row in rows for name in row))
            if column and column not in columns:
                raise InputError(f"label_column is {column}, but {path} has only: {', '.join(columns)}")
            if label := column or next((name for name in ("label", "class") if name in columns), None):
                return path, _by_name(path, place, [(row["file_name"], row.get(label)) for row in rows])
    return None


def _by_name(path: Path, place: str, rows: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Labels by the path of an image, relative to the root, of the rows of a metadata file in the folder `place`."""
    found: dict[str, Any] = {}
    for name, label in rows:
        key = posixpath.normpath(posixpath.join(place, name))
        if found.setdefault(key, label) != label:
            raise InputError(f"{path} has two labels for {name}, {reprlib.repr(found[key])} and {reprlib.repr(label)}; keep one row")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = read_file(path).decode("utf-8-sig")
        lines = csv.DictReader(io.StringIO(text)) if path.suffix == ".csv" else map(json.loads, filter(str.strip, text.split("\n")))
        rows = list(lines)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    if not all(isinstance(row, dict) and isinstance(row.get("file_name"), str) for row in rows):
        raise InputError(f"{path} cannot be read: a row has no file_name")
    return rows


def packed_samples(path: Path) -> Path | None:
    """The one file in which a folder that `sample.py` wrote has its images, if it is there."""
    return path / PACKED if (path / SETTINGS).is_file() and (path / PACKED).is_file() else None


def count_by_reason(passed_over: Sequence[tuple[str, str]]) -> str:
    """What was passed over and why, with counts."""
    return shortened_list(f"{count} {why}" for why, count in Counter(why for _, why in passed_over).most_common())


def as_labels(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Labels as whole numbers where all of them are, else as text; those that are missing are None.

    Raises:
        InputError: a label is neither.
    """
    known = {name: value for name, value in values.items() if value is not None and value != ""}
    if wrong := [value for value in known.values() if isinstance(value, bool) or not isinstance(value, int | str)]:
        raise InputError(f"{where} has label {reprlib.repr(wrong[0])}, but labels must be whole numbers or text")
    whole = all(WHOLE_NUMBER.fullmatch(str(value)) for value in known.values())
    return {name: None if name not in known else int(known[name]) if whole else str(known[name]) for name in values}
