"""Rows 25 to 30 of docs/reliability.md: data as users really have them."""

import ctypes
import io
import json
import os
import platform
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import Forked, cpu_of_children, metrics, newest_step, run, train_args, uncounted
from PIL import Image, ImageCms

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.data import images
from debias_diffusers.data.dataset import TrainingData
from debias_diffusers.data.sources.checks import unreadable_images
from debias_diffusers.data.sources.opening import open_readable, open_source
from debias_diffusers.data.sources.subset import SourceSubset
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.image_sets import images_of_npz
from debias_diffusers.utils.files import read_file

ROW_25 = "every unreadable file is named at the start (from 100 000 images on, with `--check_images all`), or skipped and listed"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed, side=16, mode="L"):
    shape = (side, side) if mode == "L" else (side, side, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def good(tmp_path):
    """200 sound images in two sub-folders."""
    for k in range(200):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(k)))
    return tmp_path / "images"


def damaged(data, first=30):
    """20 bytes of it inverted."""
    return data[:first] + bytes(255 - b for b in data[first : first + 20]) + data[first + 20 :]


def broken_crc(data):
    """A PNG whose header chunk has another checksum."""
    return data[:29] + bytes(255 - b for b in data[29:33]) + data[33:]


PNG, JPEG, WEBP = encoded(noise(1, 64)), encoded(noise(1, 64), "JPEG"), encoded(noise(1, 64), "WEBP", lossless=True)
BAD_BYTES = {
    "empty": b"",
    "text": b"no image at all\n" * 20,
    "html": b"<!doctype html><html><body>404</body></html>",
    "half-png": PNG[: len(PNG) // 2],
    "half-jpeg": JPEG[: len(JPEG) // 2],
    "half-webp": WEBP[: len(WEBP) // 2],
    "crc": broken_crc(PNG),
    "damaged-header": damaged(PNG, 10),
    "damaged-pixels": damaged(PNG, 100),
    "png-signature": PNG[:8],
    "jpeg-signature": JPEG[:3],
    "webp-signature": WEBP[:12],
    "gif-signature": b"GIF89a",
}


def spoil(folder, copies=3):
    """Puts files that cannot be read among the sound ones; returns their names."""
    names = []
    for name, data in BAD_BYTES.items():
        for k in range(copies):
            path = folder / "ab"[k % 2] / f"{name}-{k}.{('png', 'jpg', 'webp')[k % 3]}"
            path.write_bytes(data)
            names.append(path)
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "b" / "dangling.png").symlink_to(folder / "nowhere.png")
    return {str(p) for p in (*names, folder / "a" / "pipe.png", folder / "b" / "dangling.png")}


@pytest.mark.row(25, ROW_25)
def test_all_bad_files_are_found_and_no_good_one(good, trials):
    bad = spoil(good)
    (good / "a" / "folder.png").mkdir()  # its name is no reason to read it
    (good / "b" / "really-a-jpeg.png").write_bytes(JPEG)  # a wrong name does not matter
    source = open_source(DataConfig(dataset=str(good)))
    began = time.process_time()
    found = unreadable_images(source, range(len(source)))
    assert time.process_time() - began < 4
    assert {str(good / source.names[k]) for k in found} == bad and len(bad) == 41
    for sentence in found.values():
        trials()
        assert sentence.startswith("image ") or " cannot be read" in sentence


@pytest.mark.row(25, ROW_25)
def test_by_default_the_run_stops_at_the_start_and_lists_all(good, tmp_path):
    bad = spoil(good)
    code, _, err = run(*train_args(tmp_path / "run", "--dataset", good))
    assert (
        code == 2
        and "Traceback" not in err
        and "41 of 241 images cannot be read, and no more than 1% can be skipped; remove them: 41 problems" in err
    )
    assert all(name in err for name in bad)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.row(25, ROW_25)
def test_more_than_a_hundredth_is_not_skipped(good, tmp_path):
    for k in range(3):
        (good / "a" / f"bad{k}.png").write_bytes(b"broken")
    code, _, err = run(*train_args(tmp_path / "run", "--dataset", good, "--skip_bad"))
    assert code == 2 and "3 of 203 images cannot be read, and no more than 1% can be skipped; remove them" in err


@pytest.mark.row(25, ROW_25)
def test_skipped_images_are_listed_and_the_rest_is_a_data_set_without_them(good, tmp_path):
    """The run over the spoiled folder is that over the sound one, resumed or not, measured or not."""
    sound, spoiled = tmp_path / "sound", tmp_path / "spoiled"
    assert run(*train_args(sound, "--dataset", good, "--max_steps", 12))[0] == 0
    bad = [good / "a" / "050-broken.png", good / "b" / "zzz.jpg"]
    bad[0].write_bytes(JPEG[:500])
    bad[1].symlink_to(good / "nowhere.jpg")
    flags = ["--dataset", good, "--skip_bad", "--eval_every", 6, "--eval_metrics", "colour", "--eval_images", 8]
    for steps in (6, 12):
        code, _, err = run(*train_args(spoiled, *flags, "--max_steps", steps))
        assert code == 0, err
        assert all((f"{path} cannot be read" in err) == (steps == 6) for path in bad)  # looked at once
    state = json.loads((spoiled / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["data"]["images"] == 202 and len(state["data"]["skipped"]) == 2
    trained = [line for line in metrics(spoiled) if "loss" in line]
    assert [line["loss"] for line in trained[:6]] == [line["loss"] for line in metrics(sound)[:6]]
    code, out, err = run("eval.py", "score", spoiled, "--metrics", "colour", "--num_images", 8, "--steps", 2, "--cache_dir", "")
    assert code == 0, err  # its own data, without what it left out
    code, out, err = Forked(*train_args(tmp_path / "dry", *flags, "--dry_run"), before=uncounted).result()
    assert code == 0 and "images: 200" in out
    bad[0].unlink()
    code, _, err = run(*train_args(spoiled, *flags, "--max_steps", 13))
    assert code == 2 and "202 images then, 201 now" in err


@pytest.mark.row(25, ROW_25)
def test_without_some_images_the_order_is_a_function_of_the_position(good):
    source = open_source(DataConfig(dataset=str(good)))
    config = DataConfig(dataset=str(good), resolution=16)
    left = TrainingData(SourceSubset(source, [3, 100]), config, seed=1)
    names = [left.source.read(left.index(p))[2] for p in range(198)]
    assert len(set(names)) == 198 and not {str(good / source.names[k]) for k in (3, 100)} & set(names)
    again = TrainingData(SourceSubset(source, [100, 3]), config, seed=1)
    assert [again.source.read(again.index(p))[2] for p in (197, 5, 0)] == [names[p] for p in (197, 5, 0)]


def test_a_name_that_no_file_can_have_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"cannot be read: (embedded null byte|stat: embedded null character in path)$"):
        read_file(Path("a\0b.png"))


def test_a_row_of_a_table_without_an_image_counts_as_unreadable(tmp_path):
    import datasets

    cells = [{"bytes": encoded(noise(k)), "path": None} for k in range(3)] + [None, {"bytes": b"broken", "path": None}]
    table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image(decode=False)}))
    table.to_parquet(tmp_path / "t.parquet")
    source = open_source(DataConfig(dataset=str(tmp_path / "t.parquet")))
    assert list(unreadable_images(source, range(5))) == [3, 4]
    with pytest.raises(InputError, match="2 of 5 images cannot be read, and no more than 1% can be skipped"):
        open_readable(DataConfig(dataset=str(tmp_path / "t.parquet"), skip_bad=True))


