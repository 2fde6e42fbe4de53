"""How much main memory there is left to take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where Linux shows control groups, and which are this process's
# By the controller that OWN names: where its groups are, the files of limit and use, and what of the use is given back when asked for.
FILES = {
    "": (GROUPS, "memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or less where a control group that it belongs to has less."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """For each limited control group over this process: batch systems and containers limit one of them."""
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
        most, used = int((group / limit).read_text()), int((group / use).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return
    yield most - used + int(stat.get(cache, 0))
