"""Names of repositories on the Hub: user/name@revision, told from paths, and pinned to a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from . import shard_names
from .schema.data import EMBEDDED

# Names of Hub repositories, which a run writes down with the commit that it took: user/name@commit.
PINNED = ("dataset", "init", "base_model", "vae")
_HUB_FILE = re.compile(r"hf://datasets/(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[^/@]+))?/(?P<path>[^@]+)", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", re.ASCII)


class HubFile(NamedTuple):
    """What hf://datasets/user/name@revision/path says."""

    repo: str  # user/name
    revision: str | None
    path: str  # in the repository; a pattern stands for several

    def at(self, revision: str | None) -> str:
        """The name with another revision."""
        return f"hf://datasets/{self.repo}{f'@{revision}' if revision else ''}/{self.path}"


def hub_file(name: str) -> HubFile | None:
    """The parts of a name of files in a data set on the Hub; None if it is none."""
    found = _HUB_FILE.fullmatch(name)
    return HubFile(found["repo"], found["revision"], found["path"]) if found else None


def is_pinned(name: str) -> bool:
    """Whether a name has a commit, as a run records what it took from the Hub."""
    return bool(COMMIT.fullmatch(split_revision(name)[1] or ""))


def is_dataset_id(dataset: str) -> bool:
    """Whether a name is that of a dataset on the Hub: name, user/name, user/name@revision, or of files in it, and no path of this disk."""
    if hub_file(dataset):
        return True
    is_file = Path(dataset).suffix.lower() in (".parquet", ".tar")
    return bool(_DATASET_ID.fullmatch(dataset)) and dataset not in EMBEDDED and not is_file and not is_path(dataset)


def is_path(name: str) -> bool:
    """Whether a name is a path: it exists, or its parent folder does. A revision (`user/name@main`) means the Hub."""
    path = Path(name)
    return path.exists() or ("@" not in name and path.parent.is_dir())


def absolute_path(path: str) -> str:
    """A path that does not depend on the working directory."""
    return os.path.abspath(os.path.expanduser(path))


def at_home(text: str) -> str:
    """A path in the home folder, or `--flag=` with one, written out: shells do so only where ~/ begins a word, and leave `--flag=~/runs`.

    Else a folder of the name ~ would be made in the working directory.
    """
    found = re.fullmatch(r"(--[\w-]+=)?(~/.*)", text, re.DOTALL)
    return (found[1] or "") + os.path.expanduser(found[2]) if found else text


def was_pinned(before: str | None, now: str | None) -> bool:
    """Whether the run recorded the commit of the name that the command gives again."""
    if before is None or now is None:
        return False
    (repo, commit), (again, revision) = split_revision(before), split_revision(now)
    return repo == again and bool(COMMIT.fullmatch(commit or "")) and not COMMIT.fullmatch(revision or "")


def is_model_id(name: str) -> bool:
    """Whether a name is that of a model on the Hub: user/name or user/name@revision, and no path of this disk."""
    return bool(_MODEL_ID.fullmatch(name)) and not name.startswith("..") and not is_path(name)


def model_problems(field: str, name: str) -> list[str]:
    """A model that is neither on this disk nor the name of a repository."""
    if not name or is_model_id(name) or Path(name).exists():
        return []  # an empty name is told where the model is loaded
    return [f"{field} {name} does not exist; name a run directory, a pipeline folder or a Hub id such as user/name"]


def is_reference_file(name: str) -> bool:
    """Whether a reference is named as a file of images or statistics, `.npz` or `.safetensors`, and not as a data set."""
    return Path(name).suffix in (".npz", ".safetensors")


def data_problems(field: str, name: str | None) -> list[str]:
    """Data, or a file of their statistics, that are neither on this disk nor the name of a data set on the Hub."""
    if not name or name in EMBEDDED or Path(name).expanduser().exists():
        return []
    if shard_names.is_remote(name):
        return _address_problems(field, name)
    if "://" in name:
        return [f"{field} {name} is an address of a kind that is not read; those that are begin with https://, http:// or hf://"]
    if shard_names.is_pattern(name):
        missing = shard_names.missing_shards(name)
        also = f" and {len(missing) - 1} more do" if len(missing) > 1 else " does"
        return [f"{field} {name}: {missing[0]}{also} not exist"] if missing else []
    if is_dataset_id(name) and not is_reference_file(name):
        return []
    advice = f"; {name}@main asks the Hub for it" if is_dataset_id(f"{name}@main") else ""
    if Path(name).suffix in (".tar", ".parquet") and any(letter in name for letter in "*?["):
        advice = "; several files are written as {0000..0127} or {a,b}, or name their folder"
    return [f"{field} {name} is neither {', '.join(EMBEDDED)}, a folder, a file nor a Hub id: {absolute_path(name)} does not exist{advice}"]


def _address_problems(field: str, name: str) -> list[str]:
    """What is wrong with an address of shards; whether they are there the server says later."""
    if name.startswith("hf://") and hub_file(name) is None:
        return [f"{field} {name} names no files of a data set on the Hub; write hf://datasets/user/name/{{0000..0127}}.tar"]
    address = urlsplit(name)
    if name.startswith("http") and (address.query or address.username):
        what = "a query" if address.query else "a user name"
        hidden = f"{address.scheme}://{address.hostname}{address.path}"
        return [f"{field} {hidden} has {what}, which would be in config.json and the model card; name an address without"]
    if Path(name).suffix.lower() not in (".tar", ".parquet"):
        return [f"{field} {name} is an address that ends in neither .tar nor .parquet; name shards, such as .../{{0000..0127}}.tar"]
    return []


def target_problems(name: str) -> list[str]:
    """What is to be scored, a model or images, that is not there."""
    if Path(name).suffix == ".npz" and not Path(name).exists():
        return [f"target {name} does not exist; name a run directory, a pipeline folder, a Hub id, a folder of images or an .npz file"]
    return model_problems("target", name)


def split_revision(name: str) -> tuple[str, str | None]:
    """`user/name@revision` as (user/name, revision); of hf://datasets/user/name@revision/path the name without the revision."""
    if file := hub_file(name):
        return file.at(None), file.revision
    repo, _, revision = name.partition("@")
    return repo, revision or None
