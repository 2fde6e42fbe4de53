"""Uncompressed .tar files in the layout of WebDataset: an image `KEY.jpg`, its label `KEY.cls`, captions `KEY.txt`, or both `KEY.json`.

The members of one image have one name up to the first dot after the last slash.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ...errors import InputError, reason
from .. import images
from ..labels import shortened_list
from .files import Columns, Unit
from .rows import Part, Rows

BLOCK = tarfile.BLOCKSIZE
LABELS = ("cls", "label", "class")  # members, or fields of .json, in this order, where no column is named
CAPTIONS = ("txt", "text", "caption", "prompt")
_IMAGES = {extension.lstrip(".") for extension in images.EXTENSIONS}

Sample = Mapping[str, tarfile.TarInfo]  # members by the rest of their names, such as "jpg", in lower case


def read_rows(file: IO[bytes], name: str, where: str, columns: Columns) -> Part:
    """The rows of the index of a shard; reads all of it.

    Args:
        file: opened, unbuffered.
        name: of the shard in the data set.
        where: the shard for messages.
        columns: of images, labels and captions: the rest of a member's name (`jpg`), or a field of `.json`.

    Raises:
        InputError: it is compressed, truncated, damaged, or has no images; names it.
    """
    rows, found = Rows(where), samples(file, where)
    for key, members in found.items():
        image = _image(members, key, where, columns.image)
        if image is None:
            continue
        fields = _fields(file, members, f"{where}:{key}.json")
        label = _label(_value(file, members, fields, LABELS, columns.label)[0], columns.label is not None, f"{where}:{key}")
        captions = _captions(*_value(file, members, fields, CAPTIONS, columns.caption), f"{where}:{key}")
        rows.add(key, image.offset_data, _read(file, image), label, captions)
    _require_columns(rows, columns, where, sorted({rest for members in found.values() for rest in members}))
    return rows.part([Unit(name, -1, len(rows))], len(found) - len(rows))


def samples(file: IO[bytes], where: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The members of each sample by its key, in the order of the file. Raises InputError where it is not whole."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    buffered = io.BufferedReader(file, 1 << 16)  # type: ignore[type-var]
    try:
        with tarfile.open(fileobj=buffered, mode="r:") as archive:
            for member in archive:
                folder, base = posixpath.split(member.name)
                stem, _, rest = base.partition(".")
                if member.isdir() or not stem or not rest or "__MACOSX" in folder:
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise InputError(
                        f"shard {where} has {member.name} as a link or with holes, and not as bytes in one piece; "
                        f"write it anew with tar --dereference --hard-dereference, without --sparse"
                    )
                members = found.setdefault(posixpath.join(folder, stem), {})
                if members.setdefault(rest.lower(), member) is not member:
                    raise InputError(f"shard {where} has two members {member.name}; keep one")
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"shard {where} is no whole, uncompressed tar file ({reason(error)}); write or fetch it anew") from error
    finally:
        buffered.detach()
    _require_end(file, end, where)
    return found


def _require_end(file: IO[bytes], place: int, where: str) -> None:
    """Raises InputError unless zeros follow to the end: not in a file that was cut between members, or to which another was appended."""
    file.seek(place)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise InputError(f"shard {where} is truncated: it ends without the blocks of zeros that end a tar file; write or fetch it anew")
    while block:
        if block.strip(b"\0"):
            raise InputError(f"shard {where} is damaged at byte {place}, or another file was appended to it; write it anew")
        place += len(block)
        block = file.read(1 << 20)


def _read(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset_data)


def _image(members: Sample, key: str, where: str, column: str | None) -> tarfile.TarInfo | None:
    if column is not None:
        return members.get(column.lower())
    found = [rest for rest in members if rest in _IMAGES]
    if len(found) > 1:
        raise InputError(f"shard {where} has several images of {key}: {', '.join(found)}; name one with --image_column, such as {found[0]}")
    return members[found[0]] if found else None


def _fields(file: IO[bytes], members: Sample, where: str) -> Mapping[str, Any]:
    """The fields of the .json of an image."""
    if "json" not in members:
        return {}
    try:
        found = json.loads(_read(file, members["json"]))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where} holds no JSON object")
    return found


def _value(file: IO[bytes], members: Sample, fields: Mapping[str, Any], usual: tuple[str, ...], column: str | None) -> tuple[Any, bool]:
    """The text of a member, or the value of a field of .json, by the first name that there is; and whether it is that of a member."""
    for name in usual if column is None else (column,):
        if name in members and name != "json":
            return _read(file, members[name]).decode("utf-8-sig", errors="surrogateescape"), True
        if fields.get(name) is not None:
            return fields[name], False
    return None, False


def _label(label: Any, named: bool, where: str) -> str | None:
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        if not named:  # what a field has that happens to be called label must not refuse the image to who trains without classes
            return None
        raise InputError(f"image {where} has label {label!r:.80}, but labels must be whole numbers or text")
    return None if label is None else str(label).strip() or None


def _captions(found: Any, is_member: bool, where: str) -> list[str]:
    """The lines of a text, as beside the images of a folder; or a text or a list of texts of .json."""
    if is_member:
        return found.split("\n")  # type: ignore[no-any-return]
    values = [each for each in (found if isinstance(found, list) else [found]) if each is not None]
    if wrong := [each for each in values if not isinstance(each, str)]:
        raise InputError(f"image {where} has caption {wrong[0]!r:.80}, but captions must be texts")
    return values


def _require_columns(rows: Rows, columns: Columns, where: str, extensions: Sequence[str]) -> None:
    """Raises InputError where a column was named that no image of the shard has. `extensions` are those of all members."""
    if not len(rows):
        what = f" in {columns.image}" if columns.image else ""
        others = f", only {shortened_list(extensions, 5)}; name one with --image_column, or" if extensions else ";"
        raise InputError(f"shard {where} holds no images{what}{others} leave it out")
    if columns.label is not None and not any(label is not None for label in rows.labels):
        raise InputError(f"label_column is {columns.label}, but no image of shard {where} has such a member or field of .json")
    if columns.caption is not None and not any(rows.captions):
        raise InputError(f"caption_column is {columns.caption}, but no image of shard {where} has such a member or field of .json")
