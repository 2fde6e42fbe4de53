"""metrics.jsonl, the log of a run: one JSON object per line, each step once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import CannotWriteError
from ..utils.files import translate_write_errors, write_file

METRICS_FILE = "metrics.jsonl"
LAST = "last"  # key in a line that is logged because the run ended, and not because `log_every` asks for it


class MetricsFile:
    """Appends to metrics.jsonl and syncs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten = b""
        self._writing = threading.Lock()  # the thread that saves syncs the file while the training appends to it

    def begin_after(self, step: int, goes_on: bool = True) -> None:
        """Drops lines of later steps, a truncated last line, and with `goes_on` the line that marks the end of the run."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if step_of_line(line) <= step and not (goes_on and LAST in json.loads(line))]
        if kept != lines:
            write_file(self.path, b"".join(kept))

    def append(self, values: dict[str, Any]) -> None:
        """Writes a line. If that fails, the line is kept and written with the next one; `sync` raises the error."""
        with self._writing, contextlib.suppress(CannotWriteError):
            self._unwritten += (json.dumps(values) + "\n").encode()
            self._write()

    def _write(self) -> None:
        # Without a buffer: on a full disk, `truncate` would first try to write what is left in it.
        with translate_write_errors(self.path), open(self.path, "ab", buffering=0) as file:
            end, left = file.tell(), self._unwritten
            try:
                while left:
                    left = left[file.write(left) :]
                self._unwritten = b""
            except OSError:
                file.truncate(end)  # removes half a line
                raise

    def sync(self) -> None:
        """Writes and syncs all lines. Called before a checkpoint, so that a checkpoint on the disk has the metrics of its steps.

        Raises:
            CannotWriteError: a line cannot be written.
        """
        with self._writing:
            self._write()
        with translate_write_errors(self.path), open(self.path, "ab") as file:
            os.fsync(file.fileno())


def step_of_line(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite for a truncated or damaged line."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
