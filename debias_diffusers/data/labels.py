"""Class labels: the order of class names, class names to label indices, balanced and proportional lists of labels. No torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from ..errors import InputError

T = TypeVar("T")
MAX_CLASSES = 100_000
MAX_NAME = 20  # characters of a class name in a grid
WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")

# The order in which class names become labels: natural order; plain text order, as guided-diffusion and the first versions of
# this package have it; or the class names of a model.
ClassOrder = Sequence[str] | Literal["natural", "plain"]


def order_class_names(found: Iterable[str], empty: Iterable[str], order: ClassOrder, where: str) -> list[str]:
    """The names of all classes, by label.

    Args:
        found: classes with images.
        empty: classes without images; only the natural order includes them.
        order: of the labels.
        where: the source of the classes, for the error message.

    Raises:
        InputError: `found` has a class that the model does not have.
    """
    if order == "natural":
        return sorted({*found, *empty}, key=_natural)
    if order == "plain":
        return sorted(set(found))
    if unknown := sorted(set(found) - set(order), key=_natural):
        raise InputError(f"{where} has class {unknown[0]}, but the model has only {shortened_list(order)}")
    return list(order)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that compares numbers within names by value: 2 before 10, a2 before a10."""
    parts = re.split(r"([0-9]+)", name)
    digits = [part.lstrip("0") if k % 2 else part for k, part in enumerate(parts)]
    return [(len(part) if k % 2 else 0, part) for k, part in enumerate(digits)], name


def label_numbers(values: Iterable[Any], order: ClassOrder, where: str) -> tuple[list[str], dict[Any, int | None]]:
    """Class names, and the label of each value. Text is sorted by `order`; whole numbers are labels already."""
    known = {value for value in values if value is not None}
    if known and all(isinstance(value, str) for value in known):
        names = order_class_names(known, (), order, where)
        return names, {name: label for label, name in enumerate(names)}
    if max(known, default=-1) < 0 or max(known) >= MAX_CLASSES:  # a negative label is reported with its image
        raise InputError(f"{where} must hold classes from 0, fewer than {MAX_CLASSES}, but holds {list(known)[:5]}")
    names = [str(k) for k in range(max(known) + 1)] if isinstance(order, str) else list(order)
    if max(known) >= len(names):
        raise InputError(f"{where} has label {max(known)}, but the model has {len(names)} classes")
    return names, {value: value for value in known}


def renumbered(names: list[str], values: Iterable[Any], order: ClassOrder, where: str) -> tuple[list[str], dict[Any, int | None]]:
    """Class names in an order, and the label of each value, a number that counts in `names`; a value that is not there is its own label."""
    if isinstance(order, str) or names == list(order):
        return names, {}
    present = {value: names[value] for value in values if value is not None and 0 <= value < len(names)}
    ours = order_class_names(present.values(), (), order, where)
    return ours, {value: ours.index(name) for value, name in present.items()}


def label_indices(wanted: Sequence[int | str], names: Sequence[str] | None) -> list[int]:
    """Converts class names and numbers to label indices. A text that is a class name and also a number counts as the class name.

    Raises:
        InputError: there is no such class.
    """
    by_name = {name: label for label, name in enumerate(names or ())}
    found = []
    for label in wanted:
        if isinstance(label, str) and label not in by_name and not WHOLE_NUMBER.fullmatch(label):
            known = f"the model's classes are {shortened_list(names)}" if names else "the model knows its classes by numbers only"
            apart = f"; separate the values by spaces: {label.replace(',', ' ')}" if "," in label else ""
            raise InputError(f"class_labels has {label}, but {known}{apart}")
        found.append(by_name[label] if label in by_name else int(label) if isinstance(label, str) else label)
    return found


def ambiguous_labels(wanted: Sequence[int | str], names: Sequence[str] | None) -> list[str]:
    """One sentence for each text in `wanted` that is a class name and also the number of another class."""
    pairs = zip(wanted, label_indices(wanted, names))
    return [
        f"class_labels {label} is the class of that name, whose number is {number}"
        for label, number in dict(pairs).items()
        if isinstance(label, str) and WHOLE_NUMBER.fullmatch(label) and int(label) != number
    ]


def nonempty_classes(counts: Sequence[int]) -> list[int]:
    """The labels of classes with images; `counts` has the number of images by label."""
    return [label for label, count in enumerate(counts) if count]


def proportional_labels(counts: Sequence[int], num_images: int) -> list[int]:
    """Labels for images 0 .. num_images - 1, in proportion to `counts`. A shorter list is a prefix of a longer one.

    Uses the Sainte-Lague method: image j of a class with n images is sorted by (j + 1/2) / n. With sum(counts) images each class has
    exactly its own count.
    """
    if not (total := sum(counts)):
        return []
    last = (num_images + len(counts) / 2) / total  # at least num_images sort keys are smaller
    each = [np.arange(int(count * last) + 2) if count else np.arange(0) for count in counts]
    places = np.concatenate([(number + 0.5) / max(1, count) for number, count in zip(each, counts)])
    labels = np.repeat(np.arange(len(counts)), [len(number) for number in each])
    return list(map(int, labels[np.argsort(places, kind="stable")[:num_images]]))


def shortened_list(items: Iterable[object], max_items: int = 10) -> str:
    """The first items, separated by commas, and the number of further items."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:max_items]) + (f" and {len(texts) - max_items} more" if len(texts) > max_items else "")


def row_names(labels: Sequence[int], names: Sequence[str] | None) -> list[str]:
    """What a grid writes beside the images of each class: its name, or its number where the font, which is ASCII, lacks a letter."""
    decomposed = [unicodedata.normalize("NFKD", names[label]) if names else "" for label in labels]
    plain = ["".join(letter for letter in name if not unicodedata.combining(letter)) for name in decomposed]
    good = [name.isascii() and name.isprintable() and name.strip() for name in plain]
    return [name[:MAX_NAME] if ok else f"class {label}" for name, ok, label in zip(plain, good, labels)]


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> str:
    """Class names with their numbers of images; names the classes without images."""
    each = shortened_list(f"{name} {count}" for name, count in zip(names, counts))
    empty = [name for name, count in zip(names, counts) if not count]
    return f"{len(names)} classes ({each})" + (f", without images: {shortened_list(empty)}" if empty else "")


def to_config_mapping(values: Sequence[T] | None) -> dict[str, T] | None:
    """Values by label as a mapping from str(label), for model_index.json. (diffusers would take a list there for a component.)"""
    return None if values is None else {str(label): value for label, value in enumerate(values)}


def from_config_mapping(values: Any, classes: int, kind: type[T]) -> list[T] | None:
    """The inverse of `to_config_mapping`; None if it has another number of classes or values of another type."""
    keys = [str(label) for label in range(classes)]
    if not classes or not isinstance(values, Mapping) or set(keys) != set(values):
        return None
    found = [values[key] for key in keys]
    return found if all(type(value) is kind and (not isinstance(value, int) or value >= 0) for value in found) else None