# ---- bombs ------------------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width, height, colour=2):
    """A whole PNG of so many black pixels in a few hundred kB."""
    packer, rows = zlib.compressobj(9), []
    line = bytes(1 + width * (3 if colour == 2 else 1))
    rows = [packer.compress(line) for _ in range(height)] if width * height < 2e8 else [packer.compress(line)]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def many_frames(count):
    """A GIF of one pixel and so many pictures."""
    data = encoded(Image.new("P", (1, 1)), "GIF", duration=10)
    first = data.index(b"\x21\xf9")  # where its one picture begins; the last byte ends the file
    return data[:first] + data[first:-1] * count + b"\x3b"


BOMBS = {
    "30000x30000 header": lambda: (huge_png(30_000, 30_000), "cannot be read"),
    "179 million pixels": lambda: (huge_png(13_400, 13_350), "pixels are more than 67108864; make it smaller"),
    "a little too large": lambda: (huge_png(8193, 8192, colour=0), "8193x8192 pixels are more than"),
    "100000 pictures in one": lambda: (many_frames(100_000), None),
    "another format under the name": lambda: (b"DDS " + bytes(124), "cannot be read"),
    "a text of 100 MB": lambda: (
        b"\x89PNG\r\n\x1a\n" + PNG[8:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))) + PNG[33:],
        None,
    ),
}


def kilobytes(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what))


