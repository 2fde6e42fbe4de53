"""Free and used main memory, also under the limits of Linux control groups (cgroups)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # all control groups, and the list of this process's groups
# By controller in OWN: the folder of its groups, the files with limit and usage in bytes, and the reclaimable part of the usage.
FILES = {
    "": (GROUPS, "memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}


def free_memory() -> int:
    """Bytes that this process can still allocate: the free memory of the computer, or of its tightest control group."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def peak_memory() -> int:
    """Bytes of main memory that this process has used at most so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _left_in_groups() -> Iterator[int]:
    """The free bytes of each limited control group of this process; batch systems and containers set such limits."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        for controller in set(controllers.split(",")) & set(FILES):
            folder, *names = FILES[controller]
            for above in (group, *group.parents):
                yield from _left(folder / above, *names)


def _left(group: Path, limit: str, use: str, cache: str) -> Iterator[int]:
    try:
        maximum, used = int((group / limit).read_text()), int((group / use).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return
    yield maximum - used + int(stat.get(cache, 0))
