"""Class labels: the order of class names, names to numbers, and which labels are drawn in turn. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from ..errors import InputError

T = TypeVar("T")
WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")

# How class names become labels: in natural order; in the plain order of text, as before names were written down and as
# guided-diffusion has them; or as a model has them.
ClassOrder = Sequence[str] | Literal["natural", "plain"]


def order_class_names(found: Iterable[str], empty: Iterable[str], order: ClassOrder, where: str) -> list[str]:
    """Names of all classes in the order of their labels.

    Args:
        found: classes that have images.
        empty: classes that have none; the plain order and that of a model leave them out.
        order: of the labels.
        where: what holds the classes, for the message.

    Raises:
        InputError: a model does not have a class that is found.
    """
    if order == "natural":
        return sorted({*found, *empty}, key=_natural)
    if order == "plain":
        return sorted(set(found))
    if unknown := sorted(set(found) - set(order), key=_natural):
        raise InputError(f"{where} has class {unknown[0]}, but the model has only {shortened_list(order)}")
    return list(order)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Numbers within names by their value: 2 before 10, a2 before a10."""
    parts = re.split(r"([0-9]+)", name)
    digits = [part.lstrip("0") if k % 2 else part for k, part in enumerate(parts)]
    return [(len(part) if k % 2 else 0, part) for k, part in enumerate(digits)], name


def label_indices(wanted: Sequence[int | str], names: Sequence[str] | None) -> list[int]:
    """Labels that are given as numbers or as class names. Text that is both the name of one class and the number of another is the name.

    Raises:
        InputError: there is no such class.
    """
    by_name = {name: label for label, name in enumerate(names or ())}
    found = []
    for label in wanted:
        if isinstance(label, str) and label not in by_name and not WHOLE_NUMBER.fullmatch(label):
            known = f"the model's classes are {shortened_list(names)}" if names else "the model knows its classes by numbers only"
            raise InputError(f"class_labels has {label}, but {known}")
        found.append(by_name[label] if label in by_name else int(label))
    return found


def ambiguous_labels(wanted: Sequence[int | str], names: Sequence[str] | None) -> list[str]:
    """A sentence for each number among the names of classes that is not the number of that class."""
    pairs = zip(wanted, label_indices(wanted, names))
    return [
        f"class_labels {label} is the class of that name, whose number is {number}"
        for label, number in dict(pairs).items()
        if isinstance(label, str) and WHOLE_NUMBER.fullmatch(label) and int(label) != number
    ]


def nonempty_classes(counts: Sequence[int]) -> list[int]:
    """Labels of the classes that have images, where `counts` has the images of each."""
    return [label for label, count in enumerate(counts) if count]


def proportional_labels(counts: Sequence[int], num_images: int) -> list[int]:
    """Labels of images 0 .. num_images - 1 such that each class has its share of them; a longer list begins with a shorter one.

    By the method of Sainte-Lague: image j of a class with n images stands at (j + 1/2) / n. With as many images as there are in all,
    each class has exactly its own number.
    """
    if not (total := sum(counts)):
        return []
    last = (num_images + len(counts) / 2) / total  # before it stand enough
    each = [np.arange(int(count * last) + 2) if count else np.arange(0) for count in counts]
    places = np.concatenate([(number + 0.5) / max(1, count) for number, count in zip(each, counts)])
    labels = np.repeat(np.arange(len(counts)), [len(number) for number in each])
    return list(map(int, labels[np.argsort(places, kind="stable")[:num_images]]))


def shortened_list(items: Iterable[object], most: int = 10) -> str:
    """The first items apart by commas, and how many there are more."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> str:
    """Classes with their numbers of images; those without are named."""
    each = shortened_list(f"{name} {count}" for name, count in zip(names, counts))
    empty = [name for name, count in zip(names, counts) if not count]
    return f"{len(names)} classes ({each})" + (f", without images: {shortened_list(empty)}" if empty else "")


def to_config_mapping(values: Sequence[T] | None) -> dict[str, T] | None:
    """A value for each label by the text of its number, for model_index.json. (diffusers takes a list there for a component.)"""
    return None if values is None else {str(label): value for label, value in enumerate(values)}


def from_config_mapping(values: Any, classes: int, kind: type[T]) -> list[T] | None:
    """What `to_config_mapping` was given; None where it is not of so many classes, or of values of another kind."""
    keys = [str(label) for label in range(classes)]
    if not classes or not isinstance(values, Mapping) or set(keys) != set(values):
        return None
    found = [values[key] for key in keys]
    return found if all(type(value) is kind and (not isinstance(value, int) or value >= 0) for value in found) else None
