"""Standard streams of a command that never end its work: closed, broken, full, or of an encoding that lacks a character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class _Unfailing(io.FileIO):
    """A descriptor to write to. What cannot be written is dropped, and the first reason is kept."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            return len(data)


def ignore_stream_errors() -> None:
    """Replaces the standard streams of this process. Those that somebody else has put in place, such as a notebook, stay."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file that is opened would get its number, and what a library says
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
    """Why something that was printed did not get out, if so."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Unfailing):
        return None
    sys.stdout.flush()
    return raw.problem


def say(message: str) -> None:
    """A line for the person in front of the screen; stderr, as the progress bar. Where nobody can be told, the work goes on."""
    if sys.stderr is not None:  # as it is where the descriptor was closed; print would take stdout
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
