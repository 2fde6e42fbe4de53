"""A cache of fetched files on the disk, of bounded size, shared by the processes and data loader workers of a machine. No torch.

An entry is a whole file, or a range of one. One that is being fetched is `KEY-SIZE.part`, exclusively locked by the one process that
fetches it; the others wait for that lock. Complete and synced, it is renamed to `KEY-SIZE.shard`. Who reads it has a shared lock on it,
without which it may be removed. The kernel releases the locks of a process that ends, however it ends, and the next one continues its file.
The key is a hash of name, version and range, so that no entry is ever out of date.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import CannotWriteError, FetchError
from ..utils.console import say
from ..utils.files import hash_of, remove, translate_write_errors
from . import http
from .http import FileRange, RemoteFile

Entry = RemoteFile | FileRange  # of the cache: a whole file, or a range of one

_ENTRY = re.compile(r"[0-9a-f]{32}-(\d+)\.(shard|part)")
_LOCK = ".lock"  # of who adds up sizes and removes files


class ShardCache:
    """Files and ranges of files, each in a file of its own; those that were not used for longest go first when there is no more room."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`folder` need not exist; `max_bytes` limits all its files together, also those that are still being fetched."""
        self.folder, self.max_bytes = folder, max_bytes
        self._told = False
        self._wanted: Sequence[Entry] = ()  # what the last call of `prefetch` named

    def open(self, file: Entry) -> IO[bytes]:
        """A file, opened for reading and kept in the cache until it is closed; fetched if it is not there. Its path is `.name`.

        Raises:
            FetchError: it cannot be fetched, or has changed on its server.
            CannotWriteError: the disk is full, or the folder cannot be written to.
        """
        while (found := self._opened(file)) is None:
            with self._part(file, wait=True) as part:
                if part:
                    self._fetch(file, part, insist=True)
        return found

    def has(self, file: Entry) -> bool:
        """Whether a file is there, whole."""
        return self._path(file).exists()

    def prefetch(self, files: Sequence[Entry]) -> None:
        """Fetches files in a background thread, in this order, as far as there is room beside what is in use.

        A later call replaces the files that an earlier one has not come to. An error is met again, and raised, by who opens the file.
        """
        self._wanted = [file for file in files if not self.has(file)]
        if self._wanted:  # a daemon: a program that ends does not wait for it
            threading.Thread(target=self._prefetch, args=(self._wanted,), daemon=True).start()

    # ---- fetching ----------------------------------------------------------------------------------------------------

    def _prefetch(self, files: Sequence[Entry]) -> None:
        left, wait = list(files), http.FIRST_WAIT
        while left and self._wanted is files and wait <= http.MAX_WAIT:
            try:
                with self._part(left[0], wait=False) as part:  # None where it is there, or is being fetched
                    if part and not self._fetch(left[0], part, insist=False):
                        return
            except CannotWriteError:
                return
            except FetchError:
                time.sleep(wait)  # without the lock, so that who needs the file need not wait
                wait *= 2
            else:
                left, wait = left[1:], http.FIRST_WAIT

    def _fetch(self, file: Entry, part: IO[bytes], insist: bool) -> bool:
        """Makes a part a whole file; without `insist` not where that needs more room than there is: then returns False."""
        with translate_write_errors(self.folder):
            if not self._made_room(part, keep=() if insist else self._wanted):
                if not insist:
                    remove(Path(part.name))
                    return False
                self._tell_too_small()
            wanted = _range(file)
            http.fetch(wanted, part, insist)
            part.flush()
            os.fsync(part.fileno())
            sha256 = wanted.file.sha256 if wanted.whole else None
            if sha256 and (found := hash_of(Path(part.name))) != sha256:
                remove(Path(part.name))
                raise FetchError(f"{wanted.file.name} was fetched with the hash {found} in place of {sha256}; start again")
            os.replace(part.name, self._path(file))
        return True

    def _tell_too_small(self) -> None:
        if not self._told:
            self._told = True
            say(f"warning: the files in use fill shard_cache_gb {self.max_bytes / 1e9:g} of {self.folder}; more is taken than that")

    # ---- files -------------------------------------------------------------------------------------------------------

    def _path(self, file: Entry, kind: str = "shard") -> Path:
        wanted = _range(file)
        name = wanted.file.sha256 or f"{wanted.file.name}\n{wanted.file.version}"
        text = name if wanted.whole else f"{name}\n{wanted.start}-{wanted.stop}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}-{len(wanted)}.{kind}"

    def _opened(self, file: Entry) -> IO[bytes] | None:
        """The file with a shared lock; None if it is not there."""
        path = self._path(file)
        try:
            found = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        fcntl.flock(found, fcntl.LOCK_SH)
        if not _is_at(found, path):  # it was removed meanwhile
            found.close()
            return None
        with contextlib.suppress(OSError):  # of a cache of another user
            os.utime(path)
        return found

    @contextlib.contextmanager
    def _part(self, file: Entry, wait: bool) -> Iterator[IO[bytes] | None]:
        """The part of a file, exclusively locked; None where the whole file is there, or, without `wait`, where another process has it."""
        path = self._path(file, "part")
        while True:
            with translate_write_errors(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                part = open(path, "ab+")  # noqa: SIM115
            try:
                if not _is_ours(part):
                    if not wait:
                        yield None
                        return
                    # Until the process that fetches it is done. An exclusive lock would wait also for all that then read the file.
                    fcntl.flock(part, fcntl.LOCK_SH)
                    continue
                if self.has(file):
                    if _is_at(part, path):
                        remove(path)
                    yield None
                    return
                if _is_at(part, path):
                    if os.fstat(part.fileno()).st_mtime < time.time() - time.monotonic():
                        part.truncate(0)  # older than the start of the machine: a power cut may have lost what was in it
                    yield part
                    return
            finally:
                with contextlib.suppress(OSError):  # what could not be written has been said
                    part.flush()
                fcntl.flock(part, fcntl.LOCK_UN)  # for a process that was forked meanwhile has the lock, too, until it ends
                part.close()

    def _made_room(self, part: IO[bytes], keep: Sequence[Entry]) -> bool:
        """Removes files until all fit; whether they do. Files that are being fetched count with their whole size."""
        kept = {part.name, *(str(self._path(entry)) for entry in keep)}
        with open(self.folder / _LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Thousands of row groups: of each the name only, which has the size, unless there is no room.
            sizes = {found.string: int(found[1]) for found in map(_ENTRY.fullmatch, os.listdir(self.folder)) if found}
            total = sum(sizes.values())
            if total > self.max_bytes:
                for path in sorted((os.path.join(self.folder, name) for name in sizes), key=_last_use):
                    if total <= self.max_bytes:
                        break
                    if path not in kept and _removed(Path(path)):
                        total -= sizes[os.path.basename(path)]
            return total <= self.max_bytes


def _range(entry: Entry) -> FileRange:
    return entry if isinstance(entry, FileRange) else FileRange(entry, 0, entry.size)


def _is_ours(file: IO[bytes]) -> bool:
    """Takes an exclusive lock on an open file, unless another has one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _last_use(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:  # removed or renamed meanwhile
        return 0.0


def _removed(path: Path) -> bool:
    """Removes a file that is neither read nor being fetched; whether it did."""
    try:
        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
