"""What a source has, as lines for the user."""

from __future__ import annotations

from collections import Counter

from .. import image_folders
from ..labels import describe_classes
from .base import Source
from .subset import sharded


def class_counts(source: Source) -> list[int] | None:
    """The number of images of each class; None if there are no labels."""
    if not source.class_names:
        return None
    count = Counter(source.labels())
    return [count[label] for label in range(len(source.class_names))]


def summary(source: Source, name: str | None) -> list[str]:
    """Lines for the user: what a source has, and which files are ignored for which reasons."""
    parts = [f"{len(source)} images"]
    if source.class_names:
        parts.append(describe_classes(source.class_names, class_counts(source) or []))
    found = f"dataset {name}: {', '.join([*parts, source.split] if source.split else parts)}"
    passed_over = [f"passed over: {image_folders.count_by_reason(source.passed_over)}"] if source.passed_over else []
    shards = sharded(source)
    return [found, *passed_over, *(f"warning: {warning}" for warning in (shards.warnings if shards else ()))]


def training_summary(source: Source, name: str | None) -> list[str]:
    """`summary`, and whether the data have classes that the training does not use."""
    unused = source.unused_labels()
    return summary(source, name) + (
        [f"its {unused} are not used: an unconditional model is trained; --class_conditional trains one that knows them"] if unused else []
    )
