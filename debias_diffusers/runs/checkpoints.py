"""Checkpoints: folders of files with a manifest of their sizes and hashes. Bytes and JSON; torch is not needed here.

    checkpoints/step-00001000/{NAME.safetensors, ..., state.json, manifest.json}

The tensors of a network, its averages and its optimizer are a file each, or are together in a file for each process (shards).

A checkpoint is written to a temporary folder, synced, and renamed into place; only then is an older one removed. It counts only
when every file matches the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config.loading import CHANGES
from ..errors import DebiasError, InputError, NoUsableCheckpointError, reason
from ..utils.files import (
    fsync_file,
    fsync_folder,
    hash_of,
    read_json,
    remove_folder,
    temporary_folder,
    translate_write_errors,
    write_and_fsync,
)

FORMAT = 1
MODEL, OPTIMIZER, SAMPLER = "model.safetensors", "optimizer.safetensors", "sampler.safetensors"  # files of tensors
UNCERTAINTY = "uncertainty.safetensors"  # that is learned: apart from the networks, which others load
MANIFEST = "manifest.json"
OWN_HASH = "sha256"  # of the rest of the manifest: a flipped bit in "format" must not look like a newer version
STATE = "state.json"
Writer = Callable[[Path], object]
T = TypeVar("T")
_NAME = re.compile(r"step-([0-9]{8,})")


class DamagedError(Exception):
    """A file of a checkpoint is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk whose files match its manifest."""

    path: Path
    step: int
    state: dict[str, Any]  # state.json

    @property
    def changing(self) -> set[str]:
        """Names of what --allow_change changes at this step, as `run_directory.open_run` notes it in the state."""
        return {change["name"] for change in self.state.get(CHANGES, ()) if change["step"] == self.step}

    @property
    def ema_rates(self) -> list[float]:
        """The decay rates whose averaged weights it has."""
        if self.shards:
            saved = json.loads((self.path / STATE).read_bytes())  # `state` has what --allow_change makes of it
            return sorted(rate for rate in saved["config"]["ema_decay"] if rate)
        return sorted(float(path.stem.removeprefix("ema_")) for path in self.path.glob("ema_*.safetensors"))

    @property
    def shards(self) -> list[str]:
        """The files of the processes; [] where the tensors are gathered."""
        return sorted(path.name for path in self.path.glob("shard-*.safetensors"))

    def verified(self, name: str) -> Path:
        """One file, after it was hashed again.

        Raises:
            NoUsableCheckpointError: the file changed after the checkpoint was chosen.
        """
        try:
            _require_unchanged(self.path / name, _read_manifest(self.path)[name])
        except (DamagedError, KeyError) as error:
            raise NoUsableCheckpointError(f"checkpoint {self.path}: {error}") from error
        return self.path / name


def folder_name(step: int) -> str:  # as in checkpoints/step-00001000
    return f"step-{step:08d}"


def ema_file(rate: float) -> str:
    """The file of a checkpoint with the averaged weights (EMA) of a decay rate."""
    return f"ema_{rate}.safetensors"


def weights_file(rate: float) -> str:
    """The file with the weights that are exported for a decay rate: at the rate 0, those that are trained."""
    return ema_file(rate) if rate else MODEL


def write(
    folder: Path,
    step: int,
    files: Iterable[tuple[str, Writer]],
    state: dict[str, Any],
    keep: int,
    best: int | None = None,
    damaged: Collection[int] = (),
) -> Path:
    """Writes the checkpoint of a step and then removes the oldest beyond `keep`.

    Args:
        folder: the folder of all checkpoints.
        files: names, and what writes each file to a path.
        state: goes into state.json.
        keep: how many checkpoints stay.
        best: the step of one that stays beyond them.
        damaged: steps of others that are damaged and do not count.

    Raises:
        CannotWriteError: the temporary folder is removed, older checkpoints stay.
    """
    final = folder / folder_name(step)
    with translate_write_errors(final), temporary_folder(final) as temporary:
        _write_files(temporary, step, files, state)
        if final.exists():  # it did not verify, or we would have resumed from it
            remove_folder(final)
        os.rename(temporary, final)
        fsync_folder(folder)
    prune(folder, step, keep, best, {*damaged} - {step})
    return final


def _write_files(folder: Path, step: int, files: Iterable[tuple[str, Writer]], state: dict[str, Any]) -> None:
    manifest = {}
    for name, write_to in itertools.chain(files, [(STATE, lambda path: write_and_fsync(path, _json(state)))]):
        write_to(folder / name)
        manifest[name] = _synced(folder / name)
    body = {"format": FORMAT, "step": step, "files": manifest}
    write_and_fsync(folder / MANIFEST, _json(body | {OWN_HASH: _hash(_json(body))}))
    fsync_folder(folder)


def _synced(path: Path) -> dict[str, Any]:
    """Size and hash of a file that is on the disk when this returns."""
    fsync_file(path)
    return {"size": path.stat().st_size, "sha256": hash_of(path)}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def prune(folder: Path, step: int, keep: int, best: int | None = None, damaged: Collection[int] = ()) -> None:
    """Removes all checkpoints up to `step` but the newest `keep` that are not `damaged`, and that of the step `best`.

    Checkpoints after `step` are damaged, or the run would have resumed from them. They do not count towards `keep`, and stay until
    `step` is past them.
    """
    older = [p for p in list_checkpoints(folder) if step_of_folder(p) <= step]
    stay = [step_of_folder(p) for p in older if step_of_folder(p) not in damaged][-keep:]
    for path in (p for p in older if step_of_folder(p) not in (*stay, best)):
        with translate_write_errors(path):
            remove_folder(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders with the names of checkpoints, oldest first. Ignores other names, files and links."""
    if not folder.is_dir():
        return []
    named = (p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.name == folder_name(step_of_folder(p)))
    return sorted((p for p in named if p.is_dir() and not p.is_symlink()), key=step_of_folder)


