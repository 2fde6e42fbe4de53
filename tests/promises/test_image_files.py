"""Rows 77 and 78 of docs/reliability.md: metadata never decides whether an image is read, and 16 bits are rounded to 8."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_bad_data import chunk, encoded, grown

from debias_diffusers.data import images
from debias_diffusers.errors import InputError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)

ROW_77 = "metadata never makes an image unreadable, and only the orientation is read from it"
ROW_78 = "16 bits are rounded to 8 in every kind of picture"
UPRIGHT = (np.arange(48, dtype=np.uint8).reshape(2, 8, 3) * 5).copy()
SIDEWAYS = np.ascontiguousarray(np.rot90(UPRIGHT))  # as stored where EXIF says 6


# ---- optional parts ---------------------------------------------------------------------------------------------------


def exif(*entries, order="<", orientation=6, first=8):
    """An EXIF block whose directory has these entries (tag, type, count, value) and the orientation after them."""
    told = [] if orientation is None else [(0x0112, 3, 1, orientation << (16 if order == ">" else 0))]
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in [*entries, *told])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", first)
    return head + struct.pack(f"{order}H", len(body) // 12) + body + bytes(4)


ZERO_RATIONAL, FAR_AWAY = (0x011A, 5, 1, 0), (0x010F, 2, 100, 2**31)  # at the block's own header; after its end
EXIFS = {
    "sound": (exif(), 6),
    "big-endian": (exif(order=">"), 6),
    "a long": (exif((0x0112, 4, 1, 6), orientation=None), 6),
    "text that is not there, before it": (exif(FAR_AWAY), 6),
    "a rational of nothing": (exif(ZERO_RATIONAL), 6),
    "a type that is none": (exif((0x010E, 99, 2**31, 0)), 6),
    "a directory that is not there": (exif(ZERO_RATIONAL, (0x8769, 4, 1, 2**31)), 6),
    "0": (exif(orientation=0), 1),
    "9": (exif(orientation=9), 1),
    "two numbers": (exif((0x0112, 3, 2, 6), orientation=None), 1),
    "text": (exif((0x0112, 2, 1, ord("6")), orientation=None), 1),
    "cut off": (exif()[:12], 1),
    "an offset beyond the end": (exif(first=2**31), 1),
    "not one": (b"\xff" * 40, 1),
    "empty": (b"", 1),
}


def stored(orientation):
    return Image.fromarray(SIDEWAYS if orientation == 6 else UPRIGHT)


def png_with(*chunks, image=None):
    data = encoded(image or Image.fromarray(UPRIGHT))
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(*segments, image=None):
    data = encoded(image or Image.fromarray(UPRIGHT), "JPEG", quality=100, subsampling=0)
    return data[:2] + b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments) + data[2:]


def webp_with(kind, body, image):
    pixels = encoded(image, "WEBP", lossless=True)[12:]
    flags = bytes([{b"EXIF": 8, b"XMP ": 4, b"ICCP": 32}[kind], 0, 0, 0])
    size = b"".join((side - 1).to_bytes(3, "little") for side in image.size)
    extra = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    parts = b"VP8X" + struct.pack("<I", 10) + flags + size + (extra + pixels if kind == b"ICCP" else pixels + extra)
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


HOLDERS = {
    "png": lambda block, image: png_with(chunk(b"eXIf", block), image=image),
    "png of ImageMagick": lambda block, image: png_with(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n")),
        image=image,
    ),
    "jpeg": lambda block, image: jpeg_with((0xE1, b"Exif\0\0" + block), image=image),
    "webp": lambda block, image: webp_with(b"EXIF", block, image),
}


def near(image, array):
    return image.size == (array.shape[1], array.shape[0]) and np.abs(np.asarray(image).astype(int) - array).max() <= 4  # of JPEG


@pytest.mark.row(77, ROW_77)
@pytest.mark.parametrize("holder", HOLDERS)
def test_the_orientation_is_read_whatever_else_the_block_holds(holder, trials):
    for name, (block, orientation) in EXIFS.items():
        image = images.decode(HOLDERS[holder](block, stored(orientation)), name)
        assert near(image, UPRIGHT), name
        trials()


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_HOLDERS = {
    "png": lambda image: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), image=image),
    "png, compressed": lambda image: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), image=image),
    "jpeg": lambda image: jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), image=image),
    "jpeg with EXIF of other things": lambda image: jpeg_with(
        (0xE1, b"Exif\0\0" + exif(ZERO_RATIONAL, orientation=None)), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), image=image
    ),
    "webp": lambda image: webp_with(b"XMP ", XMP, image),
}


@pytest.mark.row(77, ROW_77)
@pytest.mark.parametrize("holder", XMP_HOLDERS)
def test_the_orientation_of_xmp_is_taken_where_exif_has_none(holder):
    assert near(images.decode(XMP_HOLDERS[holder](stored(6)), "here"), UPRIGHT)


def bad_crc(data):
    return data[:-4] + bytes(255 - b for b in data[-4:])


PACKED = zlib.compress(bytes(2**21))
ODD_PARTS = {
    "a text of 2 MB": lambda: png_with(chunk(b"zTXt", b"k\0\0" + PACKED)),
    "an international text of 2 MB": lambda: png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + PACKED)),
    "a profile of 2 MB": lambda: png_with(chunk(b"iCCP", b"k\0\0" + PACKED)),
    "70 MB of texts": lambda: png_with(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 70),
    "plain text of 70 MB": lambda: png_with(*[chunk(b"tEXt", b"k\0" + bytes(10**7))] * 7),
    "EXIF of ImageMagick of 2 MB": lambda: png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + PACKED)),
    "EXIF of ImageMagick that is none": lambda: png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nxyz\n")),
    "XMP that ends early": lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0")),
    "a profile that is not compressed": lambda: png_with(chunk(b"iCCP", b"k\0\0not compressed")),
    "an empty profile": lambda: png_with(chunk(b"iCCP", b"")),
    "a text with another checksum": lambda: png_with(bad_crc(chunk(b"tEXt", b"k\0v"))),
    "an empty gamma": lambda: png_with(chunk(b"gAMA", b"")),
    "an empty resolution": lambda: png_with(chunk(b"pHYs", b"")),
    "an animation of nothing": lambda: png_with(chunk(b"acTL", b"\0")),
    "a short JFIF segment": lambda: jpeg_with((0xE0, b"JFIF\0")),
    "a short Adobe segment": lambda: jpeg_with((0xEE, b"Adobe")),
    "a broken Photoshop segment": lambda: jpeg_with((0xED, b"Photoshop 3.0\x008BIM\x03\xed")),
    "a broken multi-picture segment": lambda: jpeg_with((0xE2, b"MPF\0II*\0\xff\xff")),
    "an odd profile": lambda: jpeg_with((0xE2, b"ICC_PROFILE\0")),
    "a long comment": lambda: jpeg_with(*[(0xFE, bytes(60_000))] * 20),
    "XMP that is no text": lambda: jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 100)),
    "WebP with an odd profile": lambda: webp_with(b"ICCP", b"\xff" * 9, Image.fromarray(UPRIGHT)),
}


@pytest.mark.row(77, ROW_77)
@pytest.mark.parametrize("part", ODD_PARTS)
def test_an_odd_part_does_not_decide(part):
    assert near(images.decode(ODD_PARTS[part](), part), UPRIGHT)


@pytest.mark.row(77, ROW_77)
@pytest.mark.parametrize("part", ("zTXt", "iTXt", "iCCP", "raw profile", "XMP"))
def test_metadata_of_200_mb_is_not_unpacked(part):
    packed = zlib.compress(bytes(2 * 10**8), 9)
    body = {
        "zTXt": chunk(b"zTXt", b"k\0\0" + packed),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + packed),
        "iCCP": chunk(b"iCCP", b"k\0\0" + packed),
        "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + packed),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
    }[part]
    assert grown(lambda: images.decode(png_with(body), "here").size == (8, 2)) < 20_000


@pytest.mark.row(77, ROW_77)
def test_damaged_pixels_are_refused_as_before(trials):
    png, jpeg = png_with(), jpeg_with()
    first = png.index(b"IDAT")
    for data in (
        png[: first + 10],
        png[:first] + bytes(255 - b for b in png[first : first + 30]),
        jpeg[:300],
        png[:29] + bytes(4) + png[33:],
    ):
        with pytest.raises(InputError, match="image here cannot be read"):
            images.decode(data, "here")
        trials()


# ---- TIFF, written here -----------------------------------------------------------------------------------------------


def tiff(array, photometric=2, order="<", packed=False, extra=(), more=()):
    """(H, W, C) uint8 or uint16; `more` are odd entries (tag, type, count, value)."""
    height, width, bands = array.shape
    bits = array.dtype.itemsize * 8
    pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    pixels = zlib.compress(pixels) if packed else pixels
    at_bits = 8 + len(pixels) + len(pixels) % 2
    at_extra = at_bits + 2 * bands
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 8 if packed else 1), (262, 3, 1, photometric), (273, 4, 1, 8),
        (277, 3, 1, bands), (278, 4, 1, height), (279, 4, 1, len(pixels)),
        (258, 3, bands, at_bits if bands > 2 else sum(bits << 16 * k for k in range(bands))), *[(338, 3, 1, kind) for kind in extra], *more,
    ]  # fmt: skip

    def value(kind, count, number):
        return struct.pack(f"{order}HH", number, 0) if (kind, count) == (3, 1) else struct.pack(f"{order}I", number)

    body = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + value(kind, count, number) for tag, kind, count, number in sorted(entries)
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at_extra)
    lead = head + pixels + bytes(len(pixels) % 2) + struct.pack(f"{order}{bands}H", *[bits] * bands)
    return lead + struct.pack(f"{order}H", len(entries)) + body + bytes(4)


ODD_TAGS = {
    "resolution as text": [(282, 2, 4, 0), (283, 2, 4, 0), (296, 3, 1, 3)],
    "resolution of nothing": [(282, 5, 1, 0), (283, 5, 1, 0)],
    "a directory that is not there": [(34665, 4, 1, 2**31), (34853, 4, 1, 3)],
    "a profile beyond the end": [(34675, 7, 2**30, 100)],
    "XMP as text": [(700, 2, 60, 8)],
    "software beyond the end": [(305, 2, 100, 2**31)],
}


@pytest.mark.row(77, ROW_77)
@pytest.mark.parametrize("tags", ODD_TAGS)
def test_odd_tags_of_a_tiff_do_not_decide(tags):
    image = images.decode(tiff(UPRIGHT, more=ODD_TAGS[tags]), tags)
    assert np.asarray(image).tolist() == UPRIGHT.tolist()
    turned = images.decode(tiff(SIDEWAYS, packed=True, more=[*ODD_TAGS[tags], (274, 3, 1, 6)]), tags)
    assert np.asarray(turned).tolist() == UPRIGHT.tolist()


# ---- 16 bits ----------------------------------------------------------------------------------------------------------

VALUES = np.array([0, 1, 128, 129, 255, 256, 257, 385, 386, 32767, 32768, 33024, 65280, 65406, 65407, 65535], dtype=np.uint16)


def deep(bands):
    """(4, 80, bands) with values on both sides of where rounding and cutting off differ."""
    return np.random.default_rng(bands).choice(VALUES, (4, 80, bands)).astype(np.uint16)


def rounded(array):
    """By numpy's division in float64; no value is half-way."""
    return np.rint(array.astype(np.float64) / 257).astype(int)


