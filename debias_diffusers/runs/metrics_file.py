"""metrics.jsonl: one JSON object a line, each step once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import CannotWriteError
from ..utils.files import said_if_not_writable, write_file

METRICS = "metrics.jsonl"
LAST = "last"  # marks a line of metrics that is there because the run ended, not because it was due


class Metrics:
    """metrics.jsonl: one JSON object a line, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._writing = threading.Lock()  # a save beside the training syncs what the training appends to

    def begin_after(self, step: int, goes_on: bool = True) -> None:
        """Drops the lines of later steps, which will be trained again, a last line that was cut off, and that of an end that is none."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if step_of(line) <= step and not (goes_on and LAST in json.loads(line))]
        if kept != lines:
            write_file(self.path, b"".join(kept))

    def append(self, values: dict[str, Any]) -> None:
        """Writes a line. One that cannot be written is kept and written with the next, or refused by `sync`."""
        with self._writing, contextlib.suppress(CannotWriteError):
            self._unwritten += (json.dumps(values) + "\n").encode()
            self._write()

    def _write(self) -> None:
        with said_if_not_writable(self.path), open(self.path, "ab") as file:
            end = file.tell()
            try:
                file.write(self._unwritten)
                file.flush()
                self._unwritten = b""
            except OSError:
                file.truncate(end)  # half a line
                raise

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint must not outlive the metrics of its steps."""
        with self._writing:
            self._write()
        with said_if_not_writable(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def step_of(line: bytes) -> float:
    """The step of a line of metrics; infinite where the line was cut off or torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
