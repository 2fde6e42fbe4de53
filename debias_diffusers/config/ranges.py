"""Ranges of values, which stand on the fields: `Annotated[int, at_least(1, 64)]`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Range:
    """What a value must satisfy, and the end of the sentence "... must be" with a value that does."""

    rule: str
    holds: Callable[[Any], bool]


def at_least(bound: float, example: object, zero: str = "") -> Range:
    """Finite numbers from a bound on; `zero` says what 0 means."""
    rule = f"at least {bound}" if bound else f"0 ({zero}) or more" if zero else "0 or more"
    return Range(f"{rule}, such as {example}", lambda value: math.isfinite(value) and value >= bound)


def above(bound: float, example: object) -> Range:
    """Finite numbers above a bound."""
    return Range(f"above {bound}, such as {example}", lambda value: math.isfinite(value) and value > bound)


@functools.cache  # a start asks tens of times
def field_types(kind: Any, include_extras: bool = False) -> Mapping[str, Any]:
    """The types of the fields of a dataclass, and of those of the dataclasses that are its fields, by name.

    `include_extras`: with what `Annotated` adds to them, as of `typing.get_type_hints`.
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=include_extras).items():
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= field_types(hint, include_extras) if is_section else {name: hint}
    return found


@functools.cache
def ranges(kind: Any) -> Mapping[str, Range]:
    """The ranges of a dataclass, and of the dataclasses that are its fields, by the name of the field."""
    annotations = {name: getattr(hint, "__metadata__", ()) for name, hint in field_types(kind, include_extras=True).items()}
    return {name: part for name, parts in annotations.items() for part in parts if isinstance(part, Range)}


def range_problems(kind: Any, values: Mapping[str, Any]) -> list[str]:
    """The values that are out of the range of their field in a dataclass, a sentence each. None is what was left out."""
    return [
        f"{name} is {values[name]}, but must be {allowed.rule}"
        for name, allowed in ranges(kind).items()
        if values.get(name) is not None and not allowed.holds(values[name])
    ]