def grown(work):
    """By how many kB the memory grows at most while a child does some work, which must return True."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)  # what tests before have freed would be taken again, and not seen as growth
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the highest mark of the memory so far is forgotten
            before = kilobytes("VmRSS")
            done = work()
            os.write(writes, str(kilobytes("VmHWM") - before).encode())
            os._exit(0 if done else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    return int(os.read(reads, 100))


@pytest.mark.row(26, "a file that would fill the memory is an error, or is read in chunks")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_memory_and_time(bomb):
    data, said = BOMBS[bomb]()

    def read():
        try:
            return images.decode(data, "bomb").size in ((1, 1), (64, 64)) and said is None
        except InputError as error:
            return said in str(error)

    with cpu_of_children() as cpu:
        assert grown(read) < 500_000
        assert cpu() < 5


@pytest.mark.nightly
@pytest.mark.row(26, "a file that would fill the memory is an error, or is read in chunks")
def test_the_largest_image_that_is_taken_fits_in_500_mb():
    data = huge_png(8192, 8192)
    growth = grown(lambda: images.fit(images.decode(data, "large.png"), 64).size == (64, 64))
    assert 200_000 < growth < 500_000


# ---- modes ------------------------------------------------------------------------------------------------------------


def tiff(mode, array):
    return encoded(Image.fromarray(array).convert(mode), "TIFF")


def rgb16_png():
    """Two pixels of 16 bits a colour."""
    pixels = struct.pack(">6H", 65535, 32768, 255, 257 * 7, 0, 65280)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")


def with_alpha(image, alpha):
    image.putalpha(alpha)
    return image


def palette_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=0)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# (bytes of a file, mode after reading, its first pixel and its last)
MODES = {
    "1": lambda: (encoded(Image.fromarray(np.array([[True, False]]))), "L", 255, 0),
    "L": lambda: (encoded(Image.fromarray(np.array([[7, 200]], np.uint8))), "L", 7, 200),
    "LA, alpha on white": lambda: (encoded(with_alpha(Image.new("L", (1, 1), 100), 128)), "L", 177, 177),
    "P": lambda: (encoded(Image.new("RGB", (2, 1), (9, 8, 7)).quantize(2)), "RGB", (9, 8, 7), (9, 8, 7)),
    "P with a transparent colour": lambda: (palette_with_transparency(), "RGB", (255, 255, 255), (200, 100, 50)),
    "RGB": lambda: (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), "RGB", (1, 2, 3), (1, 2, 3)),
    "RGBA, alpha on white": lambda: (encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 51))), "RGB", (255, 204, 204), (255, 204, 204)),
    "CMYK": lambda: (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), "RGB", (0, 255, 255), (0, 255, 255)),
    "I;16": lambda: (encoded(Image.fromarray(np.array([[257 * 100, 65535]], np.uint16))), "L", 100, 255),
    "RGB of 16 bits": lambda: (rgb16_png(), "RGB", (255, 128, 1), (7, 0, 254)),
    "ICC profile, not applied": lambda: (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), icc_profile=SRGB), "RGB", (1, 2, 3), (1, 2, 3)),
    "animated, the first picture": lambda: (
        encoded(Image.new("L", (1, 1), 40), "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 90)]), None, 40, 40,
    ),
}  # fmt: skip


@pytest.mark.row(27, "every mode of image has a rule, tested by golden pixels")
@pytest.mark.parametrize("mode", MODES)
def test_an_odd_mode_has_its_rule(mode):
    data, wanted, first, last = MODES[mode]()
    image = images.decode(data, "here")
    assert wanted in (None, image.mode)
    image = image.convert("L") if wanted is None else image
    assert (image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))) == (first, last)


@pytest.mark.row(27, "every mode of image has a rule, tested by golden pixels")
@pytest.mark.parametrize("array", (np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)))
def test_numbers_without_a_stated_range_are_refused(array):
    with pytest.raises(InputError, match="has no stated range; convert it to 8 or 16 bits"):
        images.decode(encoded(Image.fromarray(array), "TIFF"), "here")


@pytest.mark.row(27, "every mode of image has a rule, tested by golden pixels")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_that_a_camera_noted_is_applied(orientation):
    """What EXIF says: where row 0 and column 0 of the file stand in the upright picture."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    turned = upright[::-1, ::-1]
    as_stored = {
        1: upright,
        2: upright[:, ::-1],
        3: turned,
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: turned.T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.decode(encoded(Image.fromarray(np.ascontiguousarray(as_stored)), exif=exif), "here")
    assert np.asarray(image).tolist() == upright.tolist()


# ---- other data than before, and too few ------------------------------------------------------------------------------


@pytest.fixture
def eight(tmp_path):
    for k in range(8):
        path = tmp_path / "images" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(noise(k, 8)))
    return tmp_path / "images"


CHANGES = {
    "added": (lambda folder: (folder / "9.png").write_bytes(encoded(noise(9, 8))), "8 images then, 9 now"),
    "removed": (lambda folder: (folder / "3.png").unlink(), "8 images then, 7 now"),
    "replaced": (lambda folder: (folder / "3.png").write_bytes(encoded(noise(3, 9))), "8 images then, 8 now"),
    "renamed": (lambda folder: (folder / "3.png").rename(folder / "33.png"), "8 images then, 8 now"),
}


