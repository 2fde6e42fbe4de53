"""Decodes, resizes and encodes images; checks their limits; makes grids."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import InputError, reason
from . import image_metadata

SOFTWARE = "debias_diffusers"  # the Software tag of pictures that this package writes
TILE = 48  # pixels a side of the smallest images in grids
FONT_SIZE = 14  # pixels, of names in grids
TEXT_SIZE, LINE, TEXT_WIDTH, TEXT_LINES = 12, 15, 120, 6  # of texts beside or under images: pixels, but for the lines at most
SMALLEST, LARGEST, MARGIN = 64, 256, 6  # pixels a side of images with texts
RESAMPLING = "bicubic, antialiased"  # how images are resized
MAX_PIXELS = 2**26  # of an image file: 8192 x 8192, which take 268 MB as RGB in Pillow
# Pillow's formats of raster images, without documents, vector graphics, films and formats that need other programs.
FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
EXTENSIONS = tuple(extension for extension, kind in Image.registered_extensions().items() if kind in FORMATS)
_READ = [kind for kind in FORMATS if kind in Image.OPEN]  # Pillow would open any other, too, and start Ghostscript for an EPS file

_GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I", "F"}

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = {_TURNED[orientation] for orientation in (5, 6, 7, 8)}  # height and width

# Pillow keeps the more significant byte of a 16-bit colour. With the opposite byte order it keeps the less significant one. In native
# order (N) the decoder has swapped the bytes. Grey with alpha has no opposite order, but read as four bytes it gives both.
_GREY_ALPHA_16 = "LA;16B"
_OTHER_BYTE = {
    f"{colours};16{order}": f"{colours};16{other}"
    for colours in ("RGB", "RGBA", "RGBX", "CMYK")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
} | {_GREY_ALPHA_16: "RGBA"}
_STRIP = 64  # rows that are processed at once, to save memory


def is_image(path: Path) -> bool:
    """Whether a file starts with the signature of one of the `FORMATS`, whatever its name. (TGA has no signature.)"""
    try:
        with Image.open(path, formats=[kind for kind in _READ if kind != "TGA"]):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # a damaged or hostile file may provoke any
        return False


def decode(data: bytes, where: str, least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image file to grey ("L") or colour ("RGB").

    With `least` (height, width), JPEG is decoded at 1/2, 1/4 or 1/8 of its size (Pillow's draft) as long as it then has these sides.

    The EXIF orientation is applied; other metadata and colour profiles are ignored. Transparent images are blended with white, 16 bits
    are scaled to 8, CMYK is converted to RGB. Of an animation, the first frame is decoded.

    Raises:
        InputError: names `where`; not an image, damaged, of 32-bit values without a known range, or of more than `MAX_PIXELS`.
    """
    with _explained_errors(where):
        data, found = image_metadata.strip_metadata(data)
        with Image.open(io.BytesIO(data), formats=_READ) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}; make it smaller")
            if least and image.format == "JPEG":
                image.draft(None, least if _method(image, found) in _SWAPPING else least[::-1])
            rawmode = _rawmode(image)
            low = _low_bytes(data, rawmode) if rawmode in _OTHER_BYTE else None
            image.load()
            if low is not None:
                _round_to_8(image, low)
            flat = _flat(image, grey=image.mode in _GREY or rawmode == _GREY_ALPHA_16)
            return _turned(flat, image, found)


