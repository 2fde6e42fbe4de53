"""The one error of the stand-in: an answer that says no."""

from __future__ import annotations

from typing import Any


class HubError(Exception):
    """What a client is told, and how.

    Args:
        status: of HTTP.
        message: for people; also sent as X-Error-Message.
        code: of X-Error-Code, by which the client chooses the class of its exception.
        headers: more of them.
        body: in place of {"error": message}; text is sent as a page of HTML, as proxies do.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, body: Any = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message} if body is None else body
