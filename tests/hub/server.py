"""The stand-in itself: a server on a free port, and what tests ask of it."""

from __future__ import annotations

import hashlib
import math
import threading
import time
import uuid
from dataclasses import asdict
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from . import routes, upload
from .access import USERS
from .faults import Fault, Faults
from .request import DAILY, Request
from .routing import Routes
from .store import Store
from .xet import TABLE as XET_TABLE
from .xet import XetStore


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128  # clients open many connections at once

    def handle_error(self, *_args: Any) -> None:
        """Nothing on stderr: a client that is killed is no news, and our own errors are in the log."""


class HubServer:
    """A Hub, from `with` to its end.

    Tokens: hf_write of alice, who is in the organization lab, and hf_read of bob, which only reads.

    Args:
        root: a folder for the contents of files.
        xet: whether large files go through Xet, as the client prefers; else through git-LFS.

    Attributes:
        url: for HF_ENDPOINT.
        log: a line for each request, in the order of their coming: method, path (unquoted), query, auth (whether a token came), range,
            seconds (since the server's start), received (bytes), status (None until there is one; "drop" for a closed connection, "left"
            where the client closed it), and error, the traceback, where the stand-in itself failed.
        users: by token.
        page_size: entries of one answer to a listing of files.
        multipart_over: larger files go in parts of `part_size` bytes.
    """

    def __init__(self, root: str | Path, xet: bool = False) -> None:
        self.store = Store(Path(root))
        self.xet = XetStore(self.store) if xet else None
        self.routes = Routes((*routes.TABLE, *upload.TABLE, *(XET_TABLE if xet else ())))
        self.faults = Faults()
        self.log: list[dict[str, Any]] = []
        self.users = dict(USERS)
        self.page_size = 1000
        self.multipart_over = 64 << 20
        self.part_size = 16 << 20
        self.started = time.monotonic()
        self._secret = uuid.uuid4().hex
        self._listener = _Listener(("127.0.0.1", 0), type("Request", (Request,), {"hub": self}))
        port = self._listener.server_port
        self.url = f"http://127.0.0.1:{port}"
        self.cdn_url = f"http://localhost:{port}"  # another host to the client, to which its token must not go

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.faults.clear()
        self._listener.shutdown()
        self._listener.server_close()

    # ---- for tests -------------------------------------------------------------------------------------------------------

    def fault(self, **options: Any) -> None:
        """Lays a fault in the way of requests to come: see `faults.Fault`."""
        self.faults.add(Fault(**options))

    def hold(self, **options: Any) -> threading.Event:
        """Holds requests to come until the event that is returned is set or `clear` is called; options as of `faults.Fault`."""
        until = threading.Event()
        self.fault(action="delay", until=until, **{"times": math.inf, **options})
        return until

    def clear(self) -> None:
        """Forgets faults and the log; what was held goes on."""
        self.faults.clear()
        self.log.clear()

    def requests(self) -> list[str]:
        """What was logged, as "METHOD path", without what the client asks once a day."""
        return [f"{line['method']} {line['path']}" for line in self.log if line["path"] != DAILY]

    def commits(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[dict[str, Any]]:
        """Newest first: id, title, message, author, parent, date, and tree: by path the oid, size and sha256 (None of a small file)."""
        return [asdict(commit) for commit in self.store.repositories[kind, repo_id].history(revision)]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """By path, the contents."""
        tree = self.store.repositories[kind, repo_id].at(revision).tree
        return {path: self.store.path(entry).read_bytes() for path, entry in tree.items()}

    # ---- for routes ------------------------------------------------------------------------------------------------------

    def page(self, kind: str, repo_id: str) -> str:
        """The address of a repository for people."""
        return f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"

    def signature(self, *what: str) -> str:
        return hashlib.sha256("/".join((self._secret, *what)).encode()).hexdigest()

    def signed(self, *what: str) -> str:
        """An address at the other host that carries the right to what it names."""
        return f"{self.cdn_url}/{'/'.join(what)}?signature={self.signature(*what)}"
