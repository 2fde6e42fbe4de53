"""`--aspect_ratio_buckets`: the sizes, which image has which, which images a step has, and a training with them."""

import functools
import io
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import as_ranks, metrics, tensors
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from here import trained_here
from PIL import Image
from text_models import make_base, text_args

from debias_diffusers import cli
from debias_diffusers.config.loading import resolved, update
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data import images
from debias_diffusers.data.buckets import BucketOrder, Buckets, bucket_sizes, side_step
from debias_diffusers.data.dataset import PositionBatchSampler, load_batch
from debias_diffusers.tasks import frozen_parts
from debias_diffusers.training.setup.plan import prepare

# ---- sizes -----------------------------------------------------------------------------------------------------------

# Heights of SDXL's training and their widths (arXiv 2307.01952, appendix I).
SDXL = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344), 768: (1344, 1280),
    832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024, 960), 1088: (960, 896), 1152: (896, 832), 1216: (832,),
    1280: (768,), 1344: (768, 704), 1408: (704,), 1472: (704,), 1536: (640,), 1600: (640,), 1664: (576,), 1728: (576,), 1792: (576,),
    1856: (512,), 1920: (512,), 1984: (512,), 2048: (512,),
}  # fmt: skip


def test_the_sizes_of_1024_are_those_of_sdxl():
    found = bucket_sizes(1024, 8)
    assert len(found) == len(set(found)) and set(found) == {(height, width) for height, widths in SDXL.items() for width in widths}
    assert {tuple(map(int, size)) for size in ASPECT_RATIO_1024_BIN.values()} <= set(found)  # as diffusers lists them, but for some


def test_sizes_have_about_one_area_and_sides_that_the_model_takes():
    for resolution in range(8, 1600, 8):
        found, step = bucket_sizes(resolution, 8), side_step(resolution, 8)
        assert step % 8 == 0 and (step == 64) == (resolution >= 512)
        assert all(height % step == width % step == 0 or height == width == resolution for height, width in found)
        assert all(0.9 <= height * width / resolution**2 <= 1 and 1 / 4 <= height / width <= 4 for height, width in found)
        assert (resolution, resolution) in found or resolution % step
        assert {(width, height) for height, width in found} == set(found)


def test_every_image_has_the_size_of_the_nearest_ratio():
    originals = [(1000, 1000), (3000, 1000), (100, 900), (700, 500), (2048, 512), (10, 1)]
    buckets = Buckets(originals, 1024, 8)
    every = bucket_sizes(1024, 8)
    for (height, width), found in zip(originals, buckets.sizes):
        ratio = height / width
        assert found == min(every, key=lambda size, ratio=ratio: max(ratio / (size[0] / size[1]), size[0] / size[1] / ratio))
    assert buckets.sizes[4] == (2048, 512) and buckets.enlarged == 4
    said = buckets.describe([0, 1, 1, 2, 3, 4, 5])
    assert "1024x1024: 1" in said and "576x1728: 2" in said and "512x2048: 2" in said and "4 images are smaller" in said


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_size_is_that_of_the_decoded_image(kind):
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.new("RGB", (24, 10)).save(file, kind, exif=exif)
        assert images.size_of(file.getvalue(), "x") == images.decode(file.getvalue(), "x").size[::-1]


# ---- the order -------------------------------------------------------------------------------------------------------

COUNTS = {(8, 32): 1, (16, 16): 61, (24, 40): 17, (32, 8): 8}
SAMPLES = [size for size, count in COUNTS.items() for _ in range(count)]


def test_an_epoch_has_every_sample_once_up_to_a_batch_of_each_bucket():
    order, size = BucketOrder(SAMPLES, 8, seed=3), 8
    seen, streams = Counter(), {bucket: [] for bucket in COUNTS}
    for epoch in range(1, 12):
        for step in range(order.steps(epoch - 1), order.steps(epoch)):
            indices = [order.index(position) for position in range(step * size, (step + 1) * size)]
            (bucket,) = {SAMPLES[index] for index in indices}  # one size a step
            streams[bucket] += indices
            seen.update(indices)
        for bucket, count in COUNTS.items():
            times = [seen[index] for index in range(len(SAMPLES)) if SAMPLES[index] == bucket]
            assert min(times) >= epoch and 0 <= sum(times) - epoch * count < size, (epoch, bucket)
    for bucket, stream in streams.items():  # permutations, one after the other
        own = [index for index in range(len(SAMPLES)) if SAMPLES[index] == bucket]
        parts = [stream[first : first + len(own)] for first in range(0, len(stream) - len(own) + 1, len(own))]
        assert all(sorted(part) == own for part in parts) and (len(own) < 10 or parts[0] != parts[1])
    assert order.steps(0.5) == 1 + 4 + 2 + 1 and abs(order.steps(100) - 100 * len(SAMPLES) / size) < len(COUNTS)


