"""Users, repositories, reading, branches and tags."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any
from urllib.parse import parse_qs, quote

from . import card
from .access import check_signature, known_user, readable, writable
from .errors import HubError
from .request import Request
from .store import GITATTRIBUTES, Commit, Entry, Repository, Store

# ---- users and repositories --------------------------------------------------------------------------------------------


def whoami(request: Request) -> None:
    user = known_user(request)
    me = {"id": user.name, "name": user.name, "fullname": user.name}
    orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "admin"} for org in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    request.send_json({"type": "user", **me, "email": f"{user.name}@example.org", "isPro": False, "orgs": orgs, "auth": token})


def create_repo(request: Request) -> None:
    body = request.read_json()
    kind, repo_id = _named(request, body)
    store, address = request.hub.store, request.hub.page(kind, repo_id)
    private = bool(body.get("private")) or body.get("visibility") == "private"  # clients of 1.x say it the first way
    with store.lock:
        if (kind, repo_id) in store.repositories:
            message = f"You already created this {kind} repo"
            raise HubError(409, message, body={"error": message, "url": address})  # with exist_ok the client takes the address from here
        tree = {".gitattributes": store.add_blob(GITATTRIBUTES)}
        first = Commit("initial commit", "", known_user(request).name, None, tree)
        store.repositories[kind, repo_id] = Repository(kind, repo_id, private, first)
    request.send_json({"url": address, "name": repo_id, "id": uuid.uuid4().hex[:24]})


def delete_repo(request: Request) -> None:
    if request.hub.store.repositories.pop(_named(request, request.read_json()), None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    request.send_json({})


def _named(request: Request, body: dict[str, Any]) -> tuple[str, str]:
    """(kind, id) of the repository that a body names, in a place where the user may have it."""
    user = known_user(request)
    kind, repo_id = body.get("type") or "model", f"{body.get('organization') or user.name}/{body['name']}"
    if not user.may_write(repo_id):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{repo_id.split("/")[0]}"')
    return kind, repo_id


def auth_check(request: Request, kind: str, repo: str) -> None:
    readable(request, kind, repo)
    request.send_json({"ok": True})


def auth_check_write(request: Request, kind: str, repo: str) -> None:
    writable(request, kind, repo)
    request.send_json({"ok": True})


def validate_yaml(request: Request) -> None:
    errors, warnings = card.checked(request.read_json()["content"])
    answer = {"errors": [{"message": error} for error in errors], "warnings": [{"message": warning} for warning in warnings]}
    if errors:
        raise HubError(400, "Invalid metadata", body=answer)
    request.send_json(answer)


# ---- reading -----------------------------------------------------------------------------------------------------------


def info(request: Request, kind: str, repo: str, revision: str = "main") -> None:
    repository = readable(request, kind, repo)
    commit = repository.at(revision)
    files = [_sibling(path, entry, "blobs" in request.query) for path, entry in sorted(commit.tree.items())]
    answer = {"_id": repo, "id": repo, "author": repo.split("/")[0], "sha": commit.id, "lastModified": commit.date}
    answer |= {"createdAt": repository.created, "private": repository.private, "gated": False, "disabled": False}
    answer |= {"downloads": 0, "likes": 0, "tags": [], "siblings": files}
    request.send_json({**answer, "modelId": repo} if kind == "model" else answer)


def _sibling(path: str, entry: Entry, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    large = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}} if entry.sha256 else {}
    return {"rfilename": path, "size": entry.size, "blobId": entry.oid, **large}


def tree(request: Request, kind: str, repo: str, revision: str, path: str = "") -> None:
    files = readable(request, kind, repo).at(revision).tree
    below = path.strip("/") + "/" if path else ""
    everything = request.query.get("recursive", "").lower() == "true"
    found = [
        line
        for name, line in _listing(request.hub.store, files).items()
        if name.startswith(below) and (everything or "/" not in name.removeprefix(below))
    ]
    if below and not found:
        raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
    start = int(request.query.get("cursor", 0))
    end = start + request.hub.page_size
    following = f"{request.hub.url}{request.url_path}?recursive={everything}&cursor={end}"
    request.send_json(found[start:end], headers={"Link": f'<{following}>; rel="next"'} if end < len(found) else {})


def paths_info(request: Request, kind: str, repo: str, revision: str) -> None:
    form = parse_qs(request.read().decode())
    there = _listing(request.hub.store, readable(request, kind, repo).at(revision).tree)
    request.send_json([there[path] for path in form.get("paths", []) if path in there])


def _listing(store: Store, files: dict[str, Entry]) -> dict[str, dict[str, Any]]:
    """By path, folders first, what the Hub tells about each."""
    parents = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    folders = {
        path: {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path} for path in sorted(parents)
    }
    return {**folders, **{path: _file(store, path, entry) for path, entry in sorted(files.items())}}


def _file(store: Store, path: str, entry: Entry) -> dict[str, Any]:
    line: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        line["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        if entry.sha256 in store.xet_hashes:
            line["xetHash"] = store.xet_hashes[entry.sha256]
    return line


def commits(request: Request, kind: str, repo: str, revision: str) -> None:
    history = readable(request, kind, repo).history(revision)
    request.send_json(
        [
            {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date, "authors": [{"user": commit.author}]}
            for commit in history
        ]
    )


def resolve(request: Request, repo: str, revision: str, path: str, kind: str = "model") -> None:
    commit = readable(request, kind, repo).at(revision)
    headers = {"X-Repo-Commit": commit.id}
    if path not in commit.tree:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    entry = commit.tree[path]
    if entry.sha256:
        headers |= _elsewhere(request, f"{kind}s/{repo}", commit.id, entry)
        request.send(b"Found. Redirecting", 302, headers, "text/plain")
    else:
        request.send_file(request.hub.store.path(entry), {**headers, "ETag": f'"{entry.etag}"'})


def _elsewhere(request: Request, repo: str, commit: str, entry: Entry) -> dict[str, str]:
    """The headers that say where a large file is: on another host, and in the Xet store if it came that way."""
    hub = request.hub
    headers = {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.etag}"', "Location": hub.signed("cdn", entry.etag)}
    if xet_hash := hub.store.xet_hashes.get(entry.etag):
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{hub.url}/api/{repo}/xet-read-token/{quote(commit)}>; rel="xet-auth"'}
    return headers


def cdn(request: Request, digest: str) -> None:
    check_signature(request, "cdn", digest)
    request.send_file(request.hub.store.object_path(digest), {"ETag": f'"{digest}"'})


# ---- branches and tags -------------------------------------------------------------------------------------------------


def refs(request: Request, kind: str, repo: str) -> None:
    repository = readable(request, kind, repo)
    branches, tags = _references(repository.branches, "refs/heads/"), _references(repository.tags, "refs/tags/")
    request.send_json({"branches": branches, "tags": tags, "converts": []})


def _references(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in names.items()]


def create_branch(request: Request, kind: str, repo: str, name: str) -> None:
    repository, start = writable(request, kind, repo), request.read_json().get("startingPoint") or "main"
    _create(request, repository, repository.branches, name, start)


def create_tag(request: Request, kind: str, repo: str, revision: str) -> None:
    repository = writable(request, kind, repo)
    _create(request, repository, repository.tags, request.read_json()["tag"], revision)


def _create(request: Request, repository: Repository, names: dict[str, str], name: str, revision: str) -> None:
    with repository.lock:
        if name in names:
            raise HubError(409, f"Reference already exists: {name}")
        names[name] = repository.at(revision).id
    request.send_json({}, 201)


def delete_branch(request: Request, kind: str, repo: str, name: str) -> None:
    repository = writable(request, kind, repo)
    if name == "main":
        raise HubError(403, "Cannot delete branch main")
    _delete(request, repository, repository.branches, name)


def delete_tag(request: Request, kind: str, repo: str, name: str) -> None:
    repository = writable(request, kind, repo)
    _delete(request, repository, repository.tags, name)


def _delete(request: Request, repository: Repository, names: dict[str, str], name: str) -> None:
    with repository.lock:
        if names.pop(name, None) is None:
            raise HubError(404, f"Reference {name} not found", "RevisionNotFound")
    request.send_json({})


TABLE = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("GET", "/api/{kind}/{repo}(?:/revision/{revision})?", info),
    ("GET", "/api/{kind}/{repo}/auth-check", auth_check),
    ("GET", "/api/{kind}/{repo}/auth-check/write", auth_check_write),
    ("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?", tree),
    ("POST", "/api/{kind}/{repo}/paths-info/{revision}", paths_info),
    ("GET", "/api/{kind}/{repo}/commits/{revision}", commits),
    ("GET", "/{page}{repo}/resolve/{revision}/{path}", resolve),
    ("GET", "/cdn/{digest}", cdn),
    ("GET", "/api/{kind}/{repo}/refs", refs),
    ("POST", "/api/{kind}/{repo}/branch/{name}", create_branch),
    ("DELETE", "/api/{kind}/{repo}/branch/{name}", delete_branch),
    ("POST", "/api/{kind}/{repo}/tag/{revision}", create_tag),
    ("DELETE", "/api/{kind}/{repo}/tag/{name}", delete_tag),
)
