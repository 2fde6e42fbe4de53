"""Removes the metadata (EXIF, XMP, comments) of image files before decoding, and reads only the orientation from it.

Damaged, unusual or large metadata must not prevent the decoding of valid pixels. Only what is needed is decompressed.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping

# Bytes of compressed text that are decompressed at most; an orientation needs some hundred.
MAX_TEXT_BYTES = 2**20

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PNG_TEXTS = {b"Raw profile type exif": "exif", b"XML:com.adobe.xmp": "xmp"}
_TIFF_XMP = 700
# Tags of a TIFF file that decide its pixels or their orientation.
_TIFF_TAGS = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 336,
    338, 339, 347, *range(512, 522), 529, 530, 531, 532, _TIFF_XMP, 32995, 32996, 32997, 32998, 48129, 50674,
}  # fmt: skip
_ORIENTATION, _INTEGERS = 0x0112, {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}


def strip_metadata(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The bytes of an image file without metadata, and the metadata that may have its orientation, under `exif` and `xmp`.

    Handles PNG, JPEG and TIFF; other formats are returned unchanged. So are the bytes after the first truncated or invalid part.
    """
    if data.startswith(_PNG):
        return _of_png(data)
    if data.startswith(_JPEG):
        return _of_jpeg(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _of_tiff(data), {}
    return data, {}


def orientation(found: Mapping[str, bytes]) -> int:
    """The EXIF orientation (1 to 8) of an image from its `exif` metadata, else from `xmp`; 1 (upright) if neither has it."""
    stated = _of_exif(found.get("exif", b""))
    if stated is None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', found.get("xmp", b""))):
        stated = int(match[1])
    return 1 if stated is None else stated


def _of_exif(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF data, whatever its other entries hold; None if it is missing or unreadable."""
    exif = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "<")
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == _ORIENTATION and kind in _INTEGERS and values == 1:
                return int(struct.unpack_from(order + _INTEGERS[kind], exif, place + 8)[0])
    except struct.error:
        pass
    return None


def _of_png(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Keeps the critical chunks of a PNG file and tRNS (transparency)."""
    view, place = memoryview(data), len(_PNG)
    kept, found = [view[:place]], dict[str, bytes]()
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        after = place + 12 + length
        if after > len(data):
            break
        if not kind[0] & 32 or kind == b"tRNS":
            kept.append(view[place:after])
        elif kind == b"eXIf":
            found["exif"] = data[place + 8 : after - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            found |= _of_text(kind, view[place + 8 : after - 4])
        place = after
    return b"".join([*kept, view[place:]]), found


def _of_text(kind: bytes, chunk: memoryview) -> dict[str, bytes]:
    """The EXIF or XMP data in a text chunk; {} if it has neither or is damaged."""
    keyword = bytes(chunk[:80]).partition(b"\0")[0]
    if keyword not in _PNG_TEXTS:
        return {}
    rest = bytes(chunk[len(keyword) + 1 :])
    try:
        packed = kind == b"zTXt" or (kind == b"iTXt" and rest[0] == 1)
        rest = {b"tEXt": lambda: rest, b"zTXt": lambda: rest[1:], b"iTXt": lambda: rest[2:].split(b"\0", 2)[2]}[kind]()
        text = zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES) if packed else rest
        name = _PNG_TEXTS[keyword]
        # ImageMagick writes EXIF as lines of hexadecimal digits, after a line break, its name and its length.
        return {name: bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii")) if name == "exif" else text}
    except (IndexError, ValueError, zlib.error):
        return {}


def _of_jpeg(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Removes comments and application segments of a JPEG file, but keeps JFIF and Adobe, which define its colours."""
    view, place = memoryview(data), len(_JPEG)
    kept, found = [view[:place]], dict[str, bytes]()
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, place + 1)
        if marker == 0xFF:  # padding
            place += 1
            continue
        after = place + 2 + length
        if marker in (0x00, 0x01, *range(0xD0, 0xDB)) or length < 2 or after > len(data):
            break
        segment = view[place + 4 : after]
        start = bytes(segment[: len(_XMP)])
        if start.startswith(_EXIF) and marker == 0xE1:
            found["exif"] = found.get("exif", b"") + bytes(segment[len(_EXIF) :])  # long data continues in the next segment
        elif start == _XMP and marker == 0xE1:
            found["xmp"] = bytes(segment[len(_XMP) :])
        whole = (marker == 0xE0 and start[:5] == b"JFIF\0" and length >= 16) or (marker == 0xEE and start[:5] == b"Adobe" and length >= 14)
        if whole or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(view[place:after])
        place = after
    return b"".join([*kept, view[place:]]), found


def _of_tiff(data: bytes) -> bytes:
    """Reduces a TIFF file to its first directory and the tags that decide its pixels; unchanged if that directory cannot be read."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    at, counted, size, offset = (8, "Q", 20, "Q") if big else (4, "H", 12, "I")
    try:
        (first,) = struct.unpack_from(order + offset, data, at)
        (count,) = struct.unpack_from(order + counted, data, first)
        begin = first + struct.calcsize(order + counted)
        if begin + count * size > len(data):
            return data
        entries = [data[place : place + size] for place in range(begin, begin + count * size, size)]
        kept = [entry for entry in entries if _decides_pixels(*struct.unpack_from(f"{order}HH", entry))]
        directory = struct.pack(order + counted, len(kept)) + b"".join(kept) + struct.pack(order + offset, 0)
    except struct.error:
        return data
    return b"".join([memoryview(data)[:first], directory, memoryview(data)[first + len(directory) :]])


def _decides_pixels(tag: int, kind: int) -> bool:
    """Whether an entry of a TIFF directory is kept. XMP must have the type of bytes, because Pillow assumes it."""
    return tag in _TIFF_TAGS and (tag != _TIFF_XMP or kind in (1, 7))
