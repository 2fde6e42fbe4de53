"""Uploading: which way each file goes, git-LFS in one piece or in parts, and the commit at the end."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from .access import check_signature, known_user, writable
from .errors import HubError
from .request import Request
from .store import LFS_SUFFIXES, Commit, Entry, Store, pieces_of

LARGEST_REGULAR = 10 << 20


def preupload(request: Request, kind: str, repo: str, revision: str) -> None:
    """Says of each file how it is to be sent, and its hash if there is one of that name: clients do not send the same again."""
    commit = writable(request, kind, repo).at(revision)
    files = request.read_json()["files"]
    request.send_json({"files": [_way(file, commit.tree.get(file["path"])) for file in files], "commitOid": commit.id})


def _way(file: dict[str, Any], there: Entry | None) -> dict[str, Any]:
    large = file["path"].rsplit(".", 1)[-1] in LFS_SUFFIXES or file["size"] >= LARGEST_REGULAR
    answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return {**answer, "oid": there.etag} if there else answer


# ---- git-LFS -----------------------------------------------------------------------------------------------------------


def lfs_batch(request: Request, repo: str, kind: str = "model") -> None:
    """Says where each object is to be sent; one without "actions" has come before."""
    writable(request, kind, repo)
    body = request.read_json()
    many = "multipart" in body["transfers"]
    if request.hub.xet and "xet" in body["transfers"]:  # clients of 1.x offer it and then go there
        transfer, objects = "xet", body["objects"]
    else:
        objects = [_object(request, item["oid"], item["size"], many) for item in body["objects"]]
        transfer = "multipart" if any("header" in item.get("actions", {}).get("upload", {}) for item in objects) else "basic"
    answer = json.dumps({"transfer": transfer, "objects": objects}).encode()
    request.send(answer, kind="application/vnd.git-lfs+json")


def _object(request: Request, sha256: str, size: int, many: bool) -> dict[str, Any]:
    answer = {"oid": sha256, "size": size, "authenticated": True}
    if request.hub.store.large(sha256, size):
        return answer
    hub = request.hub
    upload: dict[str, Any] = {"href": hub.signed("lfs-put", sha256, str(size))}
    if many and size > hub.multipart_over:
        parts = {f"{number:05d}": hub.signed("lfs-part", sha256, str(number)) for number in range(1, -(-size // hub.part_size) + 1)}
        upload = {"href": hub.signed("lfs-complete", sha256, str(size)), "header": {"chunk_size": str(hub.part_size), **parts}}
    return {**answer, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs-verify"}}}


def lfs_put(request: Request, digest: str, number: str) -> None:
    check_signature(request, "lfs-put", digest, number)
    store = request.hub.store
    store.save(request.body, store.object_path(digest), sha256=digest, size=int(number))
    request.send(headers={"ETag": f'"{digest}"'})


def lfs_part(request: Request, digest: str, number: str) -> None:
    check_signature(request, "lfs-part", digest, number)
    store = request.hub.store
    etag = store.save(request.body, store.part_path(digest, int(number)))
    request.send(headers={"ETag": f'"{etag}"'})


def lfs_complete(request: Request, digest: str, number: str) -> None:
    check_signature(request, "lfs-complete", digest, number)
    store = request.hub.store
    paths = [store.part_path(digest, part["partNumber"]) for part in request.read_json()["parts"]]
    if not all(path.exists() for path in paths):
        raise HubError(400, "a part is missing")
    store.save((piece for path in paths for piece in pieces_of(path)), store.object_path(digest), sha256=digest, size=int(number))
    request.send_json({"success": True})


def lfs_verify(request: Request) -> None:
    known_user(request)
    body = request.read_json()
    if request.hub.store.large(body["oid"], body["size"]) is None:
        raise HubError(404, f"object {body['oid']} not found")
    request.send_json({"success": True})


# ---- the commit --------------------------------------------------------------------------------------------------------


def commit(request: Request, kind: str, repo: str, revision: str) -> None:
    if "create_pr" in request.query:
        raise HubError(501, "the stand-in for the Hub has no pull requests")  # rather than a commit that nobody asked for
    repository = writable(request, kind, repo)
    header, *operations = (json.loads(line) for line in request.read().splitlines() if line.strip())
    with repository.lock:
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = repository.at(revision)
        if not parent.id.startswith(header["value"].get("parentCommit") or ""):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for operation in operations:
            _apply(request.hub.store, tree, operation["key"], operation["value"])
        title, message = header["value"]["summary"], header["value"].get("description", "")
        made = Commit(title, message, known_user(request).name, parent.id, tree)
        repository.add(revision, made)
    address = f"{request.hub.page(kind, repo)}/commit/{made.id}"
    request.send_json({"success": True, "commitOid": made.id, "commitUrl": address, "hookOutput": ""})


def _apply(store: Store, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
    """Does one operation of a commit to its tree."""
    path = value["path"]
    if key == "file":
        tree[path] = _small(store, path, base64.b64decode(value["content"]))
    elif key == "lfsFile":
        tree[path] = _large(store, path, value)
    elif key in ("deletedFile", "deletedFolder"):
        for gone in list(_deleted(tree, path, key == "deletedFolder")):
            del tree[gone]
    else:
        raise HubError(400, f"no operation {key}")


def _small(store: Store, path: str, data: bytes) -> Entry:
    if len(data) > LARGEST_REGULAR:
        raise HubError(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    return store.add_blob(data)


def _large(store: Store, path: str, value: dict[str, Any]) -> Entry:
    entry = store.large(value["oid"], value.get("size"))  # a copy comes without its size
    if entry is None:
        raise HubError(400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}")
    return entry


def _deleted(tree: dict[str, Entry], path: str, folder: bool) -> Iterator[str]:
    below = path.rstrip("/") + "/"
    found = [name for name in tree if (name.startswith(below) if folder else name == path)]
    if not found:
        raise HubError(404, f"A {'folder' if folder else 'file'} with this name doesn't exist", "EntryNotFound")
    yield from found


TABLE = (
    ("POST", "/api/{kind}/{repo}/preupload/{revision}", preupload),
    ("POST", "/{page}{repo}\\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", "/lfs-put/{digest}/{number}", lfs_put),
    ("PUT", "/lfs-part/{digest}/{number}", lfs_part),
    ("POST", "/lfs-complete/{digest}/{number}", lfs_complete),
    ("POST", "/lfs-verify", lfs_verify),
    ("POST", "/api/{kind}/{repo}/commit/{revision}", commit),
)
