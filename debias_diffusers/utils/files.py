"""Atomic writes (a temporary file, fsync, rename), folder locks, and reading files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
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
BLOCK = 1 << 20  # bytes that are hashed at once
TEMPORARY_PREFIX = ".draft-"  # of the names of temporary files; no reader looks at them
# Temporary files that the first versions left in a new folder.
_FIRST_TEMPORARY_NAMES = {TEMPORARY_PREFIX + name for name in ("config.json", ".sampling.json", "pipeline")}
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY_PREFIX) + r"([0-9]+)-[0-9a-f]{8}-.*", re.DOTALL)  # with the process that writes it
_HOLDER = re.compile(r"process (\d+) on (.+)")  # the text of a lock file
MAX_TEMPORARY_AGE = 86400.0  # seconds; the process that wrote an older temporary file has ended


def temporary_path(path: Path) -> Path:
    """A temporary file name in the folder of `path`. Each call returns a new one, because several processes may write the same path."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name[:40]}")  # file names have at most 255 bytes


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a CannotWriteError that names the path and the free disk space.

    Raises:
        CannotWriteError: for any OSError in the body, and for a SafetensorError, which safetensors raises in its place.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotWriteError(f"{path} cannot be written: {_cause(error)} ({free_bytes(path) / 1e6:.1f} MB free)") from error


def _cause(error: OSError | SafetensorError) -> str:
    """What the system says; safetensors has the number of its error in the text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else str(error)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which a path is, or would be."""
    existing = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))  # False also for a name that is too long
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def atomic_write(path: Path, fsync: bool = True) -> Iterator[IO[bytes]]:
    """Opens a temporary file and renames it to `path` at the end. A power cut leaves the old file, the new file, or none.

    Without `fsync` this holds for a killed process only: a power cut can leave an empty file until `os.sync` is called.

    Raises:
        CannotWriteError: the temporary file is removed and the old file at `path` stays.
    """
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                if fsync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        if fsync:
            fsync_folder(path.parent)


def write_file(path: Path, data: bytes, fsync: bool = True) -> None:
    """Writes a file atomically; see `atomic_write`.

    Raises:
        CannotWriteError: the old file at `path` stays.
    """
    with atomic_write(path, fsync) as file:
        file.write(data)


def write_and_fsync(path: Path, data: bytes) -> None:
    """Writes a file in place and syncs it: without fsync, a later rename can survive a power cut while the file's bytes are lost."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move_file(path: Path, destination: Path) -> None:
    """Moves a complete file on the same disk, atomically. A power cut leaves the old file, the new file, or none at `destination`."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    fsync_file(path)
    os.replace(path, destination)
    fsync_folder(destination.parent)


LINKED_FROM = 1 << 20  # bytes: smaller files are copied, so that a change of one changes no other


def link_or_copy(path: Path, destination: Path) -> None:
    """Makes `destination` the same file as `path` by a hard link, or a copy of it where it is small or on another disk, atomically.

    Raises:
        CannotWriteError: it cannot be written.
    """
    found = Path(os.path.realpath(path))  # of a symbolic link, as caches have them, the file itself
    if found.stat().st_size >= LINKED_FROM:
        temporary = temporary_path(destination)
        with contextlib.suppress(OSError):  # another disk, or one without hard links
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.link(found, temporary)
            os.replace(temporary, destination)
            fsync_folder(destination.parent)
            return
    with atomic_write(destination) as file, open(found, "rb") as source:
        shutil.copyfileobj(source, file)


def fsync_file(path: Path) -> None:
    """Syncs a file and gives it the mode that the umask allows, as its folder has it: safetensors writes files for their owner only.

    A hard link keeps its mode, which is also that of a file of others.
    """
    mode, found = path.parent.stat().st_mode & 0o666, path.stat()
    if found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
        with contextlib.suppress(OSError):  # of a disk without modes, such as one of Windows
            path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Creates a temporary folder next to `path`, to fill and to rename; removes it at the end if it still exists."""
    folder = temporary_path(path)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def filled_folder(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill, whose files are those of `folder` at the end: all or none of them; not at an error.

    Args:
        folder: as of `new_folder`. One that exists keeps its owner and mode, and gets the file named `last` last.
        last: without this file the folder holds nothing.

    Raises:
        CannotWriteError: a file cannot be written.
    """
    exists = folder.exists()
    with translate_write_errors(folder):
        remove_temporary_files(folder) if exists else remove_old_temporary_files(folder.parent)
        with temporary_folder(folder / "contents" if exists else folder) as temporary:
            yield temporary
            for path in temporary.rglob("*.*"):
                fsync_file(path)
            if exists:
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                    os.replace(path, folder / path.name)
            else:
                os.replace(temporary, folder)


