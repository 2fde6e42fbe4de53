"""Writing so that a file is whole or absent, whatever happens in between."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from ..errors import CannotWriteError, InputError, RunInUseError, reason

LOCK = ".lock"
DRAFT = ".draft-"  # whatever begins so was being written when the process ended; nobody reads it
# Of the first versions, at the beginning of a folder.
_FIRST_DRAFTS = {DRAFT + name for name in ("config.json", ".sampling.json", "pipeline")}
_DRAFT_NAME = re.compile(re.escape(DRAFT) + r"[0-9]+-[0-9a-f]{8}-.*", re.DOTALL)
_HOLDER = re.compile(r"process (\d+) on (.+)")  # what a lock holds
DAY = 86400.0  # seconds after which a temporary file is taken for one of a process that has ended


def draft_of(path: Path) -> Path:
    """A name beside `path` for what will be renamed to it; another one for each call, since several processes may write the same path."""
    return path.with_name(f"{DRAFT}{os.getpid()}-{secrets.token_hex(4)}-{path.name[:40]}")  # a name has 255 bytes at most


@contextlib.contextmanager
def said_if_not_writable(path: Path) -> Iterator[None]:
    """Turns what the system says into a sentence that names the path and the space left.

    Raises:
        CannotWriteError: in place of any OSError within, and of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotWriteError(f"{path} cannot be written: {_cause(error)} ({_free(path)})") from error


def _cause(error: OSError | SafetensorError) -> str:
    """What the system says; safetensors has the number of its error in the text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else str(error)


def _free(path: Path) -> str:
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))  # False of a name that is too long, too
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB free"


@contextlib.contextmanager
def drafted(path: Path, wait: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to that is renamed into place at the end; a power cut leaves the old file, the new one, or none.

    Without `wait` that holds for a kill, but a power cut can leave an empty file, until `os.sync` was called.

    Raises:
        CannotWriteError: the draft is removed, what stood at `path` stays.
    """
    with said_if_not_writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_of(path)
        try:
            with open(draft, "xb") as file:
                yield file
                file.flush()
                if wait:
                    os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            remove(draft)
            raise
        if wait:
            sync_folder(path.parent)


def write_file(path: Path, data: bytes, wait: bool = True) -> None:
    """Writes a file aside and renames it into place; `wait` as of `drafted`.

    Raises:
        CannotWriteError: what stood at `path` stays.
    """
    with drafted(path, wait) as file:
        file.write(data)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file in place and waits until it is on the disk: without that, a rename can outlive its file's bytes."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move_file(path: Path, destination: Path) -> None:
    """Moves a file that is whole to a place on the same disk; a power cut leaves there the old file, the new one, or none."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    sync_file(path)
    os.replace(path, destination)
    sync_folder(destination.parent)


def sync_file(path: Path) -> None:
    """Waits until a file is on the disk, with the mode that the umask allows, as its folder has it.

    safetensors writes files that only their owner may read.
    """
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to fill and to rename into place; removed at the end if it is still there."""
    folder = draft_of(path)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contents(folder: Path) -> list[str]:
    """What lies in a folder beside what a process of ours leaves that is killed at its very beginning: its lock, temporary files."""
    if not folder.is_dir():
        return []
    names = (name for name in os.listdir(folder) if name not in _FIRST_DRAFTS and not _DRAFT_NAME.fullmatch(name))
    return sorted(name for name in names if name != LOCK or not (_is_empty(folder / LOCK) or was_locked(folder)))


def _is_empty(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def was_locked(folder: Path) -> bool:
    """Whether a process of ours has ever had the lock of a folder."""
    try:
        return bool(_HOLDER.fullmatch(read_file(folder / LOCK).decode(errors="replace")))
    except InputError:
        return False


def require_writable(path: Path) -> None:
    """Raises CannotWriteError where a file cannot be written. Nothing is left behind."""
    with said_if_not_writable(path):
        path.is_dir()  # a name that is too long is said here
        there = next(p for p in path.absolute().parents if os.path.lexists(p))
        draft = draft_of(there / path.name)
        try:
            open(draft, "xb").close()
        finally:
            remove(draft)


def require_replaceable(field: str, path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Looks before the work whether a result can be written. Nothing is left behind.

    Raises:
        InputError: something is there that `is_ours` does not recognise as written by this package.
        CannotWriteError: the file cannot be written.
    """
    require_writable(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{field} {path} is there and is no file; name a new file")
    if path.exists() and not is_ours(path):
        raise InputError(f"{field} {path} is there already and was not written by this command; name a new file, or remove it")


def take_lock(folder: Path) -> IO[str]:
    """Makes the folder this process's own until the file that is returned is closed. The kernel does that when it ends.

    Raises:
        RunInUseError: another process has it.
        CannotWriteError: the folder cannot be made or written to.
    """
    with said_if_not_writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        lock.close()
        raise RunInUseError(f"{folder} is in use by {holder}") from None
    with said_if_not_writable(folder / LOCK):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def _holder(lock: IO[str]) -> str:
    """Who has the lock. One that has just taken it may not have written its name yet, over that of one that has ended."""
    for wait in (0.05,) * 20 + (0,):
        lock.seek(0)
        name = lock.read()
        if _may_live(name):
            break
        time.sleep(wait)
    return name or "another process"


def _may_live(name: str) -> bool:
    found = _HOLDER.fullmatch(name)
    if found is None:
        return False
    try:
        if found[2] == socket.gethostname():
            os.kill(int(found[1]), 0)  # asks only
    except ProcessLookupError:
        return False
    except OSError:  # it lives and is somebody else's
        pass
    return True


def remove_drafts(folder: Path) -> None:
    """Removes what an interrupted write left. Only for the process that has the folder to itself."""
    for path in folder.glob(DRAFT + "*"):
        with said_if_not_writable(path):
            remove(path)


def remove_old_drafts(folder: Path) -> None:
    """Removes what interrupted writes left in a folder that others may be writing to; as far as it is permitted."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _DRAFT_NAME.fullmatch(path.name) and time.time() - path.lstat().st_mtime > DAY:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link and not what it points to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_file(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        InputError: it cannot be read, or is a pipe or a device, where reading might never end; names it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} cannot be read: it is no file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_json_object(name: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file that the field or flag `name` gives.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name} {path} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{name} {path} holds no JSON object")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(read_file(path))
    except (InputError, ValueError, RecursionError):
        return None
