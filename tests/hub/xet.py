"""The Xet store: files are cut into chunks, chunks are kept in xorbs, and shards say which chunks make up which file.

A file is put together when its shard arrives, so that its SHA-256 can be checked and readers by plain HTTP have it, too.
Names of xorbs and of files are taken as they come: their hashes are not computed here.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow

from .access import check_signature, readable, writable
from .errors import HubError
from .request import Request
from .store import Store

LIFETIME = 3600  # seconds of a token

# A shard is 48 bytes of head and then, for each file, a line, a line for each term, as many for their verification if a
# flag says so, and one for the SHA-256 if another does. Each line has 48 bytes and begins with a hash.
LINE = 48
LAST = b"\xff" * 32
HAS_VERIFICATION = 1 << 31
HAS_SHA256 = 1 << 30

# A xorb is chunks, each after a head of 8 bytes: version, stored size of 3 bytes, scheme, size of 3 bytes. A footer may follow.
HEAD = 8
FOOTER = b"XETBLOB"
PLAIN, LZ4, GROUPED_LZ4 = range(3)


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` of a xorb, which are `size` bytes of a file."""

    xorb: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    offset: int  # of its head in the xorb
    stored: int
    scheme: int
    size: int


# ---- formats -----------------------------------------------------------------------------------------------------------