def fsync_folder(folder: Path) -> None:
    """Syncs a folder, so that new and renamed file names survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_files(folder: Path) -> list[str]:
    """Names in a folder, without those that a command of this package leaves if it is killed early: its lock and temporary files."""
    if not folder.is_dir():
        return []
    names = (name for name in os.listdir(folder) if name not in _FIRST_TEMPORARY_NAMES and not _TEMPORARY_NAME.fullmatch(name))
    return sorted(name for name in names if name != LOCK or not (_is_empty(folder / LOCK) or has_our_lock(folder)))


def _is_empty(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def has_our_lock(folder: Path) -> bool:
    """Whether a command of this package has ever locked the folder."""
    try:
        return bool(_HOLDER.fullmatch(read_file(folder / LOCK).decode(errors="replace")))
    except InputError:
        return False


def require_writable(path: Path) -> None:
    """Raises CannotWriteError if a file cannot be written. Leaves nothing behind."""
    with translate_write_errors(path):
        path.is_dir()  # raises for a name that is too long
        existing = next(p for p in path.absolute().parents if os.path.lexists(p))
        temporary = temporary_path(existing / path.name)
        try:
            open(temporary, "xb").close()
        finally:
            remove(temporary)


def require_replaceable(field: str, path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Checks before a long computation that its result can be written. Leaves nothing behind.

    Raises:
        InputError: the path exists, and `is_ours` says that this package did not write it.
        CannotWriteError: the file cannot be written.
    """
    require_writable(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{field} {path} exists and is not a file; name a new file")
    if path.exists() and not is_ours(path):
        raise InputError(f"{field} {path} already exists and was not written by this command; name a new file, or remove it")


def new_folder(out: str) -> Path:
    """The absolute path of a folder that is to be made. Raises InputError if there is something that is not an empty folder."""
    try:
        folder = Path(out).resolve()
        if folder.is_symlink():  # a loop of links, which Python before 3.13 refuses to resolve
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        # Temporary files of a killed conversion do not count.
        free = not folder.exists() or (folder.is_dir() and not user_files(folder))
    except (OSError, RuntimeError, ValueError) as error:  # for a loop of links, among others
        raise InputError(f"{out!r:.80} cannot be a folder ({reason(error)}); name a new or empty one") from error
    if not (out and free):
        raise InputError(f"{out} already exists; name a new or empty folder" if out else "the name of the folder is empty; name a new one")
    return folder


def require_new_file(path: str, example: str) -> None:
    """Raises InputError if a file cannot be made because there is one, or its name is none; `example` is a name that can."""
    if not path:
        raise InputError(f"the name of the file is empty; name a new one, such as {example}")
    if "\0" in path:
        raise InputError(f"{path!r:.80} cannot be a file (it has a zero byte in it); name a new one, such as {example}")
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; name a new file, such as {example}")


def acquire_lock(folder: Path) -> IO[str]:
    """Creates and locks a folder. Closing the returned file unlocks it; the kernel closes it when the process ends.

    Raises:
        RunInUseError: another process holds the lock.
        CannotWriteError: the folder cannot be created or written to.
    """
    with translate_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    with translate_write_errors(folder / LOCK):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def require_lockable(folder: Path) -> None:
    """Raises what `acquire_lock` would raise now. Leaves nothing behind."""
    require_writable(folder / LOCK)
    if (folder / LOCK).exists():
        _locked(folder).close()


def _locked(folder: Path) -> IO[str]:
    """The lock file, locked, with the name of the process that held it before."""
    with translate_write_errors(folder):
        lock = open(folder / LOCK, "a+")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        lock.close()
        raise RunInUseError(f"{folder} is in use by {holder}") from None
    return lock


def _holder(lock: IO[str]) -> str:
    """The process that holds the lock. It may not yet have replaced the name of the process that held it before."""
    for seconds in (0.05,) * 20 + (0,):
        lock.seek(0)
        name = lock.read()
        if _may_live(name):
            break
        time.sleep(seconds)
    return name or "another process"


def is_held_here(folder: Path) -> bool:
    """Whether a process of this machine that lives was the last to lock a folder. Does not take the lock, not even for a moment."""
    name = read_file(folder / LOCK).decode(errors="replace") if (folder / LOCK).is_file() else ""
    return name.endswith(f" on {socket.gethostname()}") and _may_live(name)


def _may_live(name: str) -> bool:
    found = _HOLDER.fullmatch(name)
    return found is not None and (found[2] != socket.gethostname() or _lives(int(found[1])))


def _lives(process: int) -> bool:
    """Whether there is a process with this number on this machine."""
    try:
        os.kill(process, 0)  # sends no signal, only checks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # owned by another user
        pass
    return True


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files of interrupted writes. Call it only while holding the folder's lock.

    Those of another process of this machine stay while it lives: samples and reconstructed averages are written without a run's lock.
    """
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        with translate_write_errors(path), contextlib.suppress(FileNotFoundError):
            found = _TEMPORARY_NAME.fullmatch(path.name)
            if found and int(found[1]) != os.getpid() and _lives(int(found[1])) and not _is_old(path):
                continue
            remove(path)


def _is_old(temporary: Path) -> bool:
    return time.time() - temporary.lstat().st_mtime > MAX_TEMPORARY_AGE


def remove_old_temporary_files(folder: Path) -> None:
    """Removes temporary files older than a day from a folder that other processes may write to. Ignores OS errors."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name) and _is_old(path):
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, a folder with its contents, or a link (not its target). Does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that others may read, or nothing: renamed first, so that no process finds it with files missing."""
    renamed = temporary_path(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(renamed)
        remove(renamed)


def hash_of(path: Path) -> str:
    """The sha256 of a file in blocks: they take half the time of new memory for gigabytes, and no memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        InputError: names the path; it cannot be read, or is a pipe or device, where reading might never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} cannot be read: it is not a regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read: it does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
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
    """The value in a JSON file; None if the file cannot be read or is not JSON."""
    try:
        return json.loads(read_file(path))
    except (InputError, ValueError, RecursionError):
        return None
