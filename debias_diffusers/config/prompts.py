"""The prompts of a sampling command: of --prompt, or the lines of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import InputError
from ..utils.files import read_file
from .schema.sampling import SampleConfig

MAX_CHARACTERS = 100_000  # of a caption: a text encoder reads some hundred, and millions take minutes to split into tokens


def read_prompts(config: SampleConfig) -> tuple[str, ...]:
    """The prompts of a command; image k of n prompts has prompt k mod n. () where there are none.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or has no prompts.
    """
    if config.prompts is None:
        return config.prompt
    path = Path(config.prompts)
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")  # not splitlines(), which also ends lines at signs within a text
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {path} is not UTF-8: {error}") from error
    found = tuple(line.rstrip("\r") for line in lines if line.strip())
    if not found:
        raise InputError(f"prompts {path} has no prompts; write one a line")
    return found


def broken_text(texts: Iterable[str]) -> str | None:
    """The first text that is not Unicode, as half of a surrogate pair in JSON or a byte of another encoding in a command makes it."""
    return next((text for text in texts if not _is_unicode(text)), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompts_hash(prompts: Sequence[str]) -> str:
    """Identifies a list of prompts, which may have newlines in them."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
