"""Files on a server, whole or by ranges: https://..., http://..., and hf://datasets/user/name@commit/path of the Hub. No torch.

A file of the Hub is read at the address that huggingface_hub's own file system reads, which answers ranges. A lost connection is tried
again, with growing waits, until no byte has come for `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import IO, Any, TypeVar

from ..config.hub_names import hub_file
from ..errors import FetchError, InputError, no_client, reason
from ..utils.console import say

T = TypeVar("T")

PATIENCE = 300.0  # seconds without a byte after which a file is given up
FIRST_WAIT, MAX_WAIT = 1.0, 60.0  # seconds before the first and the last attempts; each wait is twice the one before
TIMEOUT = 30.0  # seconds for each phase of a request: connect, send, receive
RETRIED = {408, 425, 429}  # of the 4xx: the server is busy

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server as it was when it was asked for; what is read of it later must be of the same version."""

    name: str  # https://..., http://... or hf://datasets/user/name@revision/path
    size: int  # bytes
    version: str  # its ETag, else the time of its last change; "" where the server tells neither
    ranges: bool = field(default=True, compare=False)  # whether its server answers ranges

    @property
    def sha256(self) -> str | None:
        """Of its bytes, which the Hub tells for large files."""
        return self.version if self.name.startswith("hf://") and _SHA256.fullmatch(self.version) else None


@dataclass(frozen=True)
class FileRange:
    """The bytes of a file on a server from `start` to `stop` (not included)."""

    file: RemoteFile
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether these are all bytes of the file."""
        return len(self) == self.file.size


class AbsentError(FetchError):
    """The server has no such file. One whose files must not be listed, such as S3, may answer 403 then, as where it permits nothing."""


class _TemporaryError(Exception):
    """Another attempt may succeed, after so many seconds at least."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


def find(name: str) -> RemoteFile:
    """Size and version of a file.

    Raises:
        InputError: the address is none.
        FetchError: the server refuses, or cannot be reached.
    """

    def attempt() -> RemoteFile:
        with _request(name, {"Range": "bytes=0-0"}) as response:
            return _described(name, response)

    return _insist(attempt, name)