@pytest.mark.row(28, "a data set that changed since the last start stops the resume and prints the counts")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_stop_a_resume_unless_accepted(eight, tmp_path, change):
    act, said = CHANGES[change]
    assert run(*train_args(tmp_path / "run", "--dataset", eight, "--max_steps", 6))[0] == 0
    act(eight)
    code, _, err = run(*train_args(tmp_path / "run", "--dataset", eight, "--max_steps", 7))
    assert code == 2 and said in err and "--accept_changed_data" in err and newest_step(tmp_path / "run") == 6
    code, _, err = run(*train_args(tmp_path / "run", "--dataset", eight, "--max_steps", 7, "--accept_changed_data"))
    assert code == 0 and "warning: dataset" in err
    (noted,) = json.loads((tmp_path / "run" / "config.json").read_text())["changes"]
    before, after = noted["before"]["images"], noted["after"]["images"]
    assert (noted["step"], noted["name"]) == (6, "data") and said == f"{before} images then, {after} now"


def of_sizes(folder, *sizes):
    folder.mkdir()
    for k, size in enumerate(sizes):
        (folder / f"{k}.png").write_bytes(encoded(Image.new("L", size, 20 * k)))
    return folder


SMALL = {
    "one image": ([(8, 8)], [], 0, "finished"),
    "fewer than a batch": ([(8, 8)] * 5, [], 0, "finished"),
    "not square": ([(30, 8), (8, 21)], [], 0, "finished"),
    "smaller than the resolution": ([(3, 2), (1, 1)], [], 0, "finished"),
    "none": ([], [], 2, "holds no images"),
    "no labels": ([(8, 8)] * 3, ["--class_conditional"], 2, "has no label; put it in a sub-folder named after its class"),
}


@pytest.mark.row(29, "few, unusual or unlabelled images: a clear error, or a defined behaviour")
@pytest.mark.parametrize("case", SMALL)
def test_little_data_is_trained_on_or_refused_in_a_sentence(tmp_path, case):
    sizes, flags, code, said = SMALL[case]
    folder = of_sizes(tmp_path / "images", *sizes)
    ended, _, err = run(*train_args(tmp_path / "run", "--dataset", folder, "--max_steps", 4, *flags))
    assert ended == code and said in err and "Traceback" not in err


# ---- archives ---------------------------------------------------------------------------------------------------------


def npy(shape, descr="|u1", data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


ARCHIVES = {
    "a member outside": {"../x.npy": npy((1,), data=b"1")},
    "an absolute member": {"/tmp/x.npy": npy((1,), data=b"1")},
    "objects": {"arr_0.npy": npy((2, 2, 2, 3), "|O")},
    "10^12 bytes": {"arr_0.npy": npy((10**12 // 192, 8, 8, 3))},
    "more than all disks": {"arr_0.npy": npy((10**15, 8, 8, 3))},
    "negative": {"arr_0.npy": npy((-5, 8, 8, 3))},
    "floats": {"arr_0.npy": npy((1, 8, 8, 3), "<f4", bytes(768))},
    "no header": {"arr_0.npy": b"hello"},
    "statistics of objects": {"mu.npy": npy((4,), "|O"), "sigma.npy": npy((4, 4), "|O")},
    "statistics of 10^12 numbers": {"mu.npy": npy((10**6,), "<f8"), "sigma.npy": npy((10**6, 10**6), "<f8")},
}


@pytest.mark.row(30, "archives are not extracted, and the sizes that they declare are not trusted")
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_odd_archive_is_refused_and_writes_nothing(tmp_path, case):
    path = tmp_path / "in" / "odd.npz"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ARCHIVES[case].items():
            archive.writestr(name, data)
    first = Forked("eval.py", "score", path, "--reference", "digits", "--metrics", "colour", "--cache_dir", "")
    second = Forked("eval.py", "score", path.parent.parent, "--reference", path, "--metrics", "colour", "--cache_dir", "")
    (code, _, err), (other, _, also) = first.result(), second.result()
    assert (code, other) == (2, 2) and "Traceback" not in err + also and first.cpu + second.cpu < 60
    assert "odd.npz" in err.strip().splitlines()[-1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "odd.npz"]


@pytest.mark.row(30, "archives are not extracted, and the sizes that they declare are not trusted")
def test_of_two_members_of_one_name_one_is_read_whole(tmp_path):
    path, arrays = tmp_path / "twice.npz", [np.full((2, 8, 8, 3), k, np.uint8) for k in (3, 9)]
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for array in arrays:
            archive.writestr("arr_0.npy", npy(array.shape, data=array.tobytes()))
    ((_, batch),) = images_of_npz(path).batches(8, 0, 1)
    assert len(set(batch.flatten().tolist())) == 1