def test_a_position_is_found_without_those_before_it():
    order, positions = BucketOrder(SAMPLES, 8, seed=3), range(40 * 8)
    expected = [order.index(position) for position in positions]
    for position in (317, 3, 200, 199, 0, 88):
        assert BucketOrder(SAMPLES, 8, seed=3).index(position) == expected[position] == order.index(position)
    assert [BucketOrder(SAMPLES, 8, seed=4).index(position) for position in positions] != expected
    far = 10**12
    assert BucketOrder(SAMPLES, 8, seed=3).index(far) == order.index(far)
    large = BucketOrder([(16, 16)] * 1_000_000 + [(8, 32)] * 3, 64, seed=0)
    assert [large.index(64 * large.steps(7) - 1)] and large.steps(7) == -(-7_000_000 // 64) + 1


def test_any_number_of_processes_and_micro_batches_has_the_same_steps():
    order = BucketOrder(SAMPLES, 12, seed=0)
    for processes in (1, 2, 3):
        for micro in (1, 3, 4, 12):
            for step in (0, 1, 7, 40):
                parts = [
                    [order.index(position) for position in part]
                    for rank in range(processes)
                    for part in PositionBatchSampler(12, micro, rank, processes, range(50)).micro_batches(step)
                ]
                expected = [order.index(position) for position in range(12 * step, 12 * step + 12)]
                assert [index for part in parts for index in part] == expected
                assert len({SAMPLES[index] for part in parts for index in part}) == 1


# ---- data ------------------------------------------------------------------------------------------------------------

SIZES = ((40, 24), (24, 40), (30, 30), (64, 16), (100, 60), (16, 64), (20, 20), (45, 27), (33, 31))  # width, height


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "xl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for k, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(k).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"number {k}")
    return folder


FLAGS = (
    "--aspect_ratio_buckets", "--resolution", 32, "--random_flip", "--batch_size", 4, "--max_steps", 5,
    "--prediction_type", "epsilon", "--noise_schedule", "scaled_linear",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Batches of the VAE are always full; these images are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_parts, "MOST_IMAGES", 4)
        yield


@functools.cache
def parsed(base, data):
    words = text_args(base, "never/made", "--dataset", data, *FLAGS)[1:]
    config, chosen = cli.train_command([str(word) for word in words], None)
    return resolved(config, None), chosen


def plan_of(base, data, **values):
    config, chosen = parsed(base, data)
    return prepare(update(config, values), None, Accelerator(), chosen)


def test_samples_have_the_crop_noise_and_conditions_of_their_size(base, data):
    """Pixels and size conditioning against Pillow and the stock rules; the shorter way of the resize is filled exactly."""
    task = plan_of(base, data, crop="random").task
    task.prepare()
    assert task.data.latents is None and task.data.stored is None  # they would be those of another crop
    seen = set()
    for position in range(80):
        sample, index = task.data[position], task.data.index(position)
        image = Image.open(data / f"{index}.png")
        height, width = task.data.size(index)
        assert min(bucket_sizes(32, 8), key=lambda s, i=image: abs(np.log(s[1] / s[0] * i.height / i.width))) == (height, width)
        scale = max(height / image.height, width / image.width)
        resized = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
        assert min(resized.width - width, resized.height - height) == 0
        if task.data.flips(position):
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        *original, top, left, target_height, target_width = map(int, sample["time_ids"])
        assert (*original, target_height, target_width) == (image.height, image.width, height, width)
        cropped = np.array(resized.crop((left, top, left + width, top + height)))
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), cropped)
        assert sample["noise"].shape == sample["posterior"].shape == (4, height // 2, width // 2)
        seen.add((height, width))
    assert len(seen) == len(set(task.data.buckets.sizes)) > 3


def test_latents_are_kept_for_each_size(base, data, tmp_path):
    fresh, kept, stored = (plan_of(base, data, precompute_dir=folder).task for folder in (None, None, str(tmp_path / "computed")))
    kept.prepare()
    stored.prepare()
    for step in range(10):
        positions = range(4 * step, 4 * step + 4)
        batches = [load_batch(task.data, positions) for task in (fresh, kept, stored)]
        assert "image" in batches[0] and "image" not in batches[1]
        assert torch.allclose(fresh.x_0(batches[0], "cpu"), kept.x_0(batches[1], "cpu"), atol=1e-5)
        assert torch.equal(kept.x_0(batches[1], "cpu"), stored.x_0(batches[2], "cpu"))
        assert torch.equal(batches[0]["time_ids"], batches[1]["time_ids"]) and torch.equal(batches[1]["time_ids"], batches[2]["time_ids"])
    network = kept.build().eval()
    assert kept.draw(network, [0, 1], ["number 1"]).shape == (2, 3, 32, 32)  # previews stay square
    again = plan_of(base, data, precompute_dir=str(tmp_path / "computed")).task
    again.prepare()
    assert "vae" not in vars(again.latents)  # nothing was encoded


def test_epochs_repeats_and_held_out_images(base, data, tmp_path, capsys):
    assert plan_of(base, data, num_epochs=3.0, max_steps=100_000).config.optimization.max_steps == sum(
        -(-3 * count // 4) for count in Counter(Buckets([(h, w) for w, h in SIZES], 32, 8).sizes).values()
    )
    assert "aspect_ratio_buckets: " in capsys.readouterr().err
    folder = tmp_path / "5_often"
    folder.mkdir()
    for name in ("0.png", "0.txt", "2.png", "2.txt"):
        (tmp_path / name if name[0] == "2" else folder / name).write_bytes((data / name).read_bytes())
    task = plan_of(base, tmp_path, folder_repeats=True).task
    assert task.data.count == 6 and task.data._by_step.steps(1) == 2 + 1 and "40x24: 5" in task.data.describe_sizes()
    held = plan_of(base, data, validation_split=0.5).task.held_out
    parts = held.one_shape(range(held.count))
    assert sorted(position for part in parts for position in part) == list(range(held.count))
    assert {held.index(position) for position in range(held.count)} == set(range(held.count))
    assert len(parts) == len(set(held.buckets.sizes)) > 1
    for part in parts:
        load_batch(held, part)


def test_what_does_not_go_with_buckets_is_one_sentence(base, data):
    config, _ = parsed(base, data)
    for names, said in ((("batch_size",), "decides which images a step has"), (("aspect_ratio_buckets",), "cannot change in the middle")):
        (problem,) = train_problems(update(config, {"allow_change": names}))
        assert said in problem


# ---- trainings -------------------------------------------------------------------------------------------------------


HELD_OUT = {"validation_split": 0.4, "validation_every": 4}


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """A training without an interruption, with validation losses."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    config, _ = parsed(base, data)
    trained_here(update(config, {"output_dir": str(folder), **HELD_OUT}))
    return folder


def test_a_resume_has_the_same_bits(base, data, whole, tmp_path):
    config, _ = parsed(base, data)
    for steps in (2, 5):
        trained_here(update(config, {"output_dir": str(tmp_path / "run"), "max_steps": steps, **HELD_OUT}))
    assert tensors(tmp_path / "run", 5) == tensors(whole, 5) and metrics(tmp_path / "run") == metrics(whole)
    assert any("validation_loss" in line for line in metrics(whole))


def test_two_processes_train_the_same_and_share_what_is_precomputed(base, data, whole, tmp_path):
    flags = [word for name, value in HELD_OUT.items() for word in (f"--{name}", value)]
    words = text_args(base, tmp_path / "run", "--dataset", data, "--precompute_dir", tmp_path / "computed", *FLAGS, *flags)
    code, err = as_ranks(2, *words)
    assert code == 0 and err.count(": computing") == 1, err
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (whole, tmp_path / "run")]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], rel=1e-4)
