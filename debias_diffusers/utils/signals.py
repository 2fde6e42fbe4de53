"""Handlers of SIGINT and SIGTERM for a graceful stop, also when the launcher dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from .launcher import is_launched


class SignalHandler:
    """Records SIGTERM or SIGINT in `signum`, so that the training loop stops after the current step and saves (a graceful stop).

    A second SIGINT ends the process at once; the last checkpoint stays whole. `close`, which `training.start` calls, restores the
    previous handlers. Outside the main thread no handler is installed, because Python delivers signals to the main thread only.
    """

    newest: SignalHandler | None = None  # that is not closed

    def __init__(self, at_once: bool = False) -> None:
        """With `at_once` a signal ends the process until `record` is called, wherever it waits, which no handler of Python would do."""
        self.signum = 0
        SignalHandler.newest = self
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handler = signal.SIG_DFL if at_once else self._on_signal
            self._before = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}

    def record(self) -> None:
        """From now on signals are recorded."""
        for signum in self._before:
            signal.signal(signum, self._on_signal)

    def __enter__(self) -> SignalHandler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restores the previous handlers, unless other code has installed its own in the meantime."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) in (self._on_signal, signal.SIG_DFL):
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        self._before = {}
        SignalHandler.newest = None

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopped at once; the last checkpoint is untouched\n")
            os._exit(128 + signum)
        self.signum = signum


def asked_to_stop() -> int:
    """The signal that asks this process to stop, where a `SignalHandler` has recorded one, or 0; for what is done before a loop."""
    return SignalHandler.newest.signum if SignalHandler.newest else 0


def stop_with_launcher() -> None:
    """Under `accelerate launch` or torchrun, asks Linux to send this process SIGTERM when the launcher dies.

    A terminated launcher does not forward the signal, and its training would continue unseen. Without a launcher nothing is done:
    a shell that ends must not stop a training that was started from it.
    """
    if is_launched():
        stop_with_parent(os.getppid(), signal.SIGTERM)


def stop_with_parent(parent: int, signum: int) -> None:
    """Asks Linux to send this process a signal when the process `parent` dies that has started it; does nothing on other systems."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:  # it died before prctl was called
            os.kill(os.getpid(), signum)