def read_range(file: RemoteFile, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` (not included) of a file.

    Raises:
        FetchError: as of `find`; the file has changed, or the server does not answer ranges.
    """
    part = io.BytesIO()
    fetch(FileRange(file, start, stop), part)
    return part.getvalue()


def fetch(wanted: FileRange, part: IO[bytes], insist: bool = True) -> None:
    """Writes a range of a file to an open one, after what that has of it already.

    Args:
        wanted: to fetch; a server that does not answer ranges sends whole files only.
        part: opened for reading and writing; what it has must be the beginning of the range.
        insist: try again after a lost connection.

    Raises:
        FetchError: as of `read_range`; without `insist` at once for a lost connection.
    """

    def attempt() -> None:
        if (offset := received()) < len(wanted):
            with _opened(wanted.file, wanted.start + offset, wanted.stop) as (response, whole):
                if whole and not wanted.whole:
                    raise _no_ranges(wanted.file)
                if whole:
                    part.truncate(part.seek(0))
                for piece in response.iter_raw():  # as they come: of larger pieces a lost connection would take the beginning
                    part.write(piece)
        _require_all(received(), len(wanted))

    received = functools.partial(part.seek, 0, os.SEEK_END)
    _insist(attempt, wanted.file.name, received) if insist else _once(attempt, wanted.file.name)


def _no_ranges(file: RemoteFile) -> Exception:
    """Of a server that sent a whole file in place of a range: one that has answered ranges before may do so again."""
    if file.ranges:
        return _TemporaryError("its server sent the whole file in place of a range")
    return FetchError(f"{file.name} cannot be read in parts: its server does not answer ranges; download it")


# ---- requests --------------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> ModuleType:
    """The HTTP library that huggingface_hub brings with it."""
    try:
        import httpx2 as library
    except ImportError:  # huggingface_hub before 2.0
        import httpx as library  # type: ignore[no-redef]
    return library


@functools.cache
def _client(process: int) -> Any:
    """The client of a process: connections must not be shared with one that it forks. Raises FetchError as `no_client` says."""
    try:
        return _library().Client(follow_redirects=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"})
    except Exception as error:  # ImportError of a SOCKS proxy without its package, ValueError, OSError, InvalidURL
        raise FetchError(no_client(error)) from error


def _address(name: str) -> tuple[str, dict[str, str]]:
    """Where a file is, and the headers of a request for it. A redirect to another host goes without the token."""
    if not name.startswith("hf://"):
        return name, {}
    found = hub_file(name)
    if found is None:
        raise InputError(f"{name} is no file of a data set on the Hub; write hf://datasets/user/name/path")
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise FetchError(f"{name} cannot be fetched, because HF_HUB_OFFLINE is set")
    address = huggingface_hub.hf_hub_url(found.repo, found.path, repo_type="dataset", revision=found.revision)
    token = huggingface_hub.get_token()
    return address, {"Authorization": f"Bearer {token}"} if token else {}


@contextlib.contextmanager
def _request(name: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a GET, whose body is still to be read. Raises _TemporaryError, or FetchError where the server refuses."""
    address, more = _address(name)
    library = _library()
    try:
        with _client(os.getpid()).stream("GET", address, headers={**more, **headers}) as response:
            _require_success(name, response)
            yield response
    except (library.InvalidURL, library.UnsupportedProtocol) as error:
        raise InputError(f"{name} is not the address of a file: {reason(error)}") from error
    except library.HTTPError as error:
        raise _TemporaryError(f"the connection was lost ({reason(error)})") from error


def _require_success(name: str, response: Any) -> None:
    status = response.status_code
    if status < 400:
        return
    if status >= 500 or status in RETRIED:
        after = response.headers.get("Retry-After", "")
        raise _TemporaryError(f"its server answers {status}", float(after) if after.isdecimal() else 0.0)
    advice = "; set HF_TOKEN, or ask for access on its page" if status in (401, 403) and name.startswith("hf://") else ""
    what = {401: "its server asks who you are", 403: "its server does not permit it", 404: "there is no such file"}
    kind = AbsentError if status in (403, 404, 410) else FetchError
    raise kind(f"{name} cannot be fetched: {what.get(status, 'its server refuses')} ({status}){advice}")


def _described(name: str, response: Any) -> RemoteFile:
    """What an answer says of the file. Of what lies elsewhere, the Hub says it in the answer that sends there."""
    chain = [*response.history, response]
    linked = next((each.headers for each in chain if "X-Linked-ETag" in each.headers), None)
    version = linked["X-Linked-ETag"] if linked else response.headers.get("ETag") or response.headers.get("Last-Modified", "")
    total = re.fullmatch(r"bytes .*/(\d+)", response.headers.get("Content-Range", ""))
    size = total[1] if total else response.headers.get("Content-Length", "") if response.status_code == 200 else ""
    if not size.isdecimal():
        raise FetchError(f"{name} cannot be fetched: its server does not tell its size")
    return RemoteFile(name, int(size), version.removeprefix("W/").strip('"'), total is not None)


@contextlib.contextmanager
def _opened(file: RemoteFile, start: int, stop: int) -> Iterator[tuple[Any, bool]]:
    """An answer with a range of a file, and whether it is the whole file instead. Raises FetchError where that has changed."""
    with _request(file.name, {"Range": f"bytes={start}-{stop - 1}"}) as response:
        if (now := _described(file.name, response)) != file:
            raise FetchError(
                f"{file.name} has changed on its server: it had {file.size} bytes and the version {file.version or 'unknown'}, "
                f"now {now.size} and {now.version or 'unknown'}"
            )
        whole = response.status_code == 200
        if not whole and not response.headers["Content-Range"].startswith(f"bytes {start}-"):
            raise _TemporaryError("its server answers with another range than it was asked for")
        yield response, whole and (start, stop) != (0, file.size)


def _require_all(received: int, size: int) -> None:
    if received != size:
        raise _TemporaryError(f"the connection ended after {received} of {size} bytes")


def _once(attempt: Callable[[], T], name: str) -> T:
    try:
        return attempt()
    except _TemporaryError as error:
        raise FetchError(f"{name} cannot be fetched: {error}") from error


def _insist(attempt: Callable[[], T], name: str, received: Callable[[], int] = lambda: 0) -> T:
    """What `attempt` returns, called again and again while fewer than `PATIENCE` seconds have passed since a byte came.

    That it is called again is said once.
    """
    wait, told, bytes_before, since = FIRST_WAIT, False, received(), time.monotonic()
    while True:
        try:
            return attempt()
        except _TemporaryError as error:
            if received() > bytes_before:
                wait, bytes_before, since = FIRST_WAIT, received(), time.monotonic()
            pause = max(wait, error.seconds)
            if time.monotonic() + pause - since > PATIENCE:
                raise FetchError(f"{name} cannot be fetched: {error}; tried for {PATIENCE:g} s") from error
            if not told:
                told = True
                say(f"{name}: {error}; trying again for {PATIENCE:g} s")
            time.sleep(pause)
            wait = min(2 * wait, MAX_WAIT)
