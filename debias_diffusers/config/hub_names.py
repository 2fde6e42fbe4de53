"""Names of repositories on the Hub: user/name@revision, told from paths, and pinned to a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import shard_names
from .schema import DIGITS

# Names of Hub repositories, which a run writes down with the commit that it took: user/name@commit.
PINNED = ("dataset", "init", "base_model", "vae")
COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", re.ASCII)


def is_pinned(name: str) -> bool:
    """Whether a name ends with a commit, as a run records what it took from the Hub."""
    return bool(COMMIT.fullmatch(name.partition("@")[2]))


def is_dataset_id(dataset: str) -> bool:
    """Whether a name is that of a dataset on the Hub: name, user/name or user/name@revision, and no path of this disk."""
    is_file = Path(dataset).suffix.lower() in (".parquet", ".tar")
    return bool(_DATASET_ID.fullmatch(dataset)) and dataset != DIGITS and not is_file and not is_path(dataset)


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


def model_problems(field: str, name: str) -> list[str]:
    """A model that is neither on this disk nor the name of a repository."""
    if not name or is_model_id(name) or Path(name).exists():
        return []  # an empty name is told where the model is loaded
    return [f"{field} {name} does not exist; name a run directory, a pipeline folder or a Hub id such as user/name"]


def data_problems(field: str, name: str | None) -> list[str]:
    """Data, or a file of their statistics, that are neither on this disk nor the name of a data set on the Hub."""
    if not name or name == DIGITS or Path(name).expanduser().exists():
        return []
    if shard_names.is_pattern(name) and shard_names.exists(name):
        missing = shard_names.missing_shards(name)
        also = f" and {len(missing) - 1} more do" if len(missing) > 1 else " does"
        return [f"{field} {name}: {missing[0]}{also} not exist"] if missing else []
    if is_dataset_id(name) and Path(name).suffix not in (".npz", ".safetensors"):
        return []
    advice = f"; {name}@main asks the Hub for it" if is_dataset_id(f"{name}@main") else ""
    return [f"{field} {name} is neither digits, a folder, a file nor a Hub id: {absolute_path(name)} does not exist{advice}"]


def target_problems(name: str) -> list[str]:
    """What is to be scored, a model or images, that is not there."""
    if Path(name).suffix == ".npz" and not Path(name).exists():
        return [f"target {name} does not exist; name a run directory, a pipeline folder, a Hub id, a folder of images or an .npz file"]
    return model_problems("target", name)


def split_revision(name: str) -> tuple[str, str | None]:
    """`user/name@revision` as (user/name, revision)."""
    repo, _, revision = name.partition("@")
    return repo, revision or None
