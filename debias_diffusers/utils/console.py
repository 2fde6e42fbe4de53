"""Standard streams whose errors never stop a command: a closed descriptor, broken pipe, full disk, or character that cannot be encoded."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class _Unfailing(io.FileIO):
    """A file descriptor that drops what it cannot write and keeps the first error."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            return len(data)


def ignore_stream_errors() -> None:
    """Replaces stdout and stderr by streams that drop what they cannot write. Streams set by others, such as a notebook, stay."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would get this number, and the output of libraries with it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _unfailing(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _unfailing(sys.stderr, 2)


def _unfailing(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None:
        stream.flush()
    encoding = stream.encoding if stream is not None else "utf-8"
    binary = io.BufferedWriter(_Unfailing(descriptor, "w", closefd=False))
    at_once = descriptor == 2 or (stream is not None and stream.isatty())
    return io.TextIOWrapper(binary, encoding, errors="backslashreplace", line_buffering=at_once, write_through=at_once)


def stdout_error() -> OSError | None:
    """The first error of writing to stdout; None if all output was written."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Unfailing):
        return None
    sys.stdout.flush()
    return raw.problem


def say(message: str) -> None:
    """Prints a line for the user on stderr, above a progress bar there. Errors of writing are ignored."""
    if sys.stderr is not None:  # None if the descriptor was closed at the start; print would then use stdout
        bars = sys.modules.get("tqdm")  # which takes its bar away, writes, and shows it again
        with contextlib.suppress(OSError, ValueError):
            if bars is not None and sys.stderr.isatty():
                bars.tqdm.write(message, file=sys.stderr)
            else:
                print(message, file=sys.stderr, flush=True)