def on_white(colours, alpha):
    return np.rint((colours * alpha + 255 * (255 - alpha)) / 255).astype(int)


def png16(array, extra=b"", interlaced=False):
    height, width, bands = array.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    passes = (
        [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    )
    parts = [array[top::down, left::right].astype(">u2") for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pnm16(array):
    height, width, bands = array.shape
    return b"P%d %d %d 65535\n" % (6 if bands == 3 else 5, width, height) + array.astype(">u2").tobytes()


KINDS_16 = {
    "png": png16,
    "interlaced png": lambda array: png16(array, interlaced=True),
    "tiff": lambda array: tiff(array, {1: 1, 3: 2}[array.shape[2]]),
    "big-endian tiff": lambda array: tiff(array, {1: 1, 3: 2}[array.shape[2]], order=">"),
    "packed tiff": lambda array: tiff(array, {1: 1, 3: 2}[array.shape[2]], packed=True),
    "packed big-endian tiff": lambda array: tiff(array, {1: 1, 3: 2}[array.shape[2]], order=">", packed=True),
    "pnm": pnm16,
}


@pytest.mark.row(78, ROW_78)
@pytest.mark.parametrize("kind", KINDS_16)
@pytest.mark.parametrize("bands", (1, 3))
def test_16_bits_are_rounded(kind, bands):
    array = deep(bands)
    image = images.decode(KINDS_16[kind](array), kind)
    assert image.mode == ("L" if bands == 1 else "RGB")
    assert np.asarray(image).reshape(array.shape).tolist() == rounded(array).tolist()


@pytest.mark.row(78, ROW_78)
@pytest.mark.parametrize(
    "kind, bands", [("png", 2), ("interlaced png", 2), ("png", 4), ("interlaced png", 4), ("tiff", 4), ("packed tiff", 4)]
)
def test_16_bits_with_alpha_are_rounded_and_lie_on_white(kind, bands):
    """Each of colours and alpha to 8 bits first; grey with alpha is grey."""
    array = deep(bands)
    data = KINDS_16[kind](array) if "png" in kind else tiff(array, packed="packed" in kind, extra=[2])
    image = images.decode(data, kind)
    assert image.mode == ("L" if bands == 2 else "RGB")
    expected = on_white(rounded(array[..., :-1]), rounded(array[..., -1:]))
    assert np.abs(np.asarray(image).reshape(expected.shape).astype(int) - expected).max() <= 1  # Pillow's blending may be one off
    opaque, clear = array[..., -1] == 65535, array[..., -1] == 0
    got = np.asarray(image).reshape(expected.shape)
    assert opaque.any() and (got[opaque] == rounded(array[..., :-1])[opaque]).all() and clear.any() and (got[clear] == 255).all()


@pytest.mark.row(78, ROW_78)
@pytest.mark.parametrize("bands", (1, 3))
def test_a_transparent_colour_of_16_bits_is_white_and_its_neighbours_are_not(bands):
    array = np.full((1, 3, bands), 300, np.uint16)
    array[0, 1] = 301  # the same in 8 bits
    array[0, 2, 0] = 40_000
    image = images.decode(png16(array, chunk(b"tRNS", struct.pack(f">{bands}H", *[300] * bands))), "here")
    expected = rounded(array)
    expected[0, 0] = 255
    assert np.asarray(image).reshape(expected.shape).tolist() == expected.tolist()


@pytest.mark.row(78, ROW_78)
def test_inks_of_16_bits_are_rounded():
    inks = deep(4)
    eight = Image.frombytes("CMYK", (80, 4), rounded(inks).astype(np.uint8).tobytes()).convert("RGB")
    assert np.asarray(images.decode(tiff(inks, 5), "here")).tolist() == np.asarray(eight).tolist()


@pytest.mark.nightly
@pytest.mark.row(78, ROW_78)
def test_the_largest_image_of_16_bits_fits_in_500_mb():
    packer = zlib.compressobj(9)
    line = bytes(1 + 8192 * 6)
    body = b"".join([packer.compress(line) for _ in range(8192)]) + packer.flush()
    header = struct.pack(">IIBBBBB", 8192, 8192, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert grown(lambda: images.decode(data, "large.png").size == (8192, 8192)) < 500_000
