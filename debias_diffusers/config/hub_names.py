"""Names of repositories on the Hub: user/name@revision, told from paths, and pinned to a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .schema import DIGITS

# Names of Hub repositories, which a run writes down with the commit that it took: user/name@commit.
PINNED = ("dataset", "init")
COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", re.ASCII)


def is_pinned(name: str) -> bool:
    """Whether a name ends with a commit, as a run records what it took from the Hub."""
    return bool(COMMIT.fullmatch(name.partition("@")[2]))


def is_dataset_id(dataset: str) -> bool:
    """Whether a name is that of a dataset on the Hub: name, user/name or user/name@revision, and no path of this disk."""
    path = Path(dataset)
    return bool(_DATASET_ID.fullmatch(dataset)) and dataset != DIGITS and path.suffix.lower() != ".parquet" and not is_path(dataset)


def is_path(name: str) -> bool:
    """Whether a name is a path: it exists, or its parent folder does. A revision (`user/name@main`) means the Hub."""
    path = Path(name)
    return path.exists() or ("@" not in name and path.parent.is_dir())


def absolute_path(path: str) -> str:
    """A path that does not depend on the working directory."""
    return os.path.abspath(os.path.expanduser(path))


def was_pinned(before: str | None, now: str | None) -> bool:
    """Whether the run recorded the commit of the name that the command gives again."""
    if before is None or now is None:
        return False
    (repo, _, commit), (again, _, revision) = before.partition("@"), now.partition("@")
    return repo == again and bool(COMMIT.fullmatch(commit)) and not COMMIT.fullmatch(revision)


def is_model_id(name: str) -> bool:
    """Whether a name is that of a model on the Hub: user/name or user/name@revision, and no path of this disk."""
    return bool(_MODEL_ID.fullmatch(name)) and not name.startswith("..") and not is_path(name)


def missing_models(field: str, *names: str) -> list[str]:
    """A sentence for each name that is neither a path that exists nor an id on the Hub."""
    return [
        f"{field} {name} does not exist; name a run directory, a pipeline folder or a Hub id such as user/name"
        for name in names
        if name and not is_model_id(name) and not Path(name).exists()
    ]


def split_revision(name: str) -> tuple[str, str | None]:
    """`user/name@revision` as (user/name, revision)."""
    repo, _, revision = name.partition("@")
    return repo, revision or None
