"""What becomes of an image file, by golden pixels."""

import io
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from debias_diffusers.data import images
from debias_diffusers.data.labels import row_names
from debias_diffusers.errors import InputError


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image, kind="PNG", **options):
    return images.decode(encoded(image, kind, **options), "here")


def test_grey_stays_grey_and_colour_stays_colour():
    assert decoded(Image.new("L", (2, 2), 7)).mode == "L"
    assert decoded(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == 255
    assert decoded(Image.new("RGB", (2, 2), (1, 2, 3))).getpixel((0, 0)) == (1, 2, 3)
    palette = Image.new("RGB", (2, 2), (9, 8, 7)).quantize(2)
    assert palette.mode == "P" and decoded(palette).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(Image.effect_noise((64, 64), 90))[:900]])
def test_a_broken_file_is_named(content):
    with pytest.raises(InputError, match=r"image faces/3\.png cannot be read"):
        images.decode(content, "faces/3.png")


def test_the_shorter_side_is_resized_and_the_centre_cut_out():
    image = Image.new("L", (30, 10), 0)
    image.paste(200, (10, 0, 20, 10))
    fitted = images.fit(image, 5)
    assert fitted.size == (5, 5) and fitted.getpixel((2, 2)) == 200
    assert images.fit(fitted, 5) is fitted  # already right: untouched


def test_pixels_and_pictures_are_each_others_inverse():
    for shape in ((1, 3, 4), (3, 3, 4)):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert (images.to_array(images.from_array(array)) == array).all()


def test_the_names_of_a_grid_are_those_that_the_font_can_write():
    names = ["cat", "\u00c4rger", "a" * 30, "\u732b", "a\nb", "", " "]
    assert row_names(range(7), names) == ["cat", "Arger", "a" * 20, "class 3", "class 4", "class 5", "class 6"]
    assert row_names([3], None) == ["class 3"]


def test_a_grid_with_names_has_a_row_for_each():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]  # text is grey
    tiles = [Image.new("RGB", (8, 8), colour) for colour in colours]
    sheet = np.asarray(images.named_grid(["cat", "a dog with a name"], [tiles[:2], tiles[2:]])).astype(int)
    places = [np.argwhere((sheet == colour).all(-1)) for colour in colours]
    (_, left), *_ = corners = [tuple(place.min(0).tolist()) for place in places]
    assert corners == [(6, left), (6, left + 54), (60, left)] and all(len(place) == 48 * 48 for place in places)
    assert [(sheet[top : top + 48, :left] < 100).any() for top in (6, 60)] == [True, True]  # the names
    assert (sheet[:, left - 6 : left] == 255).all() and left > 100


def test_a_grid_enlarges_without_smoothing_and_sets_apart():
    tiles = [Image.new("L", (8, 8), value) for value in (10, 20, 30, 40, 50)]
    sheet = images.grid(tiles)
    assert set(np.unique(np.asarray(sheet))) == {10, 20, 30, 40, 50, 255}
    assert (np.asarray(sheet) == 10).sum() == 48 * 48  # 8 pixels, six times larger


def test_a_draft_of_a_jpeg_is_its_average_over_squares_and_of_no_other_file():
    """Golden: the mean over each square of the picture, which a decoder at 1/2, 1/4 or 1/8 keeps of smooth pictures."""
    side = np.linspace(0, 255, 512)
    smooth = Image.fromarray(
        np.stack([side[None] + 0 * side[:384, None], 0 * side[None] + side[:384, None]] * 2, -1)[..., :3].astype(np.uint8)
    )
    data = encoded(smooth, "JPEG", quality=95)
    for least, size in (((384, 512), 1), ((200, 100), 1), ((192, 256), 2), ((100, 128), 2), ((96, 128), 4), ((20, 20), 8)):
        image = images.decode(data, "here", least)
        assert image.size == (512 // size, 384 // size)
        means = np.asarray(smooth, dtype=float).reshape(384 // size, size, 512 // size, size, 3).mean((1, 3))
        assert np.abs(np.asarray(image) - means).mean() < 2
    turned = encoded(smooth, "JPEG", exif=EXIF_6)
    assert images.decode(turned, "here", (256, 192)).size == (192, 256) and images.decode(turned, "here", (192, 256)).size == (384, 512)
    assert images.decode(encoded(smooth), "here", (20, 20)).size == (512, 384)
    with pytest.raises(InputError, match="truncated"):
        images.decode(data[:3000], "here", (20, 20))


EXIF_6 = Image.Exif()
EXIF_6[274] = 6  # turned by a quarter


def test_a_program_for_ghostscript_with_the_name_of_an_image_does_not_run(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    for read in (images.decode, images.size_of, images.extension_of):
        with pytest.raises(InputError, match=r"image x.png cannot be read: it is not an image of a supported format"):
            read(file.getvalue(), "x.png")
    assert not (tmp_path / "ran").exists()


def test_of_a_very_long_image_only_the_crop_is_resized(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 200, 3), dtype=np.uint8))
    size = images.covering_size(image, 64, 48)
    assert size == (2560, 64)
    boxes = [(left, 0, left + 48, 64) for left in (0, 1, 999, 2512)]
    whole = [np.asarray(images.part_of_resized(image, size, box), np.int64) for box in boxes]
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    for box, expected in zip(boxes, whole):
        assert abs(np.asarray(images.part_of_resized(image, size, box), np.int64) - expected).max() <= 1
    monkeypatch.undo()
    spacer = Image.new("RGB", (2, 10_000))
    assert images.part_of_resized(spacer, images.covering_size(spacer, 1024, 1024), (0, 10**6, 1024, 10**6 + 1024)).size == (1024, 1024)
