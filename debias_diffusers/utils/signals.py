"""Signals that ask a run to stop, and the launcher's death."""

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
    """Remembers that SIGTERM or SIGINT asked the run to stop, so that it stops after the step at hand, saved.

    A second SIGINT ends the process at once; the last checkpoint is whole, as always. `close`, which `training.train` calls, gives the
    signals back. In a thread that is not the main one there is nothing to take: Python delivers signals to the main one.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> SignalHandler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts back the handlers that were there before, unless others have been installed since."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not installed from Python
        self._before = {}

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopped at once; the last checkpoint is untouched\n")
            os._exit(128 + signum)
        self.signum = signum


def stop_with_launcher() -> None:
    """Under `accelerate launch` or torchrun: when the launcher dies, be told as by SIGTERM (Linux).

    A launcher that is terminated does not pass the signal on, and its training would go on unseen. Not without a launcher:
    a shell that ends must not end the training that was started from it.
    """
    if is_launched() and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)
