"""Bytes to pixels and back: what is accepted, how it is brought to size, and grids to look at."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .errors import InputError, reason

SOFTWARE = "debias_diffusers"  # in pictures that are results of their own, so that they are known again
MOST_PIXELS = 2**26  # of an image file: 8192 x 8192, which take 268 MB as colours in Pillow
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I", "F"}


def decode(data: bytes, where: str) -> Image.Image:
    """An image file's bytes as grey ("L") or colour ("RGB").

    Rotated as its EXIF tag says; transparent parts lie on white; 16 bits are scaled to 8; CMYK becomes RGB; colour profiles are not
    applied; of an animation, the first picture.

    Raises:
        InputError: not an image, damaged, of 32-bit numbers without a stated range, or of more than `MOST_PIXELS`; names `where`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_PIXELS}; make it smaller")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy of a large one would take as much again
            return _flat(image)
    except UnidentifiedImageError:
        raise InputError(f"image {where} cannot be read: it is no image of a known kind") from None
    except Exception as error:  # a damaged or hostile file may provoke any
        raise InputError(f"image {where} cannot be read: {reason(error)}") from error


def _flat(image: Image.Image) -> Image.Image:
    grey = image.mode in _GREY
    if image.mode in {"I", "F"}:
        raise ValueError(f"mode {image.mode} has no stated range; convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # convert("L") would cut every value above 255 to white
        return Image.fromarray(((np.asarray(image, dtype=np.uint32) + 128) // 257).astype(np.uint8))  # to the nearest
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    wanted = "L" if grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Resized (bicubic, antialiased) so that the shorter side has `resolution` pixels, and the centre cut out."""
    if image.size == (resolution, resolution):
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8."""
    array = np.array(image)  # a copy that may be written to, as torch wants it
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()


def from_array(array: np.ndarray) -> Image.Image:
    """A (C, H, W) uint8 array of one or three channels as an image."""
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def grid(images: Sequence[Image.Image], smallest: int = 48, columns: int | None = None) -> Image.Image:
    """Images of one size in a grid (nearly square if not told its columns) with margins; small ones are enlarged without smoothing."""
    width, height = images[0].size
    scale = max(1, math.ceil(smallest / min(width, height)))
    margin = max(2, scale)
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell_w, cell_h = scale * width + margin, scale * height + margin
    sheet = Image.new(images[0].mode, (columns * cell_w + margin, rows * cell_h + margin), "white")
    for k, image in enumerate(images):
        enlarged = image.resize((scale * width, scale * height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (margin + k % columns * cell_w, margin + k // columns * cell_h))
    return sheet


def png(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes."""
    return _encoded(image, "PNG")


def signed_png(image: Image.Image) -> bytes:
    """The image as a PNG file's bytes, which say that this package wrote them."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    return _encoded(image, "PNG", pnginfo=text)


def software(path: Path) -> str | None:
    """What a PNG file says that it was written by; None where it says nothing, or is no PNG file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = image.info.get("Software")
            return found if isinstance(found, str) else None
    except Exception:  # a damaged or hostile file may provoke any
        return None


def webp(image: Image.Image) -> bytes:
    """The image as a lossless WebP file's bytes. WebP has no grey: it becomes colour of three equal channels."""
    return _encoded(image, "WEBP", lossless=True)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