def newest_state(folder: Path) -> dict[str, Any]:
    """The newest state.json in a folder of checkpoints that can be read, without verifying the checkpoint; {} where there is none."""
    there = list_checkpoints(folder)
    states = (read_json(path / STATE) for path in reversed(there))
    found: dict[str, Any] = next((state for state in states if isinstance(state, dict)), {})
    removed = not found and list_checkpoints(folder) != there  # by a training, meanwhile
    return newest_state(folder) if removed else found


def read_beside_training(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the checkpoints in a folder, tried again where a training has removed or added one meanwhile.

    Raises:
        DebiasError, OSError: what it raises of a folder that stays as it is.
    """
    while True:
        there = list_checkpoints(folder)
        try:
            return read()
        except (DebiasError, OSError):
            if list_checkpoints(folder) == there:
                raise


def step_of_folder(path: Path) -> int:
    """The step in the name of a checkpoint folder; the inverse of `folder_name`."""
    return int(path.name.removeprefix("step-"))


def latest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and an error message for each newer, damaged one. Verifies every file.

    Raises:
        NoUsableCheckpointError: there are checkpoints, but all are damaged.
        InputError: a newer version of this package wrote the checkpoint.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return verify(path), damaged
        except DamagedError as error:
            damaged.append(f"checkpoint {path}: {error}")
    if damaged:
        raise NoUsableCheckpointError(
            "every checkpoint is damaged, nothing was changed; move them away to start over\n" + "\n".join(f"  - {d}" for d in damaged)
        )
    return None, damaged


def verify(path: Path) -> Checkpoint:
    """Reads and hashes every file of a checkpoint and compares with its manifest.

    Raises:
        DamagedError: names the damaged file.
        InputError: a newer version of this package wrote the checkpoint.
    """
    files = _read_manifest(path)
    if STATE not in files:
        raise DamagedError(f"{MANIFEST} does not list {STATE}")
    for name, entry in files.items():
        _require_unchanged(path / name, entry)
    return Checkpoint(path, step_of_folder(path), json.loads((path / STATE).read_bytes()))


def has_valid_manifest(path: Path) -> bool:
    """Whether a folder has a valid manifest of this package. Does not check the files that it lists."""
    try:
        return bool(_read_manifest(path))
    except DamagedError:
        return False


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
        whole = content == _json(manifest)
        own = manifest.pop(OWN_HASH, None)  # the first checkpoints had none
        if own is not None and own != _hash(_json(manifest)):
            raise DamagedError(f"{MANIFEST} does not match its own sha256")
        if manifest["format"] > FORMAT:
            raise InputError(f"checkpoint {path} has format {manifest['format']}, but this version reads {FORMAT}; install a newer one")
        files: dict[str, dict[str, Any]] = manifest["files"]
        sound = whole and set(manifest) == {"format", "step", "files"} and manifest["format"] == FORMAT
        sound = sound and folder_name(manifest["step"]) == path.name
        if not sound or any(Path(name).name != name or set(entry) != {"size", "sha256"} for name, entry in files.items()):
            raise DamagedError(f"{MANIFEST} is damaged")
    except OSError as error:
        raise DamagedError(f"{MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error
    return files


def _require_unchanged(path: Path, entry: dict[str, Any]) -> None:
    """Raises DamagedError where a file is not as its entry in the manifest says."""
    digest = ""
    try:
        # The size first: a file that grew without bounds is not read.
        if (size := path.stat().st_size) == entry["size"]:
            digest = hash_of(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DamagedError(f"{path.name}: {getattr(error, 'strerror', None) or reason(error)}") from error
    if size != entry["size"]:
        raise DamagedError(f"{path.name} has {size} bytes instead of {entry['size']}")
    if digest != entry["sha256"]:
        raise DamagedError(f"{path.name} does not match its sha256")
