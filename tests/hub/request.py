"""One request: its body, its answer, its line in the log, and the fault that befalls it."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .errors import HubError
from .store import pieces_of

if TYPE_CHECKING:
    from .faults import Fault
    from .server import HubServer

PIECE = 1 << 16
DAILY = "/api/agent-harnesses"  # what the client asks once a day, unasked; faults are not for it
JSON = "application/json; charset=utf-8"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: to close is to reset
ARRIVAL = 0.05  # seconds for what was sent to be read; a reset takes with it what was not


class Request(BaseHTTPRequestHandler):
    """Functions of routes read `query`, `body` and `headers`, and call one of `send`, `send_json` and `send_file`."""

    protocol_version = "HTTP/1.1"
    server_version = "hub"
    disable_nagle_algorithm = True
    hub: HubServer  # set on a class of its own for each server

    # ---- its course ------------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.url_path = address.path
        self.query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        self.record: dict[str, Any] = {
            "method": self.command,
            "path": unquote(address.path),
            "query": address.query,
            "auth": "Authorization" in self.headers,
            "range": self.headers.get("Range"),
            "seconds": round(time.monotonic() - self.hub.started, 3),
            "received": 0,
            "status": None,
        }
        self.body = self._body()
        self.fault: Fault | None = None if self.url_path == DAILY else self.hub.faults.take(self.command, self.record["path"])
        self.hub.log.append(self.record)
        try:
            self._answer_or_fail()
        except HubError as error:
            self._refuse(error)
        except ConnectionError:  # the client has left
            self.record["status"] = self.record["status"] or "left"
            self.close_connection = True
        except Exception as error:  # ours; said to both sides, as a thread's own end would pass for a lost connection
            self.record["error"] = traceback.format_exc()
            self._refuse(HubError(500, f"the stand-in for the Hub failed: {error!r}"))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _answer_or_fail(self) -> None:
        if self.fault is not None:
            time.sleep(self.fault.delay)
            if self.fault.until:
                self.fault.until.wait()
        if self._suffers("status"):
            raise self.fault.error()
        if self._suffers("drop"):
            self._close()
        elif self._suffers("drop_upload"):
            while self.record["received"] < self.fault.after_bytes and next(self.body, b""):
                pass
            self._close()
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        found = self.hub.routes.find(self.command, self.url_path)
        if found is None:
            raise HubError(404, f"no route {self.command} {self.url_path}")
        function, parts = found
        function(self, **parts)

    def _suffers(self, action: str) -> bool:
        return self.fault is not None and self.fault.action == action

    def _refuse(self, error: HubError) -> None:
        if isinstance(error.body, str):
            self.send(error.body.encode(), error.status, error.headers, "text/html")
        else:
            self.send_json(error.body, error.status, error.headers)

    def _close(self) -> None:
        """Ends the connection as the fault has it."""
        self.record["status"] = "drop"
        self.close_connection = True
        if self.fault.fin:
            self.connection.shutdown(socket.SHUT_WR)
            self._drain()  # to close with bytes unread would be to reset
        else:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.connection.close()  # here, as the server would say an orderly end first

    def log_message(self, *_args: Any) -> None:
        """Nothing on stderr: there is `hub.log`."""

    # ---- what came -------------------------------------------------------------------------------------------------------

    def _body(self) -> Iterator[bytes]:
        """The body in pieces. Who stops midway leaves the rest to who goes on."""
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        for piece in self._chunks() if chunked else self._pieces(int(self.headers.get("Content-Length", 0))):
            self.record["received"] += len(piece)
            yield piece

    def _pieces(self, count: int) -> Iterator[bytes]:
        while count > 0:
            piece = self.rfile.read(min(PIECE, count))
            if not piece:
                raise ConnectionResetError
            count -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline()
            if not line:
                raise ConnectionResetError
            size = int(line.split(b";")[0], 16)
            yield from self._pieces(size)
            self.rfile.readline()
            if size == 0:
                return

    def _drain(self) -> None:
        for _ in self.body:
            pass

    def read(self) -> bytes:
        return b"".join(self.body)

    def read_json(self) -> Any:
        return json.loads(self.read() or b"{}")

    # ---- what is sent ----------------------------------------------------------------------------------------------------

    def send(self, content: bytes = b"", status: int = 200, headers: dict[str, str] | None = None, kind: str = JSON) -> None:
        self._send([content], len(content), status, {"Content-Type": kind, **(headers or {})})

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, headers)

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """A whole file, or the range of it that is asked for."""
        size = path.stat().st_size
        asked = _range(self.headers.get("Range", ""), size)
        start, end = asked or (0, size)
        usual = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if asked:
            usual["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(pieces_of(path, start, end - start), end - start, 206 if asked else 200, {**usual, **headers})

    def _send(self, pieces: Iterable[bytes], size: int, status: int, headers: dict[str, str]) -> None:
        self._drain()  # what is left of the body would pass for the connection's next request
        if self._suffers("drop_after"):
            self._close()
            return
        self.record["status"] = status
        self.send_response(status)
        for name, value in {"Content-Length": str(size), "X-Request-Id": uuid.uuid4().hex, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(pieces)

    def _write(self, pieces: Iterable[bytes]) -> None:
        left = self.fault.after_bytes if self._suffers("truncate") else None
        for piece in pieces:
            if left is not None and len(piece) > left:
                self.wfile.write(piece[:left])
                time.sleep(ARRIVAL)
                self._close()
                return
            self.wfile.write(piece)
            if left is not None:
                left -= len(piece)


def _range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of what a Range header asks for; None if it asks for all.

    Raises:
        HubError: 416, there is nothing of it.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if found is None or not (found[1] or found[2]):
        return None
    if found[1]:
        start, end = int(found[1]), min(int(found[2] or size - 1) + 1, size)
    else:
        start, end = max(size - int(found[2]), 0), size
    if start >= end:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end
