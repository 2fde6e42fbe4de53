"""What becomes of an image file, by golden pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from debias_diffusers.data import images
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


def test_a_grid_enlarges_without_smoothing_and_sets_apart():
    tiles = [Image.new("L", (8, 8), value) for value in (10, 20, 30, 40, 50)]
    sheet = images.grid(tiles)
    assert set(np.unique(np.asarray(sheet))) == {10, 20, 30, 40, 50, 255}
    assert (np.asarray(sheet) == 10).sum() == 48 * 48  # 8 pixels, six times larger