def extension_of(data: bytes, where: str) -> str:
    """The usual extension of an image file by its content, without a dot.

    Raises:
        InputError: names `where`; it has none of the `FORMATS`.
    """
    with _explained_errors(where), Image.open(io.BytesIO(data), formats=_READ) as image:
        kind = str(image.format)
        return {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """Height and width that `decode` gives, without decoding the pixels.

    Raises:
        InputError: names `where`; the file cannot be read.
    """
    with _explained_errors(where):
        data, found = image_metadata.strip_metadata(data)
        with Image.open(io.BytesIO(data), formats=_READ) as image:
            width, height = image.size
            turned = _method(image, found) in _SWAPPING
            return (width, height) if turned else (height, width)


@contextlib.contextmanager
def _explained_errors(where: str) -> Iterator[None]:
    """Errors of reading an image as an InputError that names it."""
    try:
        yield
    except UnidentifiedImageError:
        raise InputError(f"image {where} cannot be read: it is not an image of a supported format") from None
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(f"image {where} cannot be read: {reason(error)}") from error


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Pillow's name of the pixel layout in the file ("raw mode"); "" if unknown."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _low_bytes(data: bytes, rawmode: str) -> np.ndarray:
    """The less significant bytes of a 16-bit colour image, (H, W, C) uint8."""
    with Image.open(io.BytesIO(data), formats=_READ) as image:
        swapped = _OTHER_BYTE[rawmode]
        for k, (codec, extents, offset, args) in enumerate(image.tile):
            image.tile[k] = ImageFile._Tile(codec, extents, offset, (swapped, *args[1:]) if isinstance(args, tuple) else swapped)
        image.load()
        low = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
        for box in _strips(image):
            strip = np.asarray(image.crop(box))
            low[box[1] : box[3]] = strip[..., [1, 1, 1, 3]] if rawmode == _GREY_ALPHA_16 else strip
    return low


def _round_to_8(image: Image.Image, low: np.ndarray) -> None:
    """Rounds 16-bit colours to 8 bits, in place; the image has the more significant bytes. A transparent colour becomes white."""
    transparent = image.info.pop("transparency", None)
    for box in _strips(image):
        strip = image.crop(box)
        levels = np.asarray(strip).astype(np.uint32) * 256 + low[box[1] : box[3]]
        scaled = _nearest(levels)
        if transparent is not None:
            scaled[(levels == transparent).all(-1)] = 255
        image.paste(Image.frombytes(strip.mode, strip.size, scaled.tobytes()), box)


def _nearest(levels: np.ndarray) -> np.ndarray:
    """Scales 0..65535 to 0..255, rounded, uint8."""
    return ((levels + 128) // 257).astype(np.uint8)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, image.height, _STRIP):
        yield 0, top, image.width, min(top + _STRIP, image.height)


def _flat(image: Image.Image, grey: bool) -> Image.Image:
    wanted = "L" if grey else "RGB"
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # of a grey PPM with more than 8 bits Pillow gives 0 to 65535
        raise ValueError(f"mode {image.mode} has no stated range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # convert("L") would cut every value above 255 to white
        levels = np.asarray(image, dtype=np.uint32)
        scaled = _nearest(levels)
        if "transparency" in image.info:
            scaled[levels == image.info["transparency"]] = 255
        return Image.fromarray(scaled)
    if image.has_transparency_data:
        flat = Image.new(wanted, image.size)
        for box in _strips(image):  # in strips: a large image would need the memory of several copies
            strip = image.crop(box).convert("RGBA")
            flat.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert(wanted), box)
        return flat
    return image if image.mode == wanted else image.convert(wanted)


def _turned(flat: Image.Image, image: Image.Image, found: dict[str, bytes]) -> Image.Image:
    """Applies the orientation of the file."""
    method = _method(image, found)
    return flat if method is None else flat.transpose(method)


def _method(image: Image.Image, found: dict[str, bytes]) -> Image.Transpose | None:
    """What the orientation of a file asks for. For TIFF, where it is a tag and not metadata, Pillow applies it itself."""
    if image.format == "TIFF":
        return None
    told = found or {name: value for name in ("exif", "xmp") if isinstance(value := image.info.get(name), bytes)}
    return _TURNED.get(image_metadata.orientation(told))


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes (bicubic, antialiased) so that the shorter side has `resolution` pixels, and crops the centre to a square."""
    if image.size == (resolution, resolution):
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Width and height of an image when it is resized so that one side has so many pixels, and the other at least so many, rounded."""
    scale = max(height / image.height, width / image.width)
    return max(width, round(scale * image.width)), max(height, round(scale * image.height))


def part_of_resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The part in a box (left, top, right, bottom) of an image that is resized (bicubic, antialiased) to a size (width, height)."""
    if math.prod(size) <= MAX_PIXELS:
        return (image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)).crop(box)
    # Of a very long image, which would take gigabytes, the part alone, whose values may be rounded otherwise.
    left, right = (edge * image.width / size[0] for edge in box[::2])
    top, bottom = (edge * image.height / size[1] for edge in box[1::2])
    region = left, top, min(right, image.width), min(bottom, image.height)
    return image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, region)


def to_array(image: Image.Image) -> np.ndarray:
    """An image as an array (C, H, W) uint8."""
    array = np.array(image)  # a writable copy, for torch
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()


def from_array(array: np.ndarray) -> Image.Image:
    """An array (C, H, W) uint8 with one or three channels as an image."""
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """A grid of images of one size, nearly square without `columns`. Images below `TILE` pixels are enlarged without smoothing."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    return _sheet([images[first : first + columns] for first in range(0, len(images), columns)], [])


def named_grid(names: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A grid with a name beside each row of images; rows may have different lengths. Otherwise as `grid`."""
    return _sheet(rows, names)


def _sheet(rows: Sequence[Sequence[Image.Image]], names: Sequence[str]) -> Image.Image:
    width, height = rows[0][0].size
    scale = max(1, math.ceil(TILE / min(width, height)))
    margin = max(2, scale)
    cell_w, cell_h = scale * width + margin, scale * height + margin
    font = ImageFont.load_default(min(FONT_SIZE, scale * height))
    left = margin + max((math.ceil(font.getlength(name)) + margin for name in names), default=0)
    sheet = Image.new(rows[0][0].mode, (left + max(map(len, rows)) * cell_w, len(rows) * cell_h + margin), "white")
    for place, row in enumerate(rows):
        for column, image in enumerate(row):
            enlarged = image.resize((scale * width, scale * height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * cell_w, margin + place * cell_h))
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(names):
        _, top, _, bottom = font.getbbox(name)
        pen.text((margin, margin + place * cell_h + (scale * height - top - bottom) / 2), name, "black", font)
    return sheet


def captioned_grid(texts: Sequence[str], images: Sequence[Image.Image]) -> Image.Image:
    """A nearly square grid of images of one size, each above its text in lines of its width, or a little more."""
    cells = [_fitted(image) for image in images]
    font, columns = _text_font(), math.ceil(math.sqrt(len(images)))
    width, height = max(cells[0].width, TEXT_WIDTH), cells[0].height
    lines = [_wrapped(text, font, width) for text in texts]
    rows = range(0, len(images), columns)
    below = [_text_height(lines[first : first + columns]) for first in rows]
    sheet = _blank(columns * (width + MARGIN), sum(height + each + 2 * MARGIN for each in below))
    top = MARGIN
    for first, extra in zip(rows, below):
        for place in range(first, min(first + columns, len(images))):
            left = MARGIN + (place - first) * (width + MARGIN)
            sheet.paste(cells[place], (left, top))
            _write(sheet, lines[place], left, top + height + MARGIN // 2, font)
        top += height + extra + 2 * MARGIN
    return sheet


def captioned_rows(texts: Sequence[str], groups: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Groups of images of one size, in rows of so many, with the text of each group beside it."""
    font = _text_font()
    lines = [_wrapped(text, font, TEXT_WIDTH) for text in texts]
    left = TEXT_WIDTH + 2 * MARGIN
    cells = [[_fitted(image) for image in group] for group in groups]
    width, height = cells[0][0].size
    heights = [max(-(-len(group) // columns) * (height + MARGIN), _text_height([text]) + MARGIN) for group, text in zip(cells, lines)]
    sheet = _blank(left + min(columns, max(map(len, cells))) * (width + MARGIN) - MARGIN, sum(heights))
    top = MARGIN
    for group, text, extent in zip(cells, lines, heights):
        _write(sheet, text, MARGIN, top, font)
        for place, cell in enumerate(group):
            sheet.paste(cell, (left + place % columns * (width + MARGIN), top + place // columns * (height + MARGIN)))
        top += extent
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """An image in colour for a sheet with texts: a small one enlarged without smoothing, a large one reduced."""
    colour, side = image.convert("RGB"), max(image.size)
    if side > LARGEST:
        return colour.resize([max(1, round(length * LARGEST / side)) for length in image.size], Image.Resampling.LANCZOS)
    scale = max(1, math.ceil(SMALLEST / min(image.size)))
    return colour.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def _text_font() -> Any:
    """The font that comes with matplotlib, which has most alphabets; Pillow's own is ASCII."""
    found = importlib.util.find_spec("matplotlib")
    places = found.submodule_search_locations if found else None
    try:
        return ImageFont.truetype(str(Path(next(iter(places or ())), "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")), TEXT_SIZE)
    except (OSError, StopIteration):
        return ImageFont.load_default(TEXT_SIZE)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """A text in lines of at most so many pixels, at most `TEXT_LINES`."""
    lines, line = [], ""
    for word in text.split():
        for part in _parts(word, font, width):
            if line and font.getlength(f"{line} {part}") > width:
                lines.append(line)
                line = part
            else:
                line = f"{line} {part}" if line else part
    lines = [*lines, line] if line else lines
    if len(lines) <= TEXT_LINES:
        return lines
    last = lines[TEXT_LINES - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: TEXT_LINES - 1], f"{last}..."]


def _parts(word: str, font: Any, width: int) -> Iterator[str]:
    """A word, or as much of a longer one as fits in each line."""
    while word:
        end = next((end for end in range(1, len(word) + 1) if font.getlength(word[:end]) > width), len(word) + 1)
        yield word[: max(1, end - 1)]
        word = word[max(1, end - 1) :]


def _text_height(lines: Sequence[Sequence[str]]) -> int:
    return max(map(len, lines), default=0) * LINE


def _write(sheet: Image.Image, lines: Sequence[str], left: int, top: int, font: Any) -> None:
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        pen.text((left, top + place * LINE), line, "black", font)


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width + MARGIN, height + MARGIN), "white")


def preview(data: bytes, where: str, side: int) -> bytes:
    """An image file again, reduced to at most `side` pixels a side: as JPEG, or, if it is not reduced and that has fewer bytes, as PNG.

    Raises:
        InputError: as `decode`.
    """
    image = decode(data, where)
    reduced = max(image.size) > side
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    jpeg = _encoded(image, "JPEG", quality=85, optimize=True)
    return jpeg if reduced else min(png(image), jpeg, key=len)


def png(image: Image.Image) -> bytes:
    """Encodes an image as PNG."""
    return _encoded(image, "PNG")


def signed_png(image: Image.Image) -> bytes:
    """Encodes an image as PNG with the Software tag of this package."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    return _encoded(image, "PNG", pnginfo=text)


def software(path: Path) -> str | None:
    """The Software tag of a PNG file; None if it has none or is not PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = image.info.get("Software")
            return found if isinstance(found, str) else None
    except Exception:  # a damaged or hostile file may provoke any
        return None


def webp(image: Image.Image) -> bytes:
    """Encodes an image as lossless WebP. WebP has no grey images, so grey becomes three equal channels."""
    return _encoded(image, "WEBP", lossless=True)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
