"""Names of shards, files of many images: one .tar, or a pattern with braces that stands for several. No torch."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from ..errors import InputError

MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_pattern(name: str) -> bool:
    """Whether a name has braces that stand for several .tar or .parquet files; a path that exists is none."""
    if not _BRACES.search(name) or Path(name).expanduser().exists():
        return False
    return Path(name).suffix.lower() in (".tar", ".parquet")


def expand(name: str) -> list[str]:
    """The names that a pattern stands for, in its order: {000..127} counts, with the digits of its first number, and {a,b} lists.

    Raises:
        InputError: braces that are neither, or more than `MAX_SHARDS` names.
    """
    if not is_pattern(name):
        return [name]
    parts = _BRACES.split(name)  # text, braces, text, braces, ..., text
    choices = [_alternatives(part, name) if k % 2 else [part] for k, part in enumerate(parts)]
    return ["".join(each) for each in itertools.islice(itertools.product(*choices), MAX_SHARDS)]


def _alternatives(inside: str, name: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < MAX_SHARDS:
            raise InputError(f"dataset {name} has {{{inside}}}, which counts down or too far; write a range such as {{0000..0127}}")
        return [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    if "," not in inside:
        raise InputError(f"dataset {name} has {{{inside}}}, which is neither a range such as {{0000..0127}} nor a list such as {{a,b}}")
    return inside.split(",")


def is_remote(name: str) -> bool:
    """Whether a name is an address, and not a path: https://, http://, or hf://, of files on the Hub."""
    return name.startswith(("https://", "http://", "hf://"))


def missing_shards(name: str) -> list[str]:
    """Those of the files of a name that do not exist."""
    return [path for path in expand(name) if not Path(path).expanduser().exists()]


def exists(name: str) -> bool:
    """Whether data are on this disk: a path, or at least one file of a pattern."""
    return any(Path(path).expanduser().exists() for path in expand(name))
