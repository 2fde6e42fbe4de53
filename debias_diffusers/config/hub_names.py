"""Names of repositories on the Hub: user/name@revision, told from paths, and pinned to a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .schema import DIGITS

# Names of Hub repositories, which a run writes down with the commit that it took: user/name@commit.
PINNED = ("dataset", "init")
COMMIT = re.compile(r"[0-9a-f]{40}")
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", re.ASCII)


def is_pinned(name: str) -> bool:
    """Whether a name has the commit with which a run writes down what it took from the Hub; what it took from a disk has none."""
    return bool(COMMIT.fullmatch(name.partition("@")[2]))


def is_hub_id(dataset: str) -> bool:
    """Whether a name that was typed is that of a dataset on the Hub: user/name or name@revision, and nothing that is meant on this disk."""
    path = Path(dataset)
    return bool(_DATASET_ID.fullmatch(dataset)) and dataset != DIGITS and path.suffix.lower() != ".parquet" and not is_here(dataset)


def is_here(name: str) -> bool:
    """Whether a name means a path: it is there, or the folder is that it would be in. A revision (`user/name@main`) means the Hub."""
    path = Path(name)
    return path.exists() or ("@" not in name and path.parent.is_dir())


def place_of(path: str) -> str:
    """Where a path is, whatever the working directory."""
    return os.path.abspath(os.path.expanduser(path))


def _was_pinned(before: str | None, now: str | None) -> bool:
    """Whether the run wrote down the commit behind the name that the command says again."""
    if before is None or now is None:
        return False
    (repo, _, commit), (again, _, revision) = before.partition("@"), now.partition("@")
    return repo == again and bool(COMMIT.fullmatch(commit)) and not COMMIT.fullmatch(revision)


_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a name is that of a repository: of the form user/name or user/name@revision, and nothing that is meant on this disk."""
    return bool(_ID.fullmatch(name)) and not name.startswith("..") and not is_here(name)


def split(name: str) -> tuple[str, str | None]:
    """`user/name@revision` as (user/name, revision)."""
    repo, _, revision = name.partition("@")
    return repo, revision or None
