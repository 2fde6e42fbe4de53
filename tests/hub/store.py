"""Repositories and their commits in memory, the contents of files on the disk under their hashes."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from .errors import HubError

PIECE = 1 << 20

# Those of the Hub's that models and data sets of images have.
LFS_SUFFIXES = ("arrow", "bin", "ckpt", "gz", "h5", "npy", "npz", "onnx", "parquet", "pkl", "pt", "pth", "safetensors", "tar", "zip")
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `sha256` is that of a large one, whose `oid` is that of its pointer."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256 or "", self.size))


@dataclass(frozen=True)
class Commit:
    title: str
    message: str
    author: str
    parent: str | None
    tree: dict[str, Entry]
    id: str = field(default_factory=lambda: hashlib.sha1(uuid.uuid4().bytes).hexdigest())
    date: str = field(default_factory=now)


class Repository:
    """Commits, and the branches and tags that name some of them. Whoever changes it holds `lock`."""

    def __init__(self, kind: str, repo_id: str, private: bool, first: Commit) -> None:
        self.kind = kind
        self.id = repo_id
        self.private = private
        self.created = first.date
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lock = threading.RLock()
        self.add("main", first)

    def add(self, branch: str, commit: Commit) -> None:
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or seven digits or more of its own name stand for.

        Raises:
            HubError: 404, as the Hub says it.
        """
        branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
        named = self.branches.get(branch) or self.tags.get(tag)
        if named is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            named = next((name for name in self.commits if name.startswith(revision)), None)
        if named is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[named]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit of a revision and all before it, newest first."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None


class Store:
    """What the Hub has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.xet_hashes: dict[str, str] = {}  # by SHA-256, of large files that came through Xet
        self.lock = threading.RLock()
        for folder in ("blobs", "objects", "parts", "xorbs", "drafts"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def object_path(self, sha256: str) -> Path:
        """Where a large file is, if it is there."""
        return self.root / "objects" / sha256

    def part_path(self, sha256: str, number: int) -> Path:
        return self.root / "parts" / f"{sha256}.{number}"

    def xorb_path(self, name: str) -> Path:
        return self.root / "xorbs" / name

    def path(self, entry: Entry) -> Path:
        """Where the bytes of a file are."""
        return self.object_path(entry.sha256) if entry.sha256 else self.root / "blobs" / entry.oid

    def save(self, pieces: Iterable[bytes], path: Path, sha256: str | None = None, size: int | None = None) -> str:
        """Writes a file that is whole or absent, and returns its SHA-256.

        Raises:
            HubError: the hash or the size is not what was announced.
        """
        draft = self.root / "drafts" / uuid.uuid4().hex
        digest, count = hashlib.sha256(), 0
        try:
            with open(draft, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    count += len(piece)
            if size is not None and size != count:
                raise HubError(400, f"{count} bytes came instead of the {size} that were announced")
            if sha256 is not None and sha256 != digest.hexdigest():
                raise HubError(400, f"BadDigest: the sha256 of what came is {digest.hexdigest()} and not {sha256}")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return digest.hexdigest()

    def add_blob(self, data: bytes) -> Entry:
        """Keeps a small file."""
        entry = Entry(git_oid(data), len(data))
        self.save([data], self.path(entry))
        return entry

    def large(self, sha256: str, size: int | None) -> Entry | None:
        """The entry of a large file that has come before; None if it has not.

        Raises:
            HubError: it has another size.
        """
        path = self.object_path(sha256)
        if not path.exists():
            return None
        stored = path.stat().st_size
        if size not in (None, stored):
            raise HubError(400, f"object {sha256} has {stored} bytes and not {size}")
        return Entry(git_oid(_pointer(sha256, stored)), stored, sha256)


def pieces_of(path: Path, start: int = 0, count: int | None = None) -> Iterator[bytes]:
    """A file, or `count` bytes of it from `start` on."""
    left = path.stat().st_size - start if count is None else count
    with open(path, "rb") as file:
        file.seek(start)
        while left > 0 and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece
