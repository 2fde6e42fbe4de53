"""Every operation on files, as it happens: to end the process at any of them, to see their order, and to cut the power."""

import builtins
import itertools
import os
import pathlib
import shutil
from pathlib import Path


class Killed(BaseException):
    """The process ends here: nothing after it runs, not even the handling of errors."""


OPERATIONS = [
    (builtins, "open"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rmdir"),
]


def replace_function(patch, module, name, function):
    """Also among the functions of `os` that pathlib of Python 3.10 took when it was imported."""
    patch.setattr(module, name, function)
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if module is os and name != "open" and hasattr(accessor, name):
        patch.setattr(accessor, name, staticmethod(function))


def kill_at(patch, k):
    """Ends the process, so to say, at its k-th operation on files, and at all after it."""
    count = itertools.count(1)
    for module, name in OPERATIONS:
        original = getattr(module, name)

        def counted(*args, original=original, **kwargs):
            if next(count) >= k:
                raise Killed
            return original(*args, **kwargs)

        replace_function(patch, module, name, counted)


class Recorder:
    """What was done to the files of a folder, in order: ("sync" | "rename" | "remove" | "mkdir", path, target or content)."""

    def __init__(self, patch, folder):
        self.folder, self.log = Path(folder).resolve(), []
        fsync, rename, replace, mkdir, unlink, rmdir = (getattr(os, n) for n in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"))

        def synced(descriptor):
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._note("sync", path, path.read_bytes() if path.is_file() else None)

        def renamed(one, other, original, **options):
            original(one, other, **options)
            self._note("rename", one, Path(other).absolute())

        def removed(path, original, dir_fd=None, **options):
            if dir_fd is not None:  # as shutil.rmtree does it
                path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
                dir_fd = None
            original(path, **options)
            self._note("remove", path)

        def made(path, *args, **options):
            mkdir(path, *args, **options)
            self._note("mkdir", path)

        replace_function(patch, os, "fsync", synced)
        replace_function(patch, os, "rename", lambda a, b, **o: renamed(a, b, rename, **o))
        replace_function(patch, os, "replace", lambda a, b, **o: renamed(a, b, replace, **o))
        replace_function(patch, os, "mkdir", made)
        replace_function(patch, os, "unlink", lambda p, **o: removed(p, unlink, **o))
        replace_function(patch, os, "rmdir", lambda p, **o: removed(p, rmdir, **o))

    def _note(self, kind, path, what=None):
        path = Path(path).absolute()
        if self.folder in (path, *path.parents):
            self.log.append((kind, path, what))

    def after_power_cut(self, prefix, start, folder):
        """The folder as it may be found when the power fails after `prefix` operations.

        It began as `start`. Names are on the disk at once, which is the worst case: content only when it was synced.
        """
        shutil.copytree(start, folder, symlinks=True)

        def there(path):
            return folder / path.relative_to(self.folder)

        synced = {}  # content by path
        for kind, path, what in self.log[:prefix]:
            if kind == "mkdir":
                there(path).mkdir(exist_ok=True)
            elif kind == "sync" and what is not None:
                there(path).parent.mkdir(parents=True, exist_ok=True)
                there(path).write_bytes(what)
                synced[path] = what
            elif kind == "rename":
                if not there(path).exists():
                    there(path).write_bytes(b"")  # its name, but nothing that was synced
                os.replace(there(path), there(what))
            elif kind == "remove":
                target = there(path)
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
