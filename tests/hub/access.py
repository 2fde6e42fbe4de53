"""Who asks, and what they may see and do."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import HubError
from .request import Request
from .store import Repository


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        return self.owns(repo_id) and self.role != "read"


USERS = {"hf_write": User("alice", ("lab",)), "hf_read": User("bob", role="read")}  # by token


def user(request: Request) -> User | None:
    """Who the token is of; None without one.

    Raises:
        HubError: 401, the token is unknown.
    """
    header = request.headers.get("Authorization")
    if header is None:
        return None
    known: User | None = request.hub.users.get(header.removeprefix("Bearer "))
    if known is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return known


def known_user(request: Request) -> User:
    """Who asks.

    Raises:
        HubError: 401, nobody that is known.
    """
    known = user(request)
    if known is None:
        raise HubError(401, "Invalid username or password.")
    return known


def readable(request: Request, kind: str, repo_id: str) -> Repository:
    """A repository that the user may see. Private ones are hidden from others: 401 for nobody, 404 for somebody.

    Raises:
        HubError: 401 or 404, with the code of a missing repository.
    """
    asking = user(request)
    repository = request.hub.store.repositories.get((kind, repo_id))
    if repository is not None and (not repository.private or (asking and asking.owns(repo_id))):
        return repository
    if asking:
        raise HubError(404, "Repository not found", "RepoNotFound")
    raise HubError(401, "Invalid username or password.", "RepoNotFound")


def writable(request: Request, kind: str, repo_id: str) -> Repository:
    """A repository that the user may change.

    Raises:
        HubError: as of `readable`; 401 for nobody, 403 without the right.
    """
    repository = readable(request, kind, repo_id)
    if not known_user(request).may_write(repo_id):
        raise HubError(403, "Forbidden: you don't have the required permissions (write)")
    return repository


def check_signature(request: Request, *what: str) -> None:
    """For addresses that carry the right to what they name. Storages refuse a token beside it; it must not leak there.

    Raises:
        HubError: 400 for a token, 403 for a signature that is not ours.
    """
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    if request.query.get("signature") != request.hub.signature(*what):
        raise HubError(403, "AccessDenied")