def read_shard(data: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    """(hash, SHA-256, terms) of each file."""
    lines = (data[at : at + LINE] for at in range(LINE, len(data), LINE))
    for line in lines:
        if line[:32] == LAST:
            return
        flags, count = struct.unpack_from("<II", line, 32)
        terms = [_term(next(lines)) for _ in range(count)]
        if flags & HAS_VERIFICATION:
            for _ in range(count):
                next(lines)
        yield _hash(line), _hash(next(lines)) if flags & HAS_SHA256 else None, terms


def _term(line: bytes) -> Term:
    _flags, size, start, end = struct.unpack_from("<IIII", line, 32)
    return Term(_hash(line), size, start, end)


def _hash(line: bytes) -> str:
    """As Xet writes it: four numbers of 64 bits, little-endian."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", line[:32]))


def read_xorb(data: bytes) -> Iterator[Chunk]:
    offset = 0
    while offset < len(data) and not data.startswith(FOOTER, offset):
        head = data[offset : offset + HEAD]
        chunk = Chunk(offset, int.from_bytes(head[1:4], "little"), head[4], int.from_bytes(head[5:8], "little"))
        yield chunk
        offset += HEAD + chunk.stored


def content(chunk: Chunk, stored: bytes) -> bytes:
    """The bytes of a chunk."""
    if chunk.scheme == PLAIN:
        return stored
    unpacked: bytes = pyarrow.Codec("lz4").decompress(stored, decompressed_size=chunk.size, asbytes=True)
    return _ungrouped(unpacked) if chunk.scheme == GROUPED_LZ4 else unpacked


def _ungrouped(data: bytes) -> bytes:
    """Before they were compressed the bytes were grouped by their place modulo 4, as those of float32 compress better so."""
    mixed, at = bytearray(len(data)), 0
    for place in range(4):
        count = len(mixed[place::4])
        mixed[place::4] = data[at : at + count]
        at += count
    return bytes(mixed)


# ---- the store ---------------------------------------------------------------------------------------------------------


class XetStore:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[str, list[Term]] = {}
        self._chunks: dict[str, list[Chunk]] = {}  # by xorb
        self._lock = threading.Lock()

    def add_xorb(self, name: str, data: bytes) -> bool:
        """Keeps a xorb; returns whether it is new."""
        path = self._store.xorb_path(name)
        with self._lock:
            new = not path.exists()
            self._store.save([data], path)
            self._chunks[name] = list(read_xorb(data))
        return new

    def add_shard(self, data: bytes) -> None:
        """Puts together the files of a shard.

        Raises:
            HubError: a xorb is missing, or a file is not what its SHA-256 says.
        """
        for name, sha256, terms in read_shard(data):
            unknown = {term.xorb for term in terms} - set(self._chunks)
            if unknown or sha256 is None:
                raise HubError(400, f"the shard has unknown xorbs {unknown}" if unknown else "the shard has no SHA-256")
            pieces = (piece for term in terms for piece in self._contents(term))
            self._store.save(pieces, self._store.object_path(sha256), sha256, sum(term.size for term in terms))
            self._files[name] = terms
            self._store.xet_hashes[sha256] = name

    def _contents(self, term: Term) -> Iterator[bytes]:
        with open(self._store.xorb_path(term.xorb), "rb") as file:
            for chunk in self._chunks[term.xorb][term.start : term.end]:
                file.seek(chunk.offset + HEAD)
                yield content(chunk, file.read(chunk.stored))

    def terms(self, name: str, first: int, last: int) -> tuple[list[Term], int]:
        """What holds the bytes `first` to `last` of a file, and how many bytes come before them there.

        Raises:
            HubError: 404 without such a file, 416 without such bytes.
        """
        if name not in self._files:
            raise HubError(404, "file not found")
        touched: list[Term] = []
        position = before = 0
        for term in self._files[name]:
            within: list[int] = []
            for index in range(term.start, term.end):
                size = self._chunks[term.xorb][index].size
                if position <= last and first < position + size:
                    before = before if touched or within else first - position
                    within.append(index)
                position += size
            if within:
                touched.append(self._cut(term, within[0], within[-1] + 1))
        if not touched:
            raise HubError(416, "range past the end")
        return touched, before

    def _cut(self, term: Term, start: int, end: int) -> Term:
        return replace(term, start=start, end=end, size=sum(chunk.size for chunk in self._chunks[term.xorb][start:end]))

    def span(self, xorb: str, start: int, end: int) -> dict[str, int]:
        """The bytes of a xorb that hold chunks `start` to `end`; the last of them counts."""
        first, last = self._chunks[xorb][start], self._chunks[xorb][end - 1]
        return {"start": first.offset, "end": last.offset + HEAD + last.stored - 1}


def _disjoint(terms: list[Term]) -> dict[str, list[list[int]]]:
    """[start, end] of the chunks of each xorb; ranges that overlap would make hf_xet panic."""
    ranges: dict[str, list[list[int]]] = {}
    for term in sorted(terms, key=lambda term: term.start):
        known = ranges.setdefault(term.xorb, [])
        if known and term.start <= known[-1][1]:
            known[-1][1] = max(known[-1][1], term.end)
        else:
            known.append([term.start, term.end])
    return ranges


# ---- routes ------------------------------------------------------------------------------------------------------------


def write_token(request: Request, kind: str, repo: str, revision: str) -> None:
    writable(request, kind, repo)
    _send_token(request, "write")


def read_token(request: Request, kind: str, repo: str, revision: str) -> None:
    readable(request, kind, repo)
    _send_token(request, "read")


def _send_token(request: Request, right: str) -> None:
    """Twice, as the client's Python reads the headers and its Rust the body."""
    address, token, end = request.hub.cdn_url, request.hub.signature("xet", right), int(time.time()) + LIFETIME
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
    request.send_json({"casUrl": address, "accessToken": token, "exp": end}, headers=headers)


def _check_token(request: Request, *rights: str) -> None:
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token not in [request.hub.signature("xet", right) for right in rights]:
        raise HubError(401, "Unauthorized")


def upload_xorb(request: Request, digest: str) -> None:
    _check_token(request, "write")
    request.send_json({"was_inserted": request.hub.xet.add_xorb(digest, request.read())})


def upload_shard(request: Request) -> None:
    _check_token(request, "write")
    request.hub.xet.add_shard(request.read())
    request.send_json({"result": 1})


def reconstruction(request: Request, digest: str) -> None:
    """Says from which ranges of which xorbs a file, or a range of it, is put together."""
    _check_token(request, "read", "write")
    hub = request.hub
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    first, last = (int(asked[1]), int(asked[2])) if asked else (0, 1 << 62)
    terms, before = hub.xet.terms(digest, first, last)
    sources: dict[str, list[dict[str, Any]]] = {
        xorb: [
            {"range": {"start": start, "end": end}, "url": hub.signed("xorb", xorb), "url_range": hub.xet.span(xorb, start, end)}
            for start, end in ranges
        ]
        for xorb, ranges in _disjoint(terms).items()
    }
    parts = [{"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.end}} for term in terms]
    request.send_json({"offset_into_first_range": before, "terms": parts, "fetch_info": sources})


def download_xorb(request: Request, digest: str) -> None:
    check_signature(request, "xorb", digest)
    request.send_file(request.hub.store.xorb_path(digest), {})


# hf_xet first asks for newer addresses, and for chunks that are known; it goes on where there are none (404).
TABLE = (
    ("GET", "/api/{kind}/{repo}/xet-write-token/{revision}", write_token),
    ("GET", "/api/{kind}/{repo}/xet-read-token/{revision}", read_token),
    ("POST", "/v1/xorbs/default/{digest}", upload_xorb),
    ("POST", "/v1/shards", upload_shard),
    ("GET", "/v1/reconstructions/{digest}", reconstruction),
    ("GET", "/xorb/{digest}", download_xorb),
)
