"""Faults that a test asks for: which request they meet, and what happens to it."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any

from .errors import HubError

ACTIONS = ("status", "drop", "drop_upload", "drop_after", "truncate", "delay")


@dataclass
class Fault:
    """What happens to requests whose method and path match.

    Attributes:
        method, path: regular expressions; of the whole method, and of any part of the unquoted path.
        action: status (answer with an error), drop (close before the body is read), drop_upload (close after `after_bytes` of the
            body), drop_after (do the work, then close without an answer), truncate (close after `after_bytes` of the answer's
            body), delay (nothing but that).
        times: how many requests; float("inf") for all.
        skip: how many matching requests pass before.
        status, message, code, headers, body: of the answer, as in HubError.
        fin: close in order, and read what is still coming; without it the connection is reset. Clients treat the two differently.
        delay, until: seconds to wait before anything else, and an event to wait for; they go with every action.
    """

    method: str = ".*"
    path: str = ".*"
    action: str = "status"
    times: float = 1
    skip: int = 0
    status: int = 500
    message: str = "injected fault"
    code: str | None = None
    headers: dict[str, str] | None = None
    body: Any = None
    after_bytes: int = 0
    fin: bool = False
    delay: float = 0
    until: threading.Event | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"the action is {self.action!r} and not one of {', '.join(ACTIONS)}")

    def meets(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))

    def error(self) -> HubError:
        return HubError(self.status, self.message, self.code, self.headers, self.body)


class Faults:
    """Those that wait for their requests. The first that meets a request takes it."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)

    def clear(self) -> None:
        with self._lock:
            for fault in self._waiting:
                if fault.until:
                    fault.until.set()
            self._waiting.clear()

    @property
    def left(self) -> float:
        """How many requests are still to meet one."""
        with self._lock:
            return sum(fault.times for fault in self._waiting)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault of a request, counted; None if it has none."""
        with self._lock:
            for fault in self._waiting:
                if not fault.meets(method, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None
