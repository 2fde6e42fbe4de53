"""From a method and a path to the function that answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

Answer = Callable[..., None]  # takes the request, and the parts of the path by name
Table = Iterable[tuple[str, str, Answer]]

# A slash within a revision, a tag or a branch comes quoted, so that each of them is one segment.
PARTS = {
    "kind": "(?P<kind>models|datasets)",
    "page": "(?:(?P<kind>datasets)/)?",  # addresses outside of /api begin with the kind only where it is not a model
    "repo": "(?P<repo>[^/]+/[^/]+?)",
    "revision": "(?P<revision>[^/]+)",
    "name": "(?P<name>[^/]+)",
    "path": "(?P<path>.+)",
    "digest": "(?P<digest>[0-9a-f]{64})",
    "number": r"(?P<number>\d+)",
}


class Routes:
    def __init__(self, table: Table) -> None:
        self._routes = [(method, re.compile(re.sub(r"\{(\w+)\}", _part, pattern)), answer) for method, pattern, answer in table]

    def find(self, method: str, path: str) -> tuple[Answer, dict[str, Any]] | None:
        """The function for a path as it came, quoted, and the parts of it that are there."""
        wanted = "GET" if method == "HEAD" else method
        for route_method, pattern, answer in self._routes:
            if route_method == wanted and (found := pattern.fullmatch(path)):
                parts = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                if "kind" in parts:
                    parts["kind"] = parts["kind"].removesuffix("s")
                return answer, parts
        return None


def _part(placeholder: re.Match[str]) -> str:
    return PARTS.get(placeholder[1], placeholder[0])
